"""Sessions: granted once, proven from the send, replaced when lost, gone when closed."""

from __future__ import annotations

import random

import pytest
import trio
from msgspec.structs import replace

from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange, LeaseRenewal
from etcd_infra._session.clock import Clock
from etcd_infra._session.keepalive import LivingLease, SessionStatus, margin
from etcd_infra.errors import (
    LockLostError,
    OutcomeUnknownError,
    SessionLostError,
    StorageFullError,
    StoreResetError,
    UnavailableError,
)
from etcd_infra.testing import FaultyBackend, MemoryEtcd, RecordingBackend
from tests.conftest import NAMESPACE, open_infra

KEYS = Keys(NAMESPACE)


async def test_opening_and_closing_cost_three_round_trips(etcd, autojump_clock):
    """A session is a grant and one Txn to open, and one revoke to close; nothing is left."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        assert ["lease_grant", "txn"] == recording.verbs()
        session = infra.session
        (key,) = [kv for kv in etcd.store.snapshot().kvs if kv.key == KEYS.session(session.lease.id)]
        assert key.mod_revision == session.own_key.generation
        assert key.lease == session.lease.id
    assert ["lease_grant", "txn", "lease_revoke"] == recording.verbs()
    assert () == await etcd.lease_list()
    assert [KEYS.epoch] == [kv.key for kv in etcd.store.snapshot().kvs]


async def test_epoch_is_created_once(etcd, autojump_clock):
    """Every session of a store sees the same epoch."""
    async with open_infra(etcd, seed=1) as one, open_infra(etcd, seed=2) as two:
        assert one.session.own_key.epoch == two.session.own_key.epoch
        assert 32 == len(one.session.own_key.epoch)
        epoch = one.session.own_key.epoch
    async with open_infra(MemoryEtcd(), seed=3) as other:
        assert epoch != other.session.own_key.epoch


@pytest.mark.parametrize("fault", ["lose_next_answer", "lose_next_request", "refuse_next"])
@pytest.mark.parametrize("strikes", [1, 2, 3])
async def test_lost_answers_while_opening_leave_one_lease(etcd, autojump_clock, fault, strikes):
    """A grant or a session key without an answer is repeated: one lease, one session key."""
    faulty = FaultyBackend(etcd.node("one"))
    for _ in range(strikes):
        getattr(faulty, fault)()
    async with open_infra(faulty) as infra:
        assert strikes == faulty.struck
        assert (infra.session.lease.id,) == await etcd.lease_list()
        assert infra.session.own_key.generation
    assert () == await etcd.lease_list()


async def test_adopted_lease_is_trusted_from_the_first_send(etcd, autojump_clock):
    """When the first copy of a grant worked, trust counts from that copy, not from the second."""
    faulty = FaultyBackend(etcd.node("one"))
    clock = Clock(trio.current_time)
    began = trio.current_time()
    faulty.lose_next_answer()
    faulty.delay_next(2)
    from etcd_infra._session.granting import grant

    lease = await grant(faulty, clock, random.Random(1), ttl=10)
    assert trio.current_time() - began >= 2
    assert lease.deadline == pytest.approx(began + 9, abs=0.01)


async def test_cancelled_while_opening_leaves_nothing(etcd, autojump_clock):
    """Cancelled at any moment of opening, no lease stays."""
    for hundredths in range(12):
        slow = FaultyBackend(etcd.node("slow"))
        slow.only = lambda *_: True
        slow.delay_next(0.05)
        slow.delay_next(0.05)
        with trio.move_on_after(hundredths / 100):
            async with open_infra(slow):
                pass
        await trio.sleep(3)
        assert () == await etcd.lease_list()


async def test_refused_session_says_why(etcd, autojump_clock):
    """A full store refuses the first session, and opening raises bare what etcd said."""
    etcd.store.full = True
    with pytest.raises(StorageFullError):
        async with open_infra(etcd):
            pytest.fail("opened on a full store")


async def test_lost_session_is_replaced_and_the_body_goes_on(etcd, autojump_clock):
    """Losing the session does not cancel the coordinator's body; a new one follows under a new lease."""
    async with open_infra(etcd.node("one")) as infra:
        first = infra.session
        await etcd.lease_revoke(first.lease.id)
        await trio.sleep(10)
        assert first.status is SessionStatus.LOST
        with pytest.raises(SessionLostError):
            first.check()
        assert infra.session is not first
        assert infra.session.lease.id != first.lease.id
        assert infra.is_healthy()


