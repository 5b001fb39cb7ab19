"""What one release costs when very many wait: events and requests do not grow with the waiters."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio

from etcd_infra._etcd.keys import Keys
from etcd_infra.testing import MemoryEtcd
from tests.conftest import NAMESPACE, open_infra
from tests.helpers.counting import CountingBackend

KEYS = Keys(NAMESPACE)
PROCESSES = 5


async def cost_of_a_release(etcd, take, waiters):
    """Let many wait in five processes, release once; return the events, the requests, and how many came through."""
    backends = [CountingBackend(etcd.node(f"n{number}")) for number in range(PROCESSES)]
    through = []
    async with AsyncExitStack() as stack:
        holder = await stack.enter_async_context(open_infra(etcd.node("holder"), seed=99, ttl=600))
        many = [
            await stack.enter_async_context(open_infra(backend, seed=number, ttl=600))
            for number, backend in enumerate(backends)
        ]
        nursery = await stack.enter_async_context(trio.open_nursery())

        async def wait(infra) -> None:
            async with take(infra):
                through.append(infra)
                await trio.sleep(500)

        async with take(holder):
            for number in range(waiters):
                nursery.start_soon(wait, many[number % PROCESSES])
            await trio.sleep(10)
            assert [] == through
            for backend in backends:
                backend.begin()
        # Long enough for the next one's guard as well.
        await trio.sleep(3)
        events = [event.key for backend in backends for event in backend.events]
        requests = [call.verb for backend in backends for call in backend.calls]
        nursery.cancel_scope.cancel()
    return events, requests, len(through)


# Each kind, and how many wait for it.
KINDS = {
    "lock": (lambda infra: infra.lock("job"), 200),
    "election": (lambda infra: infra.election("job").lead(), 1000),
    "writing": (lambda infra: infra.rwlock("job").write, 200),
    "multi-lock": (lambda infra: infra.multi_lock("job", "other"), 200),
    "semaphore": (lambda infra: infra.semaphore("job", 1), 1000),
}
REQUESTS = 6  # at most: a look and a move, then a holder's guard


@pytest.mark.parametrize("kind", KINDS)
async def test_cost_of_a_release_does_not_grow_with_the_waiters(kind, autojump_clock):
    """Among ten and among very many a release wakes one; each process is told of as many events."""
    take, waiters = KINDS[kind]
    few = await cost_of_a_release(MemoryEtcd(), take, 10)
    many = await cost_of_a_release(MemoryEtcd(), take, waiters)
    assert 1 == few[2] == many[2]
    lines = [[event.rpartition(b"/")[0] for event in events] for events in (few[0], many[0])]
    assert sorted(lines[0]) == sorted(lines[1])
    assert PROCESSES == max(map(lines[1].count, lines[1]))
    assert len(few[1]) <= REQUESTS
    assert len(many[1]) <= REQUESTS
