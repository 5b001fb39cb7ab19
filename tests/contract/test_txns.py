"""Section B: what a transaction decides, what it refuses, and what it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    DeleteRangeResult,
    KeyRange,
    KeyValue,
    Operator,
    Put,
    PutResult,
    Range,
    Target,
    Txn,
)
from etcd_infra.errors import CompactedError, FutureRevisionError, InvalidRequestError, LeaseNotFoundError

if TYPE_CHECKING:
    from tests.contract.world import World

ORDERS = {Operator.EQUAL: (0,), Operator.GREATER: (1,), Operator.LESS: (-1,), Operator.NOT_EQUAL: (-1, 1)}
DUPLICATE = "etcdserver: duplicate key given in txn request"


async def holds(world: World, *compares: Compare) -> bool:
    """Whether a Txn with these compares takes its success branch."""
    return (await world.backend.txn(Txn(compares))).succeeded


async def test_no_compares_take_the_success_branch(world):
    """S-B1: a Txn without compares takes its success branch."""
    assert await holds(world)


async def test_compares_are_a_conjunction(world):
    """S-B1: a Txn succeeds if all of its compares are true, and fails if one is not."""
    await world.put("a")
    present = Compare(Target.VERSION, Operator.GREATER, world.one("a"), 0)
    absent = Compare.absent(world.key("a"))
    other = Compare.absent(world.key("b"))
    for compares, wanted in (
        ((present, other), True),
        ((present, absent), False),
        ((absent, present), False),
        ((absent, absent), False),
    ):
        assert wanted is await holds(world, *compares), compares


async def test_failed_compare_is_an_answer(world):
    """S-B1: a failed compare is no error: the failure branch is applied and answered."""
    await world.put("a")
    result = await world.backend.txn(
        Txn((Compare.absent(world.key("a")),), (world.putting("b"),), (world.putting("c"), Range(world.all)))
    )
    assert not result.succeeded
    assert [PutResult, 2] == [type(result.results[0]), result.results[1].count]
    assert [b"a", b"c"] == await world.names()


async def test_compare_with_each_operator(world):
    """S-B1: each target compares with each operator, the stored field on the left."""
    lease = await world.grant()
    created = await world.put("a", b"m", lease=lease)
    modified = await world.put("a", b"m", lease=lease)
    stored = {Target.VERSION: 2, Target.CREATE: created, Target.MOD: modified, Target.LEASE: lease}
    for operator, signs in ORDERS.items():
        for target, value in stored.items():
            for sign in (-1, 0, 1):
                compare = Compare(target, operator, world.one("a"), value - sign)
                assert (sign in signs) is await holds(world, compare), compare
        for sign, value in ((-1, b"ma"), (0, b"m"), (1, b"l"), (1, b"")):
            compare = Compare(Target.VALUE, operator, world.one("a"), value)
            assert (sign in signs) is await holds(world, compare), compare


async def test_missing_key_compares_as_zero(world):
    """S-B5: on a missing key version, create, mod and lease compare as 0."""
    for target in (Target.VERSION, Target.CREATE, Target.MOD, Target.LEASE):
        for operator, signs in ORDERS.items():
            for operand in (-1, 0, 1):
                compare = Compare(target, operator, world.one("a"), operand)
                assert (-operand in signs) is await holds(world, compare), compare


async def test_value_compare_on_missing_key_is_false(world):
    """S-B5: a VALUE compare on a missing key, or an empty range, is false whatever the operator."""
    for operator in Operator:
        for operand in (b"", b"x"):
            for wanted in (world.one("a"), world.all):
                assert not await holds(world, Compare(Target.VALUE, operator, wanted, operand)), operator


async def test_empty_value_compares_as_empty(world):
    """S-B6: an empty operand is the empty value, and a key with an empty value equals it."""
    await world.put("a", b"")
    assert await holds(world, Compare(Target.VALUE, Operator.EQUAL, world.one("a"), b""))
    assert not await holds(world, Compare(Target.VALUE, Operator.NOT_EQUAL, world.one("a"), b""))
    assert await holds(world, Compare(Target.VALUE, Operator.LESS, world.one("a"), b"\0"))


async def test_operand_of_the_wrong_type_is_refused(world):
    """S-B6: an operand of the wrong type, which etcd would take for 0, is refused before it is sent."""
    for target, operand in ((Target.VALUE, 0), (Target.MOD, b"0")):
        with pytest.raises(TypeError):
            await holds(world, Compare(target, Operator.EQUAL, world.one("a"), operand))


async def test_range_compare_needs_every_key(world):
    """S-B7: a compare over a range is true only if every key of the range satisfies it."""
    first = await world.put("a", b"x")
    await world.put("b", b"x")
    cases = (
        (Compare(Target.VALUE, Operator.EQUAL, world.all, b"x"), True),
        (Compare(Target.VERSION, Operator.EQUAL, world.all, 1), True),
        (Compare(Target.MOD, Operator.LESS, world.all, first + 2), True),
        (Compare(Target.MOD, Operator.LESS, world.all, first + 1), False),
        (Compare(Target.MOD, Operator.EQUAL, world.all, first), False),
        (Compare(Target.MOD, Operator.NOT_EQUAL, world.all, first), False),
        (Compare.nothing_in(world.all), False),
        (Compare.nothing_in(world.span("c", "z")), True),
    )
    for compare, wanted in cases:
        assert wanted is await holds(world, compare), compare


async def test_empty_range_compares_as_one_missing_key(world):
    """S-B7: a compare over an empty range is that of one missing key."""
    for compare, wanted in (
        (Compare.nothing_in(world.all), True),
        (Compare(Target.MOD, Operator.LESS, world.all, 5), True),
        (Compare(Target.MOD, Operator.GREATER, world.all, 0), False),
        (Compare(Target.VERSION, Operator.EQUAL, world.all, 1), False),
        (Compare(Target.CREATE, Operator.EQUAL, world.span("z", "a"), 0), True),
    ):
        assert wanted is await holds(world, compare), compare


async def test_range_compare_overlooks_deletions(world):
    """S-B8: a compare of mod revisions over a range notices an insert, but not that a key was deleted."""
    await world.put("a")
    read_at = await world.put("b")
    unchanged = Compare(Target.MOD, Operator.LESS, world.all, read_at + 1)
    await world.backend.delete(world.one("a"))
    assert await holds(world, unchanged)
    assert not await holds(world, unchanged, Compare.modified_at(world.key("a"), read_at - 1))
    await world.put("c")
    assert not await holds(world, unchanged)


async def test_open_range_compare(world):
    """S-B7: a compare takes the open end, too."""
    await world.put("b")
    assert await holds(world, Compare.nothing_in(KeyRange.since(world.key("c"))))
    assert not await holds(world, Compare.nothing_in(KeyRange.since(world.key("b"))))


# ── limits ──────────────────────────────────────────────────────────────────────────────────────


async def test_each_list_may_have_128_entries(world):
    """S-B2: 128 compares, 128 operations in one branch and 128 in the other pass together."""
    compares = tuple(Compare.absent(world.key(f"{n}")) for n in range(128))
    puts = tuple(world.putting(f"{n}") for n in range(128))
    before = await world.revision()
    assert before + 1 == (await world.backend.txn(Txn(compares, puts, puts))).revision
    assert 128 == len(await world.names())


async def test_129_entries_are_refused_in_any_list(world):
    """S-B2: 129 entries in any list are refused, also in the branch not taken."""
    compares = tuple(Compare.absent(world.key(f"{n}")) for n in range(129))
    reads = tuple(Range(world.one(f"{n}")) for n in range(129))
    for txn in (Txn(compares), Txn(success=reads), Txn(failure=reads)):
        with pytest.raises(InvalidRequestError, match="etcdserver: too many operations in txn request"):
            await world.backend.txn(txn)


async def test_nested_txn_gets_what_its_parent_leaves(world):
    """S-B2: a nested Txn may have 128 less the longest list of its parent, each nested Txn by itself."""
    nested = [
        Txn(success=tuple(world.putting(f"{outer}-{inner}") for inner in range(100))) for outer in range(20)
    ]
    before = await world.revision()
    assert before + 1 == (await world.apply(*nested)).revision
    assert 2000 == (await world.backend.range(Range(world.all, count_only=True))).count
    for inner, fits in ((108, True), (109, False)):
        reads = Txn(success=(Range(world.one("a")),) * inner)
        request = Txn(success=(reads,) * 20)
        if fits:
            assert 20 == len((await world.backend.txn(request)).results)
        else:
            with pytest.raises(InvalidRequestError, match="too many operations"):
                await world.backend.txn(request)


def duplicates(world: World) -> list[tuple[object, ...]]:
    """Return branches that write a key twice."""
    put, other = world.putting("a"), world.putting("a", b"other")
    around = DeleteRange(world.span("a", "b"))
    return [
        (put, put),
        (put, other),
        (put, world.deleting("a")),
        (world.deleting("a"), put),
        (around, put),
        (put, around),
        (Txn(success=(put,)), put),
        (put, Txn(success=(put,))),
        (put, Txn(failure=(put,))),
        (Txn(success=(put,)), Txn(success=(put,))),
        (Txn(success=(put,)), Txn(failure=(put,))),
        (world.deleting("a"), Txn(success=(put,))),
        (Txn(success=(world.deleting("a"),)), Txn(success=(put,))),
        (Txn(success=(world.deleting("a"),)), put),
        (Txn(success=(Txn(success=(put,)),)), put),
        (Txn(failure=(put, put)),),
    ]


async def test_key_written_twice_in_one_branch_is_refused(world):
    """S-B3: a branch that puts a key twice, or puts and deletes it, also when nested, is refused."""
    for ops in duplicates(world):
        with pytest.raises(InvalidRequestError, match=DUPLICATE):
            await world.apply(*ops)
    assert [] == await world.names()


async def test_key_written_twice_in_the_other_branch_is_refused(world):
    """S-B3: both branches are checked for keys written twice, taken or not."""
    for ops in duplicates(world):
        with pytest.raises(InvalidRequestError, match=DUPLICATE):
            await world.backend.txn(Txn(failure=ops))


async def test_overlapping_writes_that_pass(world):
    """S-B3: deletes may overlap, and branches that exclude each other may share keys."""
    put = world.putting("a")
    inside = DeleteRange(world.span("a", "c"))
    for txn in (
        Txn(success=(world.deleting("a"), world.deleting("a"), inside)),
        Txn(success=(put,), failure=(put,)),
        Txn(success=(put,), failure=(world.deleting("a"),)),
        Txn(success=(Txn(success=(put,), failure=(put,)),)),
        Txn(success=(Txn(success=(put,), failure=(world.deleting("a"),)),)),
        Txn(success=(put, DeleteRange(world.span("b", "c")))),
        Txn(success=(put, Range(world.all), Range(world.all))),
        Txn(success=(put, DeleteRange(world.span("b", "a")))),
    ):
        assert (await world.backend.txn(txn)).succeeded, txn


async def test_nested_put_before_a_nested_delete_passes(world):
    """S-B3: a put in one nested Txn and its delete in a later one is overlooked, and applied in order."""
    put, delete = Txn(success=(world.putting("a"),)), Txn(success=(world.deleting("a"),))
    before = await world.revision()
    result = await world.apply(put, delete)
    assert before + 1 == result.revision
    assert DeleteRangeResult(1) == result.results[1].results[0]
    assert await world.get("a") is None
    created = await world.put("a")
    assert KeyValue(world.key("a"), b"v", created, created, 1) == await world.get("a")


async def test_put_inside_an_open_delete_is_refused(world):
    """S-B3: a put inside an open-ended delete, which etcd overlooks and dies of, is refused before it is sent."""
    await world.put("a")
    open_end = DeleteRange(KeyRange.since(world.key("a")))
    for ops in (
        (open_end, Put(world.key("a"), ignore_value=True)),
        (world.putting("b"), open_end),
        (Txn(success=(open_end,)), world.putting("b")),
    ):
        for txn in (Txn(success=ops), Txn(failure=ops)):
            with pytest.raises(InvalidRequestError, match=DUPLICATE):
                await world.backend.txn(txn)
    assert [b"a"] == await world.names()


# ── order and answers ───────────────────────────────────────────────────────────────────────────


async def test_operations_run_in_order(world):
    """S-B4: a range after a put of the same Txn sees it, one before does not; so with deletes."""
    await world.put("b")
    result = await world.apply(
        Range(world.all), world.putting("a"), Range(world.all), world.deleting("b"), Range(world.all)
    )
    seen = [[kv.key.removeprefix(world.prefix) for kv in result.results[n].kvs] for n in (0, 2, 4)]
    assert [[b"b"], [b"a", b"b"], [b"a"]] == seen
    assert result.revision == result.results[2].kvs[0].mod_revision


async def test_inner_answers_have_no_revision(world):
    """S-B4: only the top answer's revision counts; those inside say nothing."""
    result = await world.apply(Range(world.all), world.putting("a"), Txn(success=(Range(world.all),)))
    assert (0, 0) == (result.results[0].revision, result.results[2].revision)
    assert 0 == result.results[2].results[0].revision
    assert result.revision == await world.revision()