async def test_states_of_a_session_in_an_outage(etcd, autojump_clock):
    """ALIVE, SUSPENDED as soon as a renewal is overdue, ALIVE again, and LOST before the lease can end."""
    node = etcd.node("one")
    async with open_infra(node, ttl=30) as infra:
        session = infra.session
        assert infra.is_healthy()
        node.partition()
        await trio.sleep(9)
        assert session.status is SessionStatus.SUSPENDED
        assert not infra.is_healthy()
        node.heal()
        await trio.sleep(9)
        assert session.status is SessionStatus.ALIVE
        node.partition()
        began = trio.current_time()
        await session.wait_lost()
        assert 20 <= trio.current_time() - began <= 30 - margin(30)
        assert session.lease.id in await etcd.lease_list()


async def test_only_a_living_answer_counts(etcd, autojump_clock):
    """An answer that was delayed by 0.8 TTL moves the deadline from its sending, not from its arrival."""
    slow = FaultyBackend(etcd)
    slow.only = lambda verb, _: verb == "lease_keep_alive"
    granted = await etcd.lease_grant(10, lease=7)
    clock = Clock(trio.current_time)
    lease = LivingLease(slow, clock, random.Random(1), lease=7, ttl=granted.ttl, sent_at=clock.now())
    began = trio.current_time()
    slow.delay_next(8)
    await lease.renew()
    assert trio.current_time() - began == pytest.approx(8)
    assert lease.remaining() == pytest.approx(1, abs=0.01)


async def test_answer_after_the_end_revives_nothing(etcd, autojump_clock):
    """A renewal that is answered after trust ended leaves the lease lost."""
    slow = FaultyBackend(etcd)
    slow.only = lambda verb, _: verb == "lease_keep_alive"
    await etcd.lease_grant(10, lease=7)
    clock = Clock(trio.current_time)
    lease = LivingLease(slow, clock, random.Random(1), lease=7, ttl=10, sent_at=clock.now())
    slow.delay_next(9.5)
    with pytest.raises(SessionLostError):
        await lease.renew()
    assert lease.is_lost()


async def test_spurious_zero_right_after_the_grant_is_asked_again(etcd, autojump_clock):
    """A member that does not know the lease yet answers TTL 0: the session lives, and trust is not extended."""

    class Lagging(FaultyBackend):
        zeros = 1

        async def around(self, verb, request, call):
            answer = await super().around(verb, request, call)
            if verb == "lease_keep_alive" and self.zeros:
                self.zeros -= 1
                return LeaseRenewal(answer.lease, 0, answer.revision)
            return answer

    await etcd.lease_grant(10, lease=7)
    clock = Clock(trio.current_time)
    lease = LivingLease(Lagging(etcd), clock, random.Random(1), lease=7, ttl=10, sent_at=clock.now())
    await trio.sleep(1)
    with pytest.raises(UnavailableError):
        await lease.renew()
    assert lease.remaining() == pytest.approx(8, abs=0.01)
    await lease.renew()
    assert lease.remaining() == pytest.approx(9, abs=0.01)


