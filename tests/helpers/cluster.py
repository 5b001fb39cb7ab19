"""A cluster of real members, for tests that stop some of them."""

from __future__ import annotations

from contextlib import asynccontextmanager

import trio

from etcd_infra.testing.server import EtcdServer, free_port

QUICK = ("--heartbeat-interval=50", "--election-timeout=500")


@asynccontextmanager
async def open_cluster(size=3, extra_args=QUICK):
    """Start `size` members of one cluster; they are healthy when the block begins."""
    peers = {f"m{number}": f"http://127.0.0.1:{free_port()}" for number in range(size)}
    members = [
        EtcdServer(
            extra_args=[
                f"--name={name}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster={','.join('='.join(pair) for pair in peers.items())}",
                *extra_args,
            ]
        )
        for name, peer in peers.items()
    ]
    try:
        # etcd: no member is healthy before a quorum runs.
        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(member.__aenter__)
        yield members
    finally:
        for member in members:
            await member.__aexit__(None, None, None)