async def test_results_match_operations(world):
    """S-B4: there is one result per operation of the branch taken, in order, each of its own kind."""
    await world.put("a", b"old")
    result = await world.apply(
        world.putting("a", b"new", prev_kv=True),
        world.putting("b", prev_kv=True),
        world.putting("c"),
        DeleteRange(world.span("d", "e"), prev_kv=True),
        Txn((Compare.absent(world.key("a")),), (Range(world.all),), (Range(world.one("a")),)),
    )
    put, created, silent, deleted, nested = result.results
    assert b"old" == put.prev_kv.value
    assert (None, None) == (created.prev_kv, silent.prev_kv)
    assert DeleteRangeResult(0) == deleted
    assert (False, 1) == (nested.succeeded, len(nested.results))
    assert b"new" == nested.results[0].kvs[0].value


async def test_delete_answers_what_it_deleted(world):
    """S-B4: a delete answers how many keys went and, if asked, their whole former state in key order."""
    lease = await world.grant()
    created = await world.put("b", b"1", lease=lease)
    modified = await world.put("a", b"2")
    (deleted,) = (await world.apply(DeleteRange(world.all, prev_kv=True))).results
    assert 2 == deleted.deleted
    assert (
        KeyValue(world.key("a"), b"2", modified, modified, 1),
        KeyValue(world.key("b"), b"1", created, created, 1, lease),
    ) == deleted.prev_kvs
    await world.put("a")
    assert (DeleteRangeResult(1),) == (await world.apply(DeleteRange(world.all))).results


