"""How a lease's end reaches what hangs on it, and that an end is an end."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from etcd_infra import SessionLostError
from etcd_infra._session.clock import Clock
from etcd_infra._session.keepalive import LivingLease, Tether
from etcd_infra.testing import FaultyBackend, MemoryEtcd


async def granted(backend, ttl=10):
    """Grant a lease that nobody renews."""
    clock = Clock(trio.current_time)
    await backend.lease_grant(ttl, lease=7)
    return LivingLease(backend, clock, random.Random(1), lease=7, ttl=ttl, sent_at=clock.now())


def test_scope_ends_by_its_own_deadline():
    """A loop that was blocked beyond the TTL sees the end at its first checkpoint, whichever task runs first."""
    clock = trio.testing.MockClock(rate=0.0)

    async def main() -> None:
        with Tether(await granted(MemoryEtcd())):
            clock.jump(60)
            await trio.lowlevel.checkpoint()
            pytest.fail("the body went on")

    trio.run(main, clock=clock)


async def test_loss_stays_when_a_renewal_is_answered_after_it(etcd, autojump_clock):
    """A lease that is lost while its renewal is on the way stays lost, though the answer proves that it lives."""
    slow = FaultyBackend(etcd)
    slow.only = lambda verb, _: verb == "lease_keep_alive"
    lease = await granted(slow)
    slow.delay_next_answer(2)
    async with trio.open_nursery() as nursery:

        async def renew() -> None:
            with pytest.raises(SessionLostError, match="on demand"):
                await lease.renew()

        nursery.start_soon(renew)
        await trio.sleep(1)
        lease.lose(SessionLostError("on demand"))
    assert lease.is_lost()
    assert 0.0 == lease.remaining()
