"""Section A, second half: which keys a range finds, how many it counts, in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etcd_infra._etcd.model import DeleteRange, KeyRange, Range, SortTarget

if TYPE_CHECKING:
    from tests.contract.world import World


async def fill(world: World, names: str = "abcdef") -> list[int]:
    """Write a key per letter; return the revisions."""
    return [await world.put(name, name.upper().encode()) for name in names]


async def test_range_of_one_key(world):
    """S-A12: without an end a range is exactly its key."""
    await fill(world)
    await world.put("ab")
    found = await world.backend.range(Range(world.one("a")))
    assert [world.key("a")] == [kv.key for kv in found.kvs]
    assert 1 == found.count


async def test_range_excludes_its_end(world):
    """S-A12: a range includes its first key and excludes its end."""
    await fill(world)
    found = await world.backend.range(Range(world.span("b", "d")))
    assert [world.key("b"), world.key("c")] == [kv.key for kv in found.kvs]


async def test_inverted_range_finds_nothing(world):
    """S-A12: a range whose end is not above its key finds nothing, counts nothing and deletes nothing."""
    await fill(world)
    for wanted in (world.span("d", "b"), world.span("b", "b")):
        found = await world.backend.range(Range(wanted))
        assert ((), 0, False) == (found.kvs, found.count, found.more)
        (deleted,) = (await world.apply(DeleteRange(wanted))).results
        assert 0 == deleted.deleted
    assert 6 == len(await world.names())


async def test_prefix_of_0xff_bytes(world):
    """S-A12: the end of a prefix is found by adding one to its last byte that is not 0xff."""
    for name in (b"p", b"p\xff", b"p\xff\xff", b"p\xffx", b"q", b"p\xfe"):
        await world.put(name)
    found = await world.backend.range(Range(KeyRange.prefix(world.key(b"p\xff"))))
    assert [world.key(name) for name in (b"p\xff", b"p\xffx", b"p\xff\xff")] == [kv.key for kv in found.kvs]


async def test_prefix_of_only_0xff_bytes_is_open(world):
    r"""S-A12: a prefix of only 0xff bytes has the end "\0", which means to the end of all keys."""
    await world.put("a")
    names = (b"\xff", b"\xff\xff", b"\xff\xff\0")
    for name in names:
        await world.backend.put(name, b"v")
    found = await world.backend.range(Range(KeyRange.prefix(b"\xff")))
    assert sorted(names) == [kv.key for kv in found.kvs]
    await world.backend.delete(KeyRange.prefix(b"\xff"))
    assert [b"a"] == await world.names()


async def test_end_of_one_zero_byte_is_open(world):
    r"""S-A12: the end "\0" means all keys from the first on, and from "\0" on: all keys."""
    await fill(world)
    since = await world.backend.range(Range(KeyRange.since(world.key("e"))))
    assert [world.key("e"), world.key("f")] == [kv.key for kv in since.kvs]
    everything = await world.backend.range(Range(KeyRange.everything()))
    empty_prefix = await world.backend.range(Range(KeyRange.prefix(b"")))
    assert everything == empty_prefix
    assert {world.key(name) for name in "abcdef"} <= {kv.key for kv in everything.kvs}


async def test_count_ignores_the_limit(world):
    """S-A10: `count` is the number of keys in the range whatever the limit; `more` says that some were cut off."""
    await fill(world)
    for limit, more in ((0, False), (1, True), (5, True), (6, False), (7, False)):
        found = await world.backend.range(Range(world.all, limit=limit))
        assert min(limit or 6, 6) == len(found.kvs), limit
        assert (6, more) == (found.count, found.more), limit


async def test_limit_takes_the_first(world):
    """S-A10: the limit keeps the first keys of the order."""
    await fill(world)
    assert [b"a", b"b"] == await world.names(limit=2)
    assert [b"f", b"e"] == await world.names(limit=2, sort_by=SortTarget.KEY, descending=True)


async def test_negative_limit_is_none(world):
    """S-A10: a limit below 0 is no limit."""
    await fill(world)
    assert 6 == len(await world.names(limit=-1))


async def test_limit_at_an_old_revision(world):
    """S-A10: limit, count and more work the same at an old revision."""
    *_, last = await fill(world)
    await world.backend.delete(world.all)
    found = await world.backend.range(Range(world.all, revision=last, limit=2))
    assert ([world.key("a"), world.key("b")], 6, True) == (
        [kv.key for kv in found.kvs],
        found.count,
        found.more,
    )


async def test_revision_bounds_filter_keys_but_not_count(world):
    """S-A10: bounds on mod and create revisions are inclusive, filter the keys and leave `count` alone."""
    revisions = await fill(world, "abcd")
    await world.put("a")
    cases = (
        ({"min_mod_revision": revisions[2]}, "acd"),
        ({"max_mod_revision": revisions[2]}, "bc"),
        ({"min_mod_revision": revisions[1], "max_mod_revision": revisions[2]}, "bc"),
        ({"min_create_revision": revisions[1]}, "bcd"),
        ({"max_create_revision": revisions[1]}, "ab"),
        ({"max_create_revision": revisions[1], "min_mod_revision": revisions[3]}, "a"),
    )
    for bounds, wanted in cases:
        found = await world.backend.range(Range(world.all, **bounds))
        assert [world.key(name) for name in wanted] == [kv.key for kv in found.kvs], bounds
        assert (4, False) == (found.count, found.more), bounds


async def test_limit_after_bounds(world):
    """S-A10: the limit counts what the bounds leave, and so does `more`."""
    revisions = await fill(world, "abcd")
    for limit, wanted, more in ((1, [b"c"], True), (2, [b"c", b"d"], False)):
        found = await world.backend.range(Range(world.all, min_mod_revision=revisions[2], limit=limit))
        assert wanted == [kv.key.removeprefix(world.prefix) for kv in found.kvs]
        assert (4, more) == (found.count, found.more)


async def test_default_order_is_ascending_by_key(world):
    """S-A11: without a sort the keys come in ascending order."""
    await fill(world, "dbfaec")
    assert [b"a", b"b", b"c", b"d", b"e", b"f"] == await world.names()


async def test_descending_without_a_target_is_by_key(world):
    """S-A11: descending order without a sort target is that of the keys."""
    await fill(world)
    assert [b"f", b"e"] == await world.names(descending=True, limit=2)


async def sortable(world: World) -> None:
    """Write three keys so that each target sorts them in another way."""
    for name, value in (("b", b"3"), ("c", b"1"), ("a", b"2"), ("c", b"1"), ("c", b"1"), ("b", b"3")):
        await world.put(name, value)


async def test_sort_by_each_target(world):
    """S-A11: a range sorts by key, version, create revision, mod revision or value, up or down."""
    await sortable(world)
    cases = {
        SortTarget.KEY: "abc",
        SortTarget.VERSION: "abc",
        SortTarget.CREATE: "bca",
        SortTarget.MOD: "acb",
        SortTarget.VALUE: "cab",
    }
    for target, wanted in cases.items():
        ascending = [name.encode() for name in wanted]
        assert ascending == await world.names(sort_by=target), target
        assert ascending[::-1] == await world.names(sort_by=target, descending=True), target


async def test_sort_comes_before_the_limit(world):
    """S-A11: a range sorts first and cuts then."""
    await sortable(world)
    found = await world.backend.range(Range(world.all, sort_by=SortTarget.CREATE, limit=1))
    assert ([world.key("b")], 3, True) == ([kv.key for kv in found.kvs], found.count, found.more)
    last = await world.backend.range(Range(world.all, sort_by=SortTarget.MOD, descending=True, limit=1))
    assert [world.key("b")] == [kv.key for kv in last.kvs]


async def test_keys_only_drops_nothing_but_values(world):
    """S-A10: `keys_only` leaves out the values and nothing else, after sorting by them."""
    await sortable(world)
    whole = await world.backend.range(Range(world.all, sort_by=SortTarget.VALUE))
    bare = await world.backend.range(Range(world.all, sort_by=SortTarget.VALUE, keys_only=True))
    assert [(kv.key, kv.version, kv.mod_revision) for kv in whole.kvs] == [
        (kv.key, kv.version, kv.mod_revision) for kv in bare.kvs
    ]
    assert {b""} == {kv.value for kv in bare.kvs}


async def test_count_only(world):
    """S-A10: `count_only` answers a count and no keys, whatever the limit."""
    revisions = await fill(world)
    for options in ({}, {"limit": 2}, {"min_mod_revision": revisions[3]}, {"revision": revisions[-1]}):
        found = await world.backend.range(Range(world.all, count_only=True, **options))
        assert ((), 6, False) == (found.kvs, found.count, found.more), options


async def test_pages_pinned_to_a_revision(world):
    """S-A9: pages that name the first page's revision show one state, whatever is written meanwhile."""
    await fill(world)
    page = await world.backend.range(Range(world.all, limit=2))
    pinned, found = page.revision, [*page.kvs]
    while page.more:
        await world.backend.delete(world.one("f"))
        await world.put("b\0")
        rest = KeyRange(found[-1].key + b"\0", world.all.end)
        page = await world.backend.range(Range(rest, limit=2, revision=pinned))
        found += page.kvs
    assert [world.key(name) for name in "abcdef"] == [kv.key for kv in found]