async def test_nested_compares_see_the_state_before(world):
    """S-B4: every compare of a nested Txn sees the state before the whole Txn."""
    absent = Compare.absent(world.key("a"))
    nested = Txn((absent,), (world.putting("saw-nothing"),), (world.putting("saw-a"),))
    result = await world.apply(world.putting("a"), nested)
    assert result.results[1].succeeded
    assert [b"a", b"saw-nothing"] == await world.names()


async def test_nested_operations_see_what_was_written(world):
    """S-B4: a range of a nested Txn sees the puts before it, unlike the nested compares."""
    result = await world.apply(world.putting("a"), Txn(success=(Range(world.all),)))
    assert 1 == result.results[1].results[0].count


async def test_only_the_taken_nested_branch_is_applied(world):
    """S-B4: nested Txns take their own branch, to any depth."""
    yes, no = Compare.absent(world.key("missing")), Compare.created_at(world.key("missing"), 7)
    inner = Txn((no,), (world.putting("x"),), (world.putting("a"), Txn((yes,), (world.putting("b"),))))
    result = await world.backend.txn(Txn((yes,), (inner,), (world.putting("y"),)))
    assert (True, False) == (result.succeeded, result.results[0].succeeded)
    assert [b"a", b"b"] == await world.names()


# ── errors inside ───────────────────────────────────────────────────────────────────────────────


