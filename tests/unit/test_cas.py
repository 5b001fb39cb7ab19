"""One atomic change: conditions, fences, intents, and what a refusal tells."""

from __future__ import annotations

import pytest
import trio

from etcd_infra import Fence, FencedError
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Put, Range
from etcd_infra._primitives._cas import Change, Committed, Refused, check_fence, commit, found_in
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import NAMESPACE, open_infra

KEYS = Keys(NAMESPACE)
A, B = KEYS.state("a"), KEYS.state("b")


def change(*ops, **options):
    ops = ops or (Put(A, b"1"),)
    keys = tuple(op.key if isinstance(op, Put) else op.range.key for op in ops if not isinstance(op, Range))
    return Change(ops, keys, **options)


async def test_committed_tells_revision_and_results(infra, etcd, autojump_clock):
    """A change is one revision; its results are those of its operations."""
    await etcd.put(A, b"0")
    outcome = await commit(
        infra.session,
        KEYS,
        change(Range(KeyRange.one(A)), DeleteRange(KeyRange.one(A)), Put(B, b"1"), note=b"n"),
    )
    assert isinstance(outcome, Committed)
    assert outcome.revision == etcd.store.revision == (await etcd.get(B)).mod_revision
    assert [b"0"] == [kv.value for kv in found_in(outcome.results[0])]
    assert (3, b"n") == (len(outcome.results), outcome.note)


async def test_lost_answer_leaves_the_note(etcd, autojump_clock):
    """With a lost answer there are no results, but the true revision and the note."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        faulty.lose_next_answer()
        outcome = await commit(infra.session, KEYS, change(note=b"remember"))
        assert Committed((await etcd.get(A)).mod_revision, (), b"remember") == outcome


async def test_refusal_reads_at_its_own_revision(infra, etcd, autojump_clock):
    """A refused change writes nothing, and shows what was asked for, at that revision."""
    await etcd.put(A, b"0")
    wanted = change(conditions=(Compare.absent(A),), reads=(Range(KeyRange.one(A)), Range(KeyRange.one(B))))
    before = etcd.store.revision
    outcome = await commit(infra.session, KEYS, wanted)
    assert isinstance(outcome, Refused)
    assert before == outcome.revision == etcd.store.revision
    assert [1, 0] == [len(found_in(read)) for read in outcome.reads]


@pytest.mark.parametrize("holds", [True, False])
async def test_dead_fence_goes_before_conditions(infra, etcd, autojump_clock, holds):
    """A dead fence is a FencedError, whether the conditions hold or not; nothing is written."""
    async with infra.lock("job") as hold:
        fence = hold.fence
        await commit(infra.session, KEYS, change(fence=fence))
    before = etcd.store.revision
    condition = Compare.absent(B) if holds else Compare.absent(A)
    with pytest.raises(FencedError, match=str(fence.token)):
        await commit(infra.session, KEYS, change(fence=fence, conditions=(condition,)))
    assert before == etcd.store.revision


@pytest.mark.parametrize(
    ("fence", "error"), [("7", TypeError), (7, TypeError), (Fence("job", 7, "epoch", ()), ValueError)]
)
async def test_fence_that_guards_nothing(infra, etcd, autojump_clock, fence, error):
    """What is no fence, or one without proof, is refused before anything is sent."""
    before = etcd.store.revision
    with pytest.raises(error, match="7"):
        check_fence(fence)
    with pytest.raises(error, match="7"):
        await commit(infra.session, KEYS, change(fence=fence))
    assert before == etcd.store.revision


@pytest.mark.parametrize("count", [1, 8, 9, 50])
async def test_many_keys_and_their_intents(infra, etcd, autojump_clock, count):
    """Changes of few and of many keys fit into etcd's limits, and wait for an intent on any of them."""
    keys = [KEYS.state(f"k{number:02}") for number in range(count)]
    await etcd.put(KEYS.intent_of(keys[-1]), b"some-transaction")
    await commit(infra.session, KEYS, change(*(Put(key, b"1") for key in keys)))
    assert None is await etcd.get(KEYS.intent_of(keys[-1]))
    assert 1 == len({(await etcd.get(key)).mod_revision for key in keys})


async def test_refusal_by_conditions_does_not_wait_for_intents(infra, etcd, autojump_clock):
    """Conditions that do not hold are told at once, intent or not."""
    await etcd.put(A, b"0")
    await etcd.put(KEYS.intent_of(A), b"some-transaction")
    with trio.fail_after(0.01):
        assert isinstance(await commit(infra.session, KEYS, change(conditions=(Compare.absent(A),))), Refused)
    assert None is not await etcd.get(KEYS.intent_of(A))


async def test_one_round_trip(etcd, autojump_clock):
    """Committed or refused, a change is one Txn."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        recording.calls.clear()
        await commit(infra.session, KEYS, change())
        await commit(infra.session, KEYS, change(conditions=(Compare.absent(A),)))
        assert ["txn", "txn"] == recording.verbs()


async def test_change_without_operations_proves_its_conditions(infra, etcd, autojump_clock):
    """A change of nothing is applied if its conditions hold: a check with the certainty of a write."""
    assert isinstance(await commit(infra.session, KEYS, Change((), (A,), (Compare.absent(A),))), Committed)
    await etcd.put(A, b"0")
    assert isinstance(await commit(infra.session, KEYS, Change((), (A,), (Compare.absent(A),))), Refused)