async def test_granted_ttl_counts_not_the_one_asked_for(etcd, autojump_clock):
    """The server raises a TTL of 1 to 2: renewals and deadline follow the 2."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording, ttl=1) as infra:
        assert 2 == infra.session.lease.ttl
        assert infra.session.remaining() == pytest.approx(1.5, abs=0.1)
        recording.calls.clear()
        await trio.sleep(4)
        assert 10 == pytest.approx(recording.verbs().count("lease_keep_alive"), abs=1)


async def test_store_that_went_back_is_told(etcd, autojump_clock):
    """Revisions below one already seen, confirmed by a read, end the session with StoreResetError."""

    class Restored(FaultyBackend):
        back = 0

        async def around(self, verb, request, call):
            answer = await super().around(verb, request, call)
            if self.back and hasattr(answer, "revision") and not hasattr(answer, "succeeded"):
                return replace(answer, revision=answer.revision - self.back)
            return answer

    restored = Restored(etcd.node("one"))
    for _ in range(10):
        await etcd.put(b"k", b"v")
    async with open_infra(restored) as infra:
        session = infra.session
        await trio.sleep(10)
        restored.back = 5
        await trio.sleep(10)
        assert isinstance(session.lease.error, StoreResetError)


async def test_lagging_member_is_no_reset(etcd, autojump_clock):
    """A lower revision in one renewal alone, from a member that lags, ends nothing."""

    class Lagging(FaultyBackend):
        async def around(self, verb, request, call):
            answer = await super().around(verb, request, call)
            if verb == "lease_keep_alive":
                lag = random.Random(trio.current_time()).randint(0, 3)
                return LeaseRenewal(answer.lease, answer.ttl, answer.revision - lag)
            return answer

    for _ in range(10):
        await etcd.put(b"k", b"v")
    async with open_infra(Lagging(etcd.node("one"))) as infra:
        session = infra.session
        await trio.sleep(300)
        session.check()


async def test_session_key_deleted_by_an_operator_is_written_again(etcd, autojump_clock):
    """Without its session key a living session can still lock: the key is re-created first."""
    async with open_infra(etcd.node("one")) as infra:
        session = infra.session
        for _ in range(3):
            await etcd.delete(KeyRange.one(session.own_key.key))
            async with infra.lock("job") as hold:
                assert hold.token
            assert await etcd.get(session.own_key.key) is not None
        assert session is infra.session


async def test_left_over_key_on_the_lease_is_deleted(etcd, autojump_clock):
    """A key that hangs on the lease and that nobody here knows is gone after two looks, not after one."""
    async with open_infra(etcd.node("one"), ttl=30) as infra:
        await etcd.put(KEYS.lock_line("job") + b"stray", b"", lease=infra.session.lease.id)
        async with infra.lock("other"):
            await trio.sleep(15)
            assert await etcd.get(KEYS.lock_line("job") + b"stray") is not None
            await trio.sleep(10)
            assert await etcd.get(KEYS.lock_line("job") + b"stray") is None
        infra.session.check()


async def test_connected_nodes_are_counted(etcd, autojump_clock):
    """`connected_nodes` counts the namespace's sessions, not their slots, at most TTL/3 late."""
    async with open_infra(etcd, seed=1) as one:
        assert 1 == one.metrics()["connected_nodes"]
        async with open_infra(etcd, seed=2) as two, open_infra(etcd, seed=3, namespace="another"):
            await etcd.put(KEYS.slot(two.session.lease.id, 0), b"", lease=two.session.lease.id)
            await trio.sleep(11)
            assert 2 == one.metrics()["connected_nodes"]


async def test_closing_while_etcd_is_away_takes_two_seconds_at_most(etcd, autojump_clock):
    """Leaving a coordinator without a way to etcd ends within 2.5 seconds, without an error."""
    node = etcd.node("one")
    async with open_infra(node) as infra:
        hold = await infra.lock("job").acquire()
        node.partition()
        began = trio.current_time()
    assert trio.current_time() - began <= 2.5
    with pytest.raises(LockLostError):
        hold.check()


async def test_body_exception_leaves_the_coordinator_bare(etcd, autojump_clock):
    """An exception in the coordinator's body is not wrapped in a group."""
    with pytest.raises(ZeroDivisionError):
        async with open_infra(etcd):
            1 / 0  # noqa: B018


async def test_session_that_can_not_be_replaced_yet_is_tried_again(etcd, autojump_clock):
    """While the store is full no new session comes; as soon as there is room, one does."""
    async with open_infra(etcd.node("one")) as infra:
        first = infra.session
        etcd.store.full = True
        await etcd.lease_revoke(first.lease.id)
        await trio.sleep(60)
        assert not infra.is_healthy()
        etcd.store.full = False
        await trio.sleep(5)
        assert infra.is_healthy()
        async with infra.lock("job"):
            pass


async def test_unknown_outcome_names_what_was_written():
    """The error of an unknown outcome names the keys, and says so in its text."""
    error = OutcomeUnknownError("txn", (b"k",))
    assert (b"k",) == error.keys
    assert "no answer to txn" == str(error)
