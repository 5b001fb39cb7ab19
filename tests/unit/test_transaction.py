"""`execute`: several operations at one revision, each applied exactly once, or none."""

from __future__ import annotations

import random
from functools import partial

import pytest
import trio

from etcd_infra import (
    Cas,
    CodecError,
    ConflictError,
    Decrement,
    Delete,
    FencedError,
    Increment,
    InvalidRequestError,
    Set,
    TransactionStatus,
)
from etcd_infra._primitives._budget import MAX_REQUEST_BYTES
from etcd_infra.testing import FaultyBackend, MemoryEtcd, RecordingBackend
from tests.conftest import open_infra
from tests.helpers.cancelling import cancelled_at

FAULTS = ["lose_next_answer", "lose_next_request", "refuse_next", "late"]
MOST_SETS = 63 * 64
MOST_INCREMENTS = 110


def state(etcd, prefix=b"test/state/"):
    """List what is stored."""
    return {
        kv.key.removeprefix(prefix).decode(): kv.value
        for kv in etcd.store.snapshot().kvs
        if kv.key.startswith(prefix)
    }


def revisions_of(etcd, key=b"test/state/"):
    """List the revisions at which state keys changed."""
    commits = etcd.store.history.between(2, etcd.store.revision)
    return [commit.revision for commit in commits if any(event.key.startswith(key) for event in commit.events)]


async def test_operations_are_applied_at_one_revision(infra, etcd):
    """Five operations of five kinds: one revision, one result each, and the version is that revision."""
    operations = [
        Set("a", 1),
        Delete("b"),
        Increment("n", 2),
        Decrement("m"),
        Cas("k", "v", expected_version=0),
    ]
    result = await infra.execute(operations)
    assert TransactionStatus.COMMITTED is result.status
    assert [result.revision] == revisions_of(etcd)
    assert {"a": b"1", "n": b"2", "m": b"-1", "k": b'"v"'} == state(etcd)
    assert [1, None, 2, -1, "v"] == [one.value for one in result.results]
    assert [True, False, True, True, True] == [one.success for one in result.results]
    revision = result.revision
    assert [revision, 0, revision, revision, revision] == [one.version for one in result.results]
    assert revision == (await infra.state.get("a")).version


FOLDS = [
    ([Set("k", 1), Set("k", 2)], b"2", [1, 2], [True, True]),
    ([Set("k", 1), Increment("k"), Increment("k", 5), Decrement("k", 2)], b"5", [1, 2, 7, 5], [True] * 4),
    ([Set("k", 1), Delete("k")], None, [1, None], [True, True]),
    ([Delete("k"), Set("k", 1)], b"1", [None, 1], [True, True]),
    ([Delete("k"), Delete("k")], None, [None, None], [True, False]),
    ([Delete("k"), Increment("k")], b"1", [None, 1], [True, True]),
    ([Increment("k"), Delete("k"), Increment("k")], b"1", [11, None, 1], [True] * 3),
    ([Delete("k"), Cas("k", 5, expected_version=0)], b"5", [None, 5], [True, True]),
    ([Increment("k"), Increment("k")], b"12", [11, 12], [True, True]),
    ([Set("k", b"raw"), Set("k", None)], b"null", [b"raw", None], [True, True]),
]


@pytest.mark.parametrize(("operations", "stored", "values", "successes"), FOLDS)
async def test_operations_on_one_key_act_in_order(infra, etcd, operations, stored, values, successes):
    """Operations on one key that holds 10 leave and tell what they would one by one; etcd sees one write."""
    await infra.state.set("k", 10)
    result = await infra.execute(operations)
    assert stored == state(etcd).get("k")
    assert values == [one.value for one in result.results]
    assert successes == [one.success for one in result.results]


async def test_cas_then_increment_builds_on_the_new_value(infra, etcd):
    """A Cas and an increment of the same key need no look at it, and act in order."""
    version = await infra.state.set("k", "text")
    result = await infra.execute([Cas("k", 4, expected_version=version), Increment("k")])
    assert [4, 5] == [one.value for one in result.results]
    assert b"5" == state(etcd)["k"]


