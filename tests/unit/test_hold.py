"""Holds at their ends: leases of their own, losses, and what is left after a release."""

from __future__ import annotations

import pytest
import trio

from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange
from etcd_infra._primitives._hold import LockStatus
from etcd_infra._primitives._lock_like import Renewal
from etcd_infra.errors import LockLostError, SessionLostError
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import NAMESPACE, open_infra

KEYS = Keys(NAMESPACE)
LINE = KeyRange.prefix(KEYS.lock_line("job"))


def line(etcd):
    """List the keys in the line at this very moment."""
    return [kv.key for kv in etcd.store.snapshot().kvs if kv.key in LINE]


async def test_own_lease_is_ended_after_a_partition(etcd, autojump_clock):
    """A lock with a lease of ten minutes is released in a partition: soon after its end key and lease go."""
    node = etcd.node("one")
    async with open_infra(node, ttl=60) as infra:
        hold = await infra.lock("job", ttl=600).acquire()
        node.partition()
        with trio.fail_after(2.5):
            await hold.release()
        await trio.sleep(5)
        assert 2 == len(await etcd.lease_list())
        node.heal()
        await trio.sleep(3)
        assert [] == line(etcd)
        assert (infra.session.lease.id,) == await etcd.lease_list()


async def test_revoked_lease_is_noticed_within_a_second(etcd, autojump_clock):
    """The session's lease is revoked: within a second the hold is EXPIRED, not FENCED, and a session follows."""
    async with open_infra(etcd.node("one"), ttl=60) as infra:
        session = infra.session
        hold = await infra.lock("job").acquire()
        await trio.sleep(1)
        await etcd.lease_revoke(session.lease.id)
        await trio.sleep(1)
        assert LockStatus.EXPIRED is hold.status
        assert session is not infra.session


async def test_hold_with_an_own_lease_ends_with_its_session(etcd, autojump_clock):
    """A hold on a lease of its own is EXPIRED, with nothing remaining, as soon as the session is lost."""
    async with open_infra(etcd.node("one"), ttl=60) as infra:
        hold = await infra.lock("job", ttl=60).acquire()
        infra.session.lose(SessionLostError("on demand"))
        assert LockStatus.EXPIRED is hold.status
        assert 0 == hold.remaining()
        with pytest.raises(LockLostError, match="on demand"):
            hold.check()
        with pytest.raises(LockLostError, match="on demand"):
            await hold.release()


async def test_hold_with_an_own_lease_remains_no_longer_than_its_session(etcd, autojump_clock):
    """What remains of a hold with a lease of ten minutes is what remains of a session with ten seconds."""
    async with open_infra(etcd.node("one"), ttl=10) as infra:
        hold = await infra.lock("job", ttl=600).acquire()
        assert pytest.approx(9, abs=0.01) == hold.remaining()


async def test_released_hold_hears_of_no_overdue_renewal(etcd, autojump_clock):
    """Only the one of three holds that is not released is told that a renewal is overdue."""
    node = etcd.node("one")
    told = []
    async with open_infra(node, ttl=60) as infra:
        for name in ("a", "b"):
            async with infra.lock(name, on_renewal_failure=lambda hold, _: told.append(hold)):
                pass
        async with infra.lock("c", on_renewal_failure=lambda hold, _: told.append(hold)) as hold:
            node.partition()
            await trio.sleep(20)
            node.heal()
        assert [hold] == told
        assert [] == infra.session.lease.on_overdue


async def test_release_is_no_reason_to_examine_the_lease(etcd, autojump_clock):
    """After the release of a guarded hold nothing is renewed out of turn, and nothing is guarded or heard."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording, ttl=60) as infra:
        hold = await infra.lock("job").acquire()
        await trio.sleep(1)
        watch = infra.session.key_watch(KEYS.locks)
        assert watch._guards
        assert watch._listeners
        recording.calls.clear()
        await hold.release()
        assert not watch._guards
        assert not watch._listeners
        await trio.sleep(1)
        assert ["txn"] == recording.verbs()


async def test_manual_lease_starts_full_after_waiting(etcd, autojump_clock):
    """A MANUAL hold that had to wait for 30.7 s begins with its whole TTL."""
    async with open_infra(etcd.node("one")) as infra:
        hold = await infra.lock("job").acquire()
        remaining = []

        async def wait() -> None:
            async with infra.lock("job", ttl=5, renewal=Renewal.MANUAL) as mine:
                remaining.append(mine.remaining())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(30.7)
            await hold.release()
        assert [pytest.approx(4.5, abs=0.01)] == remaining


async def test_cancelled_join_answer_is_given_back(etcd, autojump_clock):
    """Cancelled while the join's answer is on its way, the place is left before the cancellation goes on."""
    slow = FaultyBackend(etcd.node("one"))
    async with open_infra(slow, ttl=60) as infra:
        slow.delay_next_answer(1)
        with trio.move_on_after(0.5) as scope:
            await infra.lock("job").acquire()
        assert scope.cancelled_caught
        assert [] == line(etcd)