async def test_unknown_lease_rejects_everything(world):
    """S-B9: an unknown lease in the taken branch, also when nested, rejects the whole Txn."""
    bad = world.putting("b", lease=0x7EAD)
    for ops in (
        (world.putting("a"), bad),
        (bad, world.putting("a")),
        (world.putting("a"), Txn(success=(bad,))),
    ):
        with pytest.raises(LeaseNotFoundError, match="etcdserver: requested lease not found"):
            await world.apply(*ops)
    assert [] == await world.names()


async def test_unknown_lease_in_the_other_branch_does_no_harm(world):
    """S-B9: an unknown lease, or a missing key to ignore, does no harm in the branch not taken."""
    bad = (world.putting("b", lease=0x7EAD), Put(world.key("c"), ignore_value=True))
    for txn in (Txn(success=(world.putting("a"),), failure=bad), Txn(success=(Txn(failure=bad),))):
        assert (await world.backend.txn(txn)).succeeded
    assert [b"a"] == await world.names()


async def test_missing_key_to_ignore_rejects_everything(world):
    """S-B9: ignoring the value of a missing key rejects the whole Txn, even if it is put before in it."""
    with pytest.raises(InvalidRequestError, match="etcdserver: key not found"):
        await world.apply(world.putting("a"), Put(world.key("b"), ignore_value=True))
    assert [] == await world.names()


