"""Writer slots: a write is applied at most once, and its outcome is known."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra._etcd.model import Compare, KeyRange, Put, Range, Txn
from etcd_infra.errors import InvalidRequestError, LeaseNotFoundError, OutcomeUnknownError, SessionLostError
from etcd_infra.testing import FaultyBackend, MemoryEtcd, RecordingBackend
from tests.conftest import open_infra
from tests.helpers.cancelling import cancelled_at

KEY = b"n"
FAULTS = ["lose_next_answer", "lose_next_request", "refuse_next"]


def writes(etcd, key=KEY):
    """List the values that were ever written to `key`, in order."""
    commits = etcd.store.history.between(2, etcd.store.revision)
    return [event.kv.value for commit in commits for event in commit.events if event.key == key]


def put(value=b"v", *compare):
    return Txn(tuple(compare), (Put(KEY, value),), (Range(KeyRange.one(KEY)),))


async def test_write_costs_one_round_trip_and_reuses_its_slot(etcd, autojump_clock):
    """Writes one after the other share one slot; each is one Txn."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        recording.calls.clear()
        for number in range(3):
            outcome = await infra.session.slots.write(put(b"%d" % number))
            assert outcome.applied
            assert etcd.store.revision == outcome.revision
        assert ["txn"] * 3 == recording.verbs()
        assert 1 == sum(b"/op/" in kv.key for kv in etcd.store.snapshot().kvs)


async def test_writes_in_flight_have_a_slot_each(etcd, autojump_clock):
    """Ten writes at once use ten slots, and none waits for another."""
    async with open_infra(etcd.node("one")) as infra:
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(infra.session.slots.write, put(b"%d" % number))
        assert 10 == len(writes(etcd))
        assert 10 == sum(b"/op/" in kv.key for kv in etcd.store.snapshot().kvs)


@pytest.mark.parametrize("strikes", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
async def test_lost_messages_apply_once(etcd, autojump_clock, fault, strikes):
    """Whatever is lost, an unguarded put is applied exactly once, at the revision that is told."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        for _ in range(strikes):
            getattr(faulty, fault)()
        outcome = await infra.session.slots.write(put(), note=b"remember")
        assert outcome.applied
        assert b"remember" == outcome.note
        assert [b"v"] == writes(etcd)
        assert outcome.revision == (await etcd.get(KEY)).mod_revision


async def test_late_copy_is_dead_once_the_outcome_is_told(etcd, autojump_clock):
    """A first copy that is applied late changes nothing after its write was told to be done."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        faulty.apply_next_late(5)
        assert (await infra.session.slots.write(put(b"once"))).applied
        await etcd.put(KEY, b"newer")
        await trio.sleep(10)
        assert [b"once", b"newer"] == writes(etcd)


async def test_refused_write_is_never_applied_later(etcd, autojump_clock):
    """A write that is refused while a copy is out is refused for good, also when its condition comes true."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        await etcd.put(b"guard", b"")
        faulty.apply_next_late(5)
        outcome = await infra.session.slots.write(put(b"v", Compare.absent(b"guard")))
        assert not outcome.applied
        await etcd.delete(KeyRange.one(b"guard"))
        await trio.sleep(10)
        assert [] == writes(etcd)


async def test_refused_write_tells_what_it_read(etcd, autojump_clock):
    """A refused write returns what its failure branch read."""
    async with open_infra(etcd.node("one")) as infra:
        await etcd.put(KEY, b"there")
        outcome = await infra.session.slots.write(put(b"v", Compare.absent(KEY)))
        assert not outcome.applied
        assert b"there" == outcome.results[0].kvs[0].value


@pytest.mark.parametrize("fault", ["none", "apply_next_late", *FAULTS])
async def test_cancelled_write_is_settled(autojump_clock, fault):
    """Cancelled at every step under every fault: applied at most once, and the next write settles it."""
    step = 0
    while True:
        step += 1
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"))
        async with open_infra(faulty) as infra:
            slots = infra.session.slots
            if fault == "apply_next_late":
                faulty.apply_next_late(3)
            elif fault != "none":
                getattr(faulty, fault)()
            reached = await cancelled_at(step, lambda slots=slots: slots.write(put(b"first")))
            faulty.forget_faults()
            before = len(writes(etcd))
            assert (await slots.write(put(b"second"))).applied
            await trio.sleep(1)
            settled = writes(etcd)
            await trio.sleep(10)
            assert settled == writes(etcd), "a copy came after it was settled"
            assert settled.count(b"first") <= 1
            assert settled.count(b"second") == 1
            assert before <= len(settled)
        if not reached:
            break
    assert step > 2


async def test_random_faults_keep_a_count_exact(autojump_clock):
    """200 seeds of random faults and cancellations: as many puts as writes that were told or may have been."""
    for seed in range(200):
        draws = random.Random(seed)
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"))
        async with open_infra(faulty, seed=seed) as infra:
            told, maybe = [], []
            for number in range(8):
                fault = draws.choice([*FAULTS, "late", "none"])
                if fault == "late":
                    faulty.apply_next_late(draws.uniform(0, 4))
                elif fault != "none":
                    getattr(faulty, fault)()
                with trio.move_on_after(draws.choice([0.01, 0.1, 60])) as scope:
                    outcome = await infra.session.slots.write(put(b"%d" % number))
                    assert outcome.applied
                    told.append(b"%d" % number)
                if scope.cancelled_caught:
                    maybe.append(b"%d" % number)
            await trio.sleep(10)
            seen = writes(etcd)
            assert len(set(seen)) == len(seen), seed
            assert set(told) <= set(seen) <= set(told) | set(maybe), seed


async def test_rejected_write_leaves_a_clean_slot(etcd, autojump_clock):
    """A request that etcd rejects raises its error, and the slot serves the next write."""
    async with open_infra(etcd.node("one")) as infra:
        with pytest.raises(InvalidRequestError):
            await infra.session.slots.write(Txn(success=(Put(KEY), Put(KEY))))
        with pytest.raises(LeaseNotFoundError):
            await infra.session.slots.write(Txn(success=(Put(KEY, lease=99),)))
        assert (await infra.session.slots.write(put())).applied
        infra.session.check()


async def test_write_of_a_lost_session_raises(etcd, autojump_clock):
    """A write whose session's lease is gone raises SessionLostError, and nothing is written."""
    async with open_infra(etcd.node("one")) as infra:
        session = infra.session
        await etcd.lease_revoke(session.lease.id)
        with pytest.raises(SessionLostError):
            await session.slots.write(put())
        assert [] == writes(etcd)


async def test_write_without_an_answer_is_unknown_when_the_session_is_lost(etcd, autojump_clock):
    """The session ends before an answer came: OutcomeUnknownError, and here the write was applied."""
    node = etcd.node("one")
    faulty = FaultyBackend(node)
    async with open_infra(faulty) as infra:
        faulty.lose_next_answer()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_unknown, infra.session)
            await trio.sleep(0.001)
            node.partition()
        node.heal()
        assert [b"v"] == writes(etcd)


async def expect_unknown(session):
    with pytest.raises(OutcomeUnknownError, match="session was lost"):
        await session.slots.write(put())


async def test_deleted_slot_is_replaced(etcd, autojump_clock):
    """An operator deletes a slot: the next write takes a new one, and is applied once."""
    async with open_infra(etcd.node("one")) as infra:
        slots = infra.session.slots
        await slots.write(put(b"1"))
        await etcd.delete(KeyRange.prefix(infra.session.own_key.key + b"/op/"))
        assert (await slots.write(put(b"2"))).applied
        assert [b"1", b"2"] == writes(etcd)
