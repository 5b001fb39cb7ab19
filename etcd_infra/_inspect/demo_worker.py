"""
One process of the demo: takes the lock again and again, and writes state under its fence.

It reports each step as one JSON line on standard output. ``python -m etcd_infra._inspect.demo_worker
ENDPOINT NAMESPACE NAME``.
"""

from __future__ import annotations

import json
import logging
import sys
import time

import trio

from etcd_infra import Coordinator, Hold, LockLostError, SessionLostError, open_coordinator
from etcd_infra.abc import Put, Txn

LOCK = "demo"
TTL = 2
HOLD_SECONDS = 0.25
REST_SECONDS = 0.05


def ledger_key(namespace: str) -> bytes:
    """Return the key that the demo's processes write."""
    return f"{namespace}/state/ledger".encode()


def report(event: str, **facts: object) -> None:
    """Tell the parent, at once."""
    sys.stdout.write(json.dumps({"event": event, "at": time.time(), **facts}) + "\n")
    sys.stdout.flush()


async def write(infra: Coordinator, hold: Hold) -> bool:
    """Write the ledger under the hold's fence; return whether etcd accepted it."""
    value = json.dumps({"writer": infra.node_id, "token": hold.token}).encode()
    request = Txn(compare=hold.fence.proof, success=(Put(ledger_key(infra.namespace), value),))
    return (await infra.backend.txn(request)).succeeded


async def work(infra: Coordinator) -> None:
    """Hold the lock once; afterwards try what a careless program would do with a lost one."""
    hold: Hold | None = None
    try:
        async with infra.lock(LOCK) as hold:
            report("acquired", token=hold.token)
            await trio.sleep(HOLD_SECONDS)
            accepted = await write(infra, hold)
            report("wrote" if accepted else "refused", token=hold.token)
        report("released", token=hold.token)
    except (LockLostError, SessionLostError) as error:
        report("lost", token=hold.token if hold else None, why=str(error))
        if hold is not None:
            # The body was cancelled; a program that ignores this and writes all the same is fenced.
            accepted = await write(infra, hold)
            report("stale-write-accepted" if accepted else "stale-write-refused", token=hold.token)


async def run(endpoint: str, namespace: str, name: str) -> None:
    """Work until killed."""
    async with open_coordinator(endpoint, namespace=namespace, ttl=TTL, node_id=name) as infra:
        report("ready")
        while True:
            await work(infra)
            await trio.sleep(REST_SECONDS)


if __name__ == "__main__":
    # What is lost is reported on standard output; warnings would tear the parent's picture apart.
    logging.getLogger("etcd_infra").setLevel(logging.ERROR)
    trio.run(run, sys.argv[1], sys.argv[2], sys.argv[3])