async def test_old_revisions_in_a_reading_txn(world):
    """S-B9: a Txn that only reads may name revisions, and is refused for compacted and future ones."""
    first = await world.put("a", b"1")
    second = await world.put("a", b"2")
    third = await world.put("a", b"3")
    result = await world.apply(Range(world.one("a"), revision=first), Range(world.one("a"), revision=third))
    assert [b"1", b"3"] == [found.kvs[0].value for found in result.results]
    await world.backend.compact(second)
    for error, revision in ((CompactedError, first), (FutureRevisionError, third + 1)):
        with pytest.raises(error):
            await world.apply(Range(world.all), Range(world.all, revision=revision))


async def test_negative_revisions_in_a_reading_txn(world):
    """S-B9: inside a Txn, unlike outside of one, a negative revision is a compacted one."""
    last = await world.put("a")
    await world.backend.compact(last)
    for revision in (-1, -7):
        assert b"v" == (await world.get("a", revision=revision)).value
        with pytest.raises(CompactedError):
            await world.apply(Range(world.one("a"), revision=revision))


async def test_old_revisions_in_a_writing_txn_are_refused(world):
    """S-B9: a Txn that may write is refused if it reads at a revision, before old servers get confused by it."""
    revision = await world.put("a")
    past = Range(world.all, revision=revision)
    for txn in (
        Txn(success=(world.putting("b"), past)),
        Txn(success=(past,), failure=(world.putting("b"),)),
        Txn(success=(world.deleting("a"), Txn(success=(past,)))),
        Txn(success=(world.putting("b"), Range(world.all, revision=-1))),
    ):
        with pytest.raises(InvalidRequestError):
            await world.backend.txn(txn)
    assert [b"a"] == await world.names()


async def test_reading_txn_answers_the_stores_revision(world):
    """S-B10: a Txn of ranges only is a read, answered at the store's revision; so with serializable ranges."""
    last = await world.put("a")
    for serializable in (False, True):
        result = await world.apply(Range(world.all, serializable=serializable))
        assert (last, 1) == (result.revision, result.results[0].count)
