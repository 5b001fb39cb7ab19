"""Slots whose copies come at the worst moment, and slots that somebody deletes."""

from __future__ import annotations

import pytest
import trio

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Put, Txn
from etcd_infra.errors import OutcomeUnknownError
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import open_infra

KEY = b"n"


def writes(etcd):
    """List the values that were ever written to `KEY`, in order."""
    commits = etcd.store.history.between(2, etcd.store.revision)
    return [event.kv.value for commit in commits for event in commit.events if event.key == KEY]


def put(value=b"v", *compare):
    return Txn(tuple(compare), (Put(KEY, value),))


async def test_copy_that_comes_just_when_a_refusal_is_told_is_dead(etcd, autojump_clock):
    """In the very step in which a write returns "refused", its first copy can not be applied any more."""
    faulty = FaultyBackend(etcd.node("one"))
    recording = RecordingBackend(faulty)
    async with open_infra(recording, ttl=60) as infra:
        await etcd.put(b"guard", b"")
        recording.calls.clear()
        faulty.lose_next_request()
        outcome = await infra.session.slots.write(put(b"v", Compare.absent(b"guard")))
        # Nothing runs between here and the copy's arrival: the store itself is called, not a backend.
        now = trio.current_time()
        assert not outcome.applied
        assert etcd.store.txn(Txn((), (DeleteRange(KeyRange.one(b"guard")),)), now).succeeded
        first_copy = recording.calls[0].request
        assert not etcd.store.txn(first_copy, now).succeeded
        assert [] == writes(etcd)


async def test_late_copy_of_a_cancelled_write_dies_while_its_slot_is_idle(etcd, autojump_clock):
    """A write is cancelled and no other follows: a second later its copy of three seconds is dead."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra:
        faulty.apply_next_late(3)
        with trio.move_on_after(0.001) as scope:
            await infra.session.slots.write(put())
        assert scope.cancelled_caught
        await trio.sleep(1)
        settled_at = etcd.store.revision
        await trio.sleep(5)
        assert settled_at == etcd.store.revision
        assert [] == writes(etcd)


async def test_write_after_the_janitor_settled_costs_one_round_trip(etcd, autojump_clock):
    """The slot of a cancelled write is settled by the janitor, and serves the next write at once."""
    faulty = FaultyBackend(etcd.node("one"))
    recording = RecordingBackend(faulty)
    async with open_infra(recording, ttl=60) as infra:
        faulty.lose_next_request()
        with trio.move_on_after(0.001):
            await infra.session.slots.write(put(b"cancelled"))
        await trio.sleep(1)
        recording.calls.clear()
        assert (await infra.session.slots.write(put())).applied
        assert ["txn"] == recording.verbs()
        assert [b"v"] == writes(etcd)
        assert 1 == sum(b"/op/" in kv.key for kv in etcd.store.snapshot().kvs)


async def test_late_copies_of_an_ended_lease_stay_dead_when_the_lease_is_revived(etcd, autojump_clock):
    """A grant that is delivered twice brings the lease back, and no write of its session with it."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording, ttl=60) as infra:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(infra.session.slots.write, put())
        copies = [call.request for call in recording.calls if call.verb == "txn" and writes_key(call.request)]
        assert 3 == len(copies) == len(writes(etcd))
        lease = infra.session.lease.id
        await etcd.lease_revoke(lease)
        await etcd.lease_grant(60, lease=lease)
        for copy in copies:
            assert not (await etcd.txn(copy)).succeeded
        assert 3 == len(writes(etcd))


def writes_key(request):
    return any(isinstance(op, Put) and op.key == KEY for op in request.success)


@pytest.mark.parametrize("created_anew", [False, True])
@pytest.mark.parametrize("fault", ["lose_next_answer", "lose_next_request"])
async def test_slot_deleted_while_an_answer_is_missing_leaves_the_outcome_unknown(
    etcd, autojump_clock, fault, created_anew
):
    """Nobody can tell whether the copy was applied: OutcomeUnknownError, and nothing is written twice."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra:
        slots = infra.session.slots
        assert (await slots.write(put(b"1"))).applied
        getattr(faulty, fault)()

        async def delete() -> None:
            await trio.sleep(0.002)
            await etcd.delete(KeyRange.prefix(infra.session.own_key.key + b"/op/"))
            if created_anew:
                await etcd.put(infra.session.own_key.key + b"/op/0", b"created", lease=infra.session.lease.id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(delete)
            with pytest.raises(OutcomeUnknownError) as raised:
                await slots.write(put(b"2"))
        assert (KEY,) == raised.value.keys
        assert writes(etcd) == ([b"1", b"2"] if fault == "lose_next_answer" else [b"1"])
        await trio.sleep(1)
        assert (await slots.write(put(b"3"))).applied
        assert 1 == writes(etcd).count(b"3")