@pytest.mark.parametrize(
    ("operations", "trips"),
    [
        ([Set("a", 1), Delete("b"), Cas("c", 1, expected_version=0)], 1),
        ([Delete("b")], 1),
        ([Increment("n"), Set("a", 1)], 2),
        ([Delete("b"), Set("b", 1)], 2),
        ([], 1),
    ],
)
async def test_round_trips(etcd, autojump_clock, operations, trips):
    """What any old state will do for is not read: one round trip; else two."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        recording.calls.clear()
        await infra.execute(operations)
        assert ["txn"] * trips == recording.verbs()


async def test_failed_cas_names_operation_key_and_version(infra, etcd):
    """A Cas on another version raises ConflictError with index, key and present version; nothing is written."""
    version = await infra.state.set("k", 1)
    with pytest.raises(ConflictError, match=f"operation 2: 'k' has version {version}, not 1") as caught:
        await infra.execute([Set("a", 1), Increment("n"), Cas("k", 2, expected_version=1)])
    assert (2, "k", version) == (caught.value.index, caught.value.key, caught.value.version)
    assert {"k": b"1"} == state(etcd)
    with pytest.raises(ConflictError) as caught:
        await infra.execute([Delete("k"), Cas("k", 2, expected_version=version)])
    assert (1, "k", 0) == (caught.value.index, caught.value.key, caught.value.version)


async def test_aba_is_a_conflict(infra):
    """A key that was deleted and made anew with the same value and count of writes has another version."""
    version = await infra.state.set("k", 1)
    await infra.state.delete("k")
    await infra.state.set("k", 1)
    with pytest.raises(ConflictError):
        await infra.execute([Cas("k", 2, expected_version=version)])


async def test_increment_of_no_integer_is_a_codec_error(infra, etcd):
    """An increment of text raises CodecError with key and version; nothing is written."""
    version = await infra.state.set("k", "text")
    with pytest.raises(CodecError) as caught:
        await infra.execute([Set("a", 1), Increment("k")])
    assert ("k", version) == (caught.value.key, caught.value.version)
    assert {"k": b'"text"'} == state(etcd)


async def test_lease_is_kept_by_increments_and_given_up_by_new_values(infra, etcd, autojump_clock):
    """A key with a TTL stays leased when it is counted or swapped, and becomes permanent when it is set."""
    await infra.state.set("counted", 1, ttl=60)
    version = await infra.state.set("swapped", 1, ttl=60)
    await infra.state.set("set", 1, ttl=60)
    operations = [Increment("counted"), Cas("swapped", 1, expected_version=version), Increment("swapped")]
    await infra.execute([*operations, Set("set", 2)])
    entries = await infra.state.get_many(["counted", "swapped", "set"])
    assert (2, 2) == (entries["counted"].value, entries["swapped"].value)
    assert entries["counted"].lease
    assert entries["swapped"].lease
    assert not entries["set"].lease
    await trio.sleep(70)
    assert {"set": b"2"} == state(etcd)


async def test_dead_fence_refuses_everything(infra, etcd):
    """With a fence of a lock that was let go: FencedError, nothing is written."""
    async with infra.lock("job") as hold:
        await infra.execute([Set("a", 1)], fence=hold.fence)
    with pytest.raises(FencedError):
        await infra.execute([Set("a", 2), Increment("n")], fence=hold.fence)
    assert {"a": b"1"} == state(etcd)


BUDGETS = [
    (lambda n: [Set(f"key-{i}", i) for i in range(n)], MOST_SETS),
    (lambda n: [Delete(f"key-{i}") for i in range(n)], MOST_SETS),
    (lambda n: [Increment(f"key-{i}") for i in range(n)], MOST_INCREMENTS),
    (lambda n: [Cas(f"key-{i}", i, expected_version=0) for i in range(n)], MOST_INCREMENTS),
    (lambda n: [*[Set(f"s-{i}", i) for i in range(16 * 111)], *[Increment(f"i-{i}") for i in range(n)]], 108),
]


@pytest.mark.parametrize(("operations", "most"), BUDGETS)
async def test_budget_of_operations(etcd, autojump_clock, operations, most):
    """The largest transaction passes, at one revision; one operation more is refused before it is sent."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        result = await infra.execute(operations(most))
        assert len(operations(most)) == len(result.results)
        recording.calls.clear()
        with pytest.raises(InvalidRequestError, match="over the budget"):
            await infra.execute(operations(most + 1))
        assert [] == recording.calls
        assert 1 == len(revisions_of(etcd)) or all(isinstance(one, Delete) for one in operations(most))


