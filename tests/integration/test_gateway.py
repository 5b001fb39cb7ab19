"""What the gateway must stand that other roads do not feel: many waiters, each of whom could hold a thread."""

from __future__ import annotations

import pytest
import trio

from etcd_infra import open_coordinator
from etcd_infra.testing import EtcdServer, find_etcd

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(find_etcd() is None, reason="no etcd program here"),
]


async def test_hundred_waiters_do_not_keep_a_lease_from_being_renewed():
    """With 100 tasks in line and 100 watches, a lease of three seconds is kept for eight, and all get their turn."""
    async with EtcdServer() as server:
        async with open_coordinator(server.endpoint, ttl=3, transport="gateway") as infra:
            first = infra.session
            turns = 0

            async def take():
                nonlocal turns
                async with infra.lock("job"):
                    turns += 1

            async def follow():
                async with infra.state.watch(prefix="") as watch:
                    async for _ in watch:
                        pass

            with trio.fail_after(60):
                async with trio.open_nursery() as followers:
                    for _ in range(100):
                        followers.start_soon(follow)
                    async with trio.open_nursery() as nursery:
                        async with infra.lock("job") as hold:
                            for _ in range(100):
                                nursery.start_soon(take)
                            await trio.sleep(8)
                            await infra.state.set("k", 1, fence=hold.fence)
                    followers.cancel_scope.cancel()
            assert 100 == turns
            assert first is infra.session


async def test_server_that_is_restarted_costs_no_write():
    """Connections that were kept and died with the server are noticed: state is written once, and counted once."""
    async with EtcdServer() as server:
        async with open_coordinator(server.endpoint, ttl=20, transport="gateway") as infra:
            counter = infra.counter("jobs")
            for _ in range(3):
                async with trio.open_nursery() as nursery:
                    for _ in range(20):
                        nursery.start_soon(counter.add, 1)
                await server.kill()
                await server.restart()
            with trio.fail_after(30):
                assert 61 == await counter.add(1)
