"""Renewals: in any order, refused, or answered by a member that knows the lease is gone."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra._session.clock import Clock
from etcd_infra._session.keepalive import LivingLease, SessionStatus, Tether
from etcd_infra._wrappers.retrying import Retrying
from etcd_infra.errors import LeaseNotFoundError, LockLostError, SessionLostError, UnavailableError
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import open_infra
from tests.helpers.watches import FaultyWatches


def renewals(verb, _):
    return verb == "lease_keep_alive"


async def granted(backend, clock, *, ttl=10):
    """Grant lease 7 and return it as this process sees it."""
    await backend.lease_grant(ttl, lease=7)
    return LivingLease(backend, clock, random.Random(1), lease=7, ttl=ttl, sent_at=clock.now())


async def test_answers_in_reverse_order_prove_the_later_send(etcd, autojump_clock):
    """A renewal's answer that comes after a later renewal's does not shorten what that one proved."""
    slow = FaultyBackend(etcd)
    slow.only = renewals
    lease = await granted(slow, Clock(trio.current_time))
    slow.delay_next_answer(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lease.renew)
        await trio.sleep(1)
        await lease.renew()
        assert 1 == slow.struck
    assert pytest.approx(7, abs=0.01) == lease.remaining()


async def test_lease_that_is_gone_cancels_bodies_while_the_watch_is_down(etcd, autojump_clock):
    """With no watch at all, a revoked lease ends the body at the next renewal, not at its deadline."""
    watches = FaultyWatches(etcd.node("one"))
    watches.refused = True
    async with open_infra(watches, ttl=60) as infra:
        began = trio.current_time()
        with pytest.raises(LockLostError, match="does not exist any more"):
            async with infra.lock("job"):
                await etcd.lease_revoke(infra.session.lease.id)
                await trio.sleep_forever()
        assert pytest.approx(12, abs=1) == trio.current_time() - began


async def test_scope_tied_to_a_lost_lease_is_cancelled_from_the_start(etcd, autojump_clock):
    """A body that begins when the lease is lost already does not reach its first checkpoint."""
    async with open_infra(etcd.node("one"), ttl=60) as infra:
        session = infra.session
        session.lose(SessionLostError("on demand"))
        with session.tether() as tether:
            await trio.lowlevel.checkpoint_if_cancelled()
            pytest.fail("the body went on")
        assert tether.scope.cancelled_caught


async def test_renewal_that_is_told_lease_not_found_is_a_loss(etcd, autojump_clock):
    """A member answers a renewal with LeaseNotFoundError: the lease is lost then, not at its deadline."""

    class Forgetful(FaultyBackend):
        async def around(self, verb, request, call):
            if verb == "lease_keep_alive":
                await trio.lowlevel.checkpoint()
                raise LeaseNotFoundError("requested lease not found")
            return await super().around(verb, request, call)

    lease = await granted(Forgetful(etcd), Clock(trio.current_time))
    began = trio.current_time()
    with trio.fail_after(9):
        await lease.keep_alive()
    assert pytest.approx(2, abs=0.01) == trio.current_time() - began
    assert lease.is_lost()
    with pytest.raises(SessionLostError, match="does not exist any more"):
        raise lease.error


async def test_clocks_that_drift_apart_move_the_deadline(etcd, autojump_clock):
    """After a suspension of 49.5 s the body ends when the boot-time clock says so, between two seconds."""
    suspended = 0.0
    clock = Clock(lambda: trio.current_time() + suspended)
    lease = await granted(etcd, clock, ttl=60)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lease.keep_alive)
        with Tether(lease):
            await trio.sleep(1.5)
            suspended = 49.5
            await trio.sleep_forever()
        assert pytest.approx(4.5, abs=0.01) == trio.current_time() - began
        nursery.cancel_scope.cancel()


async def test_keep_alive_is_tried_once_per_attempt(etcd, autojump_clock):
    """The retrying wrapper passes on a keep-alive's first failure: the session's own pace does the rest."""
    faulty = FaultyBackend(etcd)
    faulty.only = renewals
    recording = RecordingBackend(faulty)
    await etcd.lease_grant(10, lease=7)
    faulty.refuse_next()
    with pytest.raises(UnavailableError):
        await Retrying(recording, random.Random(1)).lease_keep_alive(7)
    assert ["lease_keep_alive"] == recording.verbs()


async def test_first_failed_renewal_suspends_at_once(etcd, autojump_clock):
    """A session is SUSPENDED at its first failed renewal, and ALIVE again at the next one's answer."""
    faulty = FaultyBackend(etcd.node("one"))
    faulty.only = renewals
    async with open_infra(faulty, ttl=30) as infra:
        faulty.refuse_next()
        await trio.sleep(6.001)
        assert 1 == faulty.struck
        assert SessionStatus.SUSPENDED is infra.session.status
        await trio.sleep(0.5)
        assert SessionStatus.ALIVE is infra.session.status
