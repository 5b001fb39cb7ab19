"""A service's own test: two simulated processes, a crash, and a TTL that passes in no time."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from etcd_infra import open_coordinator
from etcd_infra.testing import MemoryEtcd


async def crash_story() -> float:
    """Let the holder crash; return after how many seconds the waiter got the lock."""
    etcd = MemoryEtcd()
    doomed, healthy = etcd.node("doomed"), etcd.node("healthy")
    async with trio.open_nursery() as nursery:
        ready = trio.Event()

        async def hold_and_crash() -> None:
            async with open_coordinator(doomed, ttl=10, boot_clock=trio.current_time) as infra:
                await infra.lock("order:123").acquire()
                ready.set()
                await trio.sleep_forever()

        nursery.start_soon(hold_and_crash)
        await ready.wait()
        doomed.crash()
        began = trio.current_time()
        async with open_coordinator(healthy, boot_clock=trio.current_time) as infra:
            async with infra.lock("order:123"):
                waited = trio.current_time() - began
        nursery.cancel_scope.cancel()
    return waited


def test_waiter_overtakes_crashed_holder() -> None:
    """The lock passes on when the crashed holder's lease runs out, not before and not much later."""
    waited = trio.run(crash_story, clock=MockClock(autojump_threshold=0))
    assert 9 <= waited <= 12


if __name__ == "__main__":
    test_waiter_overtakes_crashed_holder()
    print("the waiter overtook the crashed holder")