async def test_budget_of_bytes(etcd, autojump_clock):
    """A request close under 1.5 MiB passes; one byte more than the budget is refused before it is sent."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        with pytest.raises(InvalidRequestError) as caught:
            await infra.execute([Set("k", bytes(MAX_REQUEST_BYTES))])
        size = int(str(caught.value).split(" bytes")[0].split()[-1])
        most = 2 * MAX_REQUEST_BYTES - size
        await infra.execute([Set("k", bytes(most))])
        recording.calls.clear()
        with pytest.raises(InvalidRequestError, match="1572864 bytes"):
            await infra.execute([Set("k", bytes(most + 1))])
        assert [] == recording.calls
        assert MAX_REQUEST_BYTES - most < 1500


BAD = [
    ([Set("", 1)], ValueError),
    ([Set(7, 1)], TypeError),
    ([Set("k", float("nan"))], ValueError),
    ([Set("k", object())], TypeError),
    (["set"], TypeError),
    (None, TypeError),
    ([Increment("n"), Cas("n", 1, expected_version=3)], ValueError),
    ([Set("n", 1), Cas("n", 1, expected_version=0)], ValueError),
]


@pytest.mark.parametrize(("operations", "error"), BAD)
async def test_bad_input_is_refused_before_anything_is_sent(etcd, autojump_clock, operations, error):
    """Bad keys, values and impossible sequences are ValueError or TypeError, and no call is made."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        recording.calls.clear()
        with pytest.raises(error):
            await infra.execute(operations)
        assert [] == recording.calls


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Increment("n", 1.5), TypeError),
        (lambda: Increment("n", True), TypeError),
        (lambda: Decrement("n", None), TypeError),
        (lambda: Cas("k", 1, expected_version=-1), ValueError),
        (lambda: Cas("k", 1, expected_version=True), TypeError),
        (lambda: Cas("k", 1), TypeError),
    ],
)
def test_bad_operations_are_refused_when_they_are_made(make, error):
    """A delta or version that is none is refused by the operation itself."""
    with pytest.raises(error):
        make()


def strike(faulty, fault):
    if fault == "late":
        faulty.apply_next_late(4)
    else:
        getattr(faulty, fault)()


@pytest.mark.parametrize("strikes", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
async def test_lost_messages_apply_once(etcd, autojump_clock, fault, strikes):
    """Whatever is lost: an increment and a delete count exactly once, and are told so."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        await infra.execute([Set("n", 10), Set("gone", 1)])
        before = len(revisions_of(etcd))
        for _ in range(strikes):
            strike(faulty, fault)
        result = await infra.execute([Increment("n"), Delete("gone"), Delete("never"), Set("a", 1)])
        await trio.sleep(10)
        assert {"n": b"11", "a": b"1"} == state(etcd)
        assert before + 1 == len(revisions_of(etcd))
        assert [True, True, False, True] == [one.success for one in result.results]
        assert result.revision == revisions_of(etcd)[-1]


async def test_what_can_not_be_told_any_more_is_none(etcd, autojump_clock):
    """The answer that would tell what was deleted is lost and the history compacted: success is None."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        await infra.execute([Set("gone", 1)])
        faulty.lose_next_answer()

        async def compact() -> None:
            while "gone" in state(etcd):
                await trio.sleep(0.001)
            await etcd.compact(etcd.store.revision)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(compact)
            result = await infra.execute([Delete("gone")])
        assert [None] == [one.success for one in result.results]


@pytest.mark.parametrize("fault", ["none", *FAULTS])
async def test_cancelled_at_every_step(autojump_clock, fault):
    """Cancelled at any step under any fault: all or nothing, at most once, and nothing of it comes later."""
    step = 0
    while True:
        step += 1
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"))
        async with open_infra(faulty) as infra:
            await infra.execute([Set("n", 10)])
            if fault != "none":
                strike(faulty, fault)
            operations = [Increment("n"), Set("a", 1)]
            reached = await cancelled_at(step, partial(infra.execute, operations))
            faulty.forget_faults()
            await infra.execute([Increment("m")])
            await trio.sleep(1)
            settled = state(etcd)
            assert (settled["n"], settled.get("a")) in {(b"10", None), (b"11", b"1")}
            await trio.sleep(10)
            assert settled == state(etcd)
        if not reached:
            break
    assert step > 4


async def test_concurrent_increments_of_four_processes_are_exact(autojump_clock):
    """4 processes, 25 increments of two keys each: no increment is lost or doubled, both keys go together."""
    etcd = MemoryEtcd()
    seen = []

    async def work(number: int) -> None:
        faulty = FaultyBackend(etcd.node(f"n{number}"), random.Random(number))
        async with open_infra(faulty, seed=number, ttl=120) as infra:
            for _ in range(25):
                result = await infra.execute([Increment("n"), Decrement("m")])
                seen.append(result.results[0].value)
            faulty.stop()

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(work, number)
    assert {"n": b"100", "m": b"-100"} == state(etcd)
    assert list(range(1, 101)) == sorted(seen)


async def test_nothing_is_left_in_etcd_but_state(infra, etcd):
    """A transaction leaves its values, nothing else; it writes through the session's slot."""
    before = {kv.key for kv in etcd.store.snapshot().kvs}
    for number in range(10):
        await infra.execute([Set("a", number), Increment("n")])
    added = {kv.key for kv in etcd.store.snapshot().kvs} - before
    assert {b"test/state/a", b"test/state/n"} == added
