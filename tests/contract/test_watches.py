"""Section D: what a watch delivers, from where, and how it ends."""

from __future__ import annotations

import pytest

from etcd_infra._etcd.model import DeleteRange, Event, KeyRange, KeyValue, Txn, WatchBatch
from etcd_infra.errors import CompactedError
from tests.contract.world import World, receive, receive_events, stays_silent

MIB = 1024 * 1024


async def labels(world: World, events: list[Event]) -> list[tuple[str, bytes, bytes]]:
    """Return events as (kind, name, value)."""
    return [(event.kind.name, world.bare(event), event.kv.value) for event in events]


async def test_start_is_inclusive(world):
    """S-D1: a watch from revision R begins with R's own event."""
    first = await world.put("a", b"1")
    await world.put("a", b"2")
    async with world.backend.watch(world.all, start_revision=first) as stream:
        events = await receive_events(stream, 2)
    assert [first, first + 1] == [event.revision for event in events]


async def test_start_of_0_is_what_comes_next(world):
    """S-D1: a watch from 0 begins with the first revision after its creation."""
    before = await world.put("a", b"old")
    async with world.backend.watch(world.all) as stream:
        assert before == stream.created_revision
        after = await world.put("a", b"new")
        assert WatchBatch(after, (Event.put(KeyValue(world.key("a"), b"new", before, after, 2)),)) == (
            await receive(stream)
        )


async def test_start_of_1_is_all_history(fresh):
    """S-D1: a watch from 1 begins with the store's first event."""
    await fresh.put("a", b"1")
    await fresh.put("b", b"2")
    async with fresh.backend.watch(KeyRange.everything(), start_revision=1) as stream:
        events = await receive_events(stream, 2)
    assert [2, 3] == [event.revision for event in events]


async def test_misunderstood_watches_are_refused(world):
    """S-D1, S-A13: an empty key, an empty range and a negative start are refused before they are sent."""
    for wanted, start in (
        (KeyRange(b"", b"\0"), 0),
        (world.span("b", "a"), 0),
        (world.span("a", "a"), 0),
        (world.one("a"), -1),
    ):
        with pytest.raises(ValueError):
            async with world.backend.watch(wanted, start_revision=start):
                pass


async def test_created_revision_is_the_stores(world):
    """S-D2: a watch knows the store's revision at its creation, whatever its start."""
    await world.put("a")
    last = await world.put("a")
    for start in (0, last, last + 1, last + 100):
        async with world.backend.watch(world.all, start_revision=start) as stream:
            assert last == stream.created_revision, start


async def test_read_after_creation_misses_nothing(world):
    """S-D19: what a read after the creation does not show, the watch delivers."""
    async with world.backend.watch(world.all) as stream:
        found = await world.backend.get(world.key("a"))
        assert found is None
        await world.put("a")
        assert [world.key("a")] == [event.key for event in await receive_events(stream, 1)]


async def test_list_then_watch_has_no_gap(world):
    """S-D19: a list, and a watch from its revision + 1, give each change exactly once."""
    from etcd_infra._etcd.model import Range

    await world.put("a")
    listed = await world.backend.range(Range(world.all))
    await world.put("b")
    async with world.backend.watch(world.all, start_revision=listed.revision + 1) as stream:
        await world.put("c")
        assert [b"b", b"c"] == [world.bare(event) for event in await receive_events(stream, 2)]


async def test_put_event_has_the_whole_state(world):
    """S-D7: a PUT event carries the key's whole new state, its lease included."""
    lease = await world.grant()
    created = await world.put("a", b"1")
    async with world.backend.watch(world.all, start_revision=created + 1) as stream:
        modified = await world.put("a", b"2", lease=lease)
        (event,) = await receive_events(stream, 1)
    assert Event.put(KeyValue(world.key("a"), b"2", created, modified, 2, lease)) == event


async def test_delete_event_has_key_and_revision_only(world):
    """S-D11: a DELETE event carries the key and the deleting revision, and no other field."""
    lease = await world.grant()
    put = await world.put("a", b"v", lease=lease)
    async with world.backend.watch(world.all, start_revision=put + 1) as stream:
        deleted = await world.backend.delete(world.one("a"))
        (event,) = await receive_events(stream, 1)
    assert Event.deleted(world.key("a"), mod_revision=deleted) == event


async def test_revision_comes_whole(world):
    """S-D7: the events of one revision come together, in one batch of that revision."""
    before = await world.revision()
    async with world.backend.watch(world.all, start_revision=before + 1) as stream:
        await world.apply(*(world.putting(f"{n:03}") for n in range(100)))
        batch = await receive(stream)
    assert (before + 1, 100) == (batch.revision, len(batch.events))


async def test_events_come_in_revision_order_and_once(world):
    """S-D7: events come in the order of their revisions, each once, live and from history alike."""
    before = await world.revision()
    for n in range(20):
        await world.put(f"{n % 3}")
    async with world.backend.watch(world.all, start_revision=before + 1) as stream:
        for n in range(20):
            await world.put(f"{n % 3}")
        events = await receive_events(stream, 40)
        assert list(range(before + 1, before + 41)) == [event.revision for event in events]
        await world.put("end")
        assert [b"end"] == [world.bare(event) for event in await receive_events(stream, 1)]


async def test_events_of_a_txn_keep_the_order_of_its_operations(world):
    """S-D12: events of one revision come in the order of the operations; a delete of a range in key order."""
    await world.apply(*(world.putting(name) for name in "xyw"))
    before = await world.revision()
    async with world.backend.watch(world.all, start_revision=before + 1) as stream:
        await world.apply(
            world.putting("z"),
            Txn(success=(world.putting("n"),)),
            world.putting("a"),
            DeleteRange(world.span("w", "z")),
            world.putting("m"),
        )
        events = await receive_events(stream, 7)
    wanted = [("PUT", b"z"), ("PUT", b"n"), ("PUT", b"a")]
    wanted += [("DELETE", b"w"), ("DELETE", b"x"), ("DELETE", b"y"), ("PUT", b"m")]
    assert wanted == [(event.kind.name, world.bare(event)) for event in events]


async def test_events_outside_the_range_are_left_out(world):
    """S-D7: a watch delivers the events of its range only, also out of a Txn that writes elsewhere."""
    before = await world.revision()
    async with (
        world.backend.watch(world.one("b"), start_revision=before + 1) as one,
        world.backend.watch(world.span("b", "d"), start_revision=before + 1) as span,
    ):
        await world.apply(*(world.putting(name) for name in "abcd"))
        await world.put("a")
        await world.put("b\0")
        await world.put("b")
        assert [b"b", b"b"] == [world.bare(event) for event in await receive_events(one, 2)]
        assert [b"b", b"c", b"b\0", b"b"] == [world.bare(event) for event in await receive_events(span, 4)]


async def test_open_range_watch(world):
    """S-A12: a watch takes the open end, too."""
    before = await world.revision()
    async with world.backend.watch(KeyRange.since(world.key("b")), start_revision=before + 1) as stream:
        await world.put("a")
        await world.put("c")
        assert [world.key("c")] == [event.key for event in await receive_events(stream, 1)]


async def test_what_changes_nothing_sends_nothing(world):
    """S-A2: deletes of nothing, failed compares and rejected requests send no event."""
    before = await world.put("a")
    async with world.backend.watch(KeyRange.everything(), start_revision=before + 1) as stream:
        await world.apply(world.deleting("missing"))
        await world.apply()
        await world.put("b")
        batch = await receive(stream)
    assert (before + 1, [b"b"]) == (batch.revision, [world.bare(event) for event in batch.events])


async def test_watches_are_independent(world):
    """S-D7: two watches of one key both get every event; leaving one does not disturb the other."""
    before = await world.revision()
    async with world.backend.watch(world.all, start_revision=before + 1) as kept:
        async with world.backend.watch(world.all, start_revision=before + 1) as left:
            await world.put("a")
            assert 1 == len(await receive_events(left, 1))
        await world.put("b")
        assert [b"a", b"b"] == [world.bare(event) for event in await receive_events(kept, 2)]


# ── prev_kv and filters ─────────────────────────────────────────────────────────────────────────


async def test_prev_kv_is_what_was_there_before(world):
    """S-D10: with `prev_kv` an event carries the key's whole former state, and none when it was created."""
    before = await world.revision()
    async with world.backend.watch(world.all, start_revision=before + 1, prev_kv=True) as stream:
        await world.put("a", b"1")
        await world.put("a", b"2")
        await world.backend.delete(world.one("a"))
        await world.put("a", b"3")
        events = await receive_events(stream, 4)
    one = KeyValue(world.key("a"), b"1", before + 1, before + 1, 1)
    two = KeyValue(world.key("a"), b"2", before + 1, before + 2, 2)
    assert [None, one, two, None] == [event.prev_kv for event in events]


async def test_prev_kv_is_from_the_revision_before(world):
    """S-D10: what was there before is read at the revision before, whatever the same Txn did to the key already."""
    before = await world.put("a", b"old")
    old = await world.get("a")
    async with world.backend.watch(world.all, start_revision=before + 1, prev_kv=True) as stream:
        await world.apply(
            Txn(success=(world.putting("a", b"new"), world.putting("b", b"new"))),
            Txn(success=(world.deleting("a"), world.deleting("b"))),
        )
        events = await receive_events(stream, 4)
    assert [old, None, old, None] == [event.prev_kv for event in events]


async def test_no_prev_kv_unless_asked(world):
    """S-D10: without `prev_kv` no event carries one."""
    before = await world.put("a")
    async with world.backend.watch(world.all, start_revision=before + 1) as stream:
        await world.put("a")
        await world.backend.delete(world.one("a"))
        assert [None, None] == [event.prev_kv for event in await receive_events(stream, 2)]


async def test_prev_kv_is_missing_when_it_is_compacted(world):
    """S-D10: the former state is missing when the revision before the event is compacted."""
    await world.put("a", b"1")
    second = await world.put("a", b"2")
    await world.put("a", b"3")
    await world.backend.compact(second)
    async with world.backend.watch(world.all, start_revision=second, prev_kv=True) as stream:
        events = await receive_events(stream, 2)
    assert [(b"2", None), (b"3", b"2")] == [
        (event.kv.value, event.prev_kv and event.prev_kv.value) for event in events
    ]
    assert events[0].kv.create_revision != events[0].kv.mod_revision


async def test_filters_suppress_events(world):
    """S-D13: `no_put` leaves out PUT events, `no_delete` DELETE events, live and from history."""
    before = await world.revision()

    async def change() -> None:
        await world.put("a")
        await world.apply(world.deleting("a"), world.putting("b"))

    await change()
    async with (
        world.backend.watch(world.all, start_revision=before + 1, no_put=True) as deletes,
        world.backend.watch(world.all, start_revision=before + 1, no_delete=True) as puts,
    ):
        await change()
        assert [("DELETE", b"a", b"")] * 2 == await labels(world, await receive_events(deletes, 2))
        wanted = [("PUT", b"a", b"v"), ("PUT", b"b", b"v")] * 2
        assert wanted == await labels(world, await receive_events(puts, 4))


async def test_revision_that_a_filter_empties_sends_nothing(world):
    """S-D13: a revision of which the filters leave nothing sends nothing."""
    before = await world.revision()
    async with world.backend.watch(world.all, start_revision=before + 1, no_put=True) as stream:
        await world.put("a")
        await world.put("a")
        await world.backend.delete(world.one("a"))
        batch = await receive(stream)
    assert (before + 3, 1) == (batch.revision, len(batch.events))


# ── compaction and the future ───────────────────────────────────────────────────────────────────


async def test_compacted_start_ends_the_watch(world):
    """S-D4: a watch from a compacted revision is created, and then ends with the revision that is left."""
    first = await world.put("a")
    await world.put("a")
    last = await world.put("a")
    await world.backend.compact(last)
    async with world.backend.watch(world.all, start_revision=first) as stream:
        with pytest.raises(CompactedError) as caught:
            await receive(stream)
    assert last == caught.value.compact_revision


async def test_start_at_the_compaction_revision(world):
    """S-D4: the compaction revision itself can still be watched from."""
    await world.put("a", b"1")
    middle = await world.put("a", b"2")
    await world.put("a", b"3")
    await world.backend.compact(middle)
    async with world.backend.watch(world.all, start_revision=middle) as stream:
        assert [b"2", b"3"] == [event.kv.value for event in await receive_events(stream, 2)]


async def test_watch_that_keeps_up_survives_compaction(world):
    """S-D5: compaction does not end a watch that keeps up, and takes no event from it."""
    before = await world.revision()
    async with world.backend.watch(world.all, start_revision=before + 1) as stream:
        last = 0
        for value in (b"1", b"2", b"3"):
            last = await world.put("a", value)
        assert 3 == len(await receive_events(stream, 3))
        await world.backend.compact(last)
        for value in (b"4", b"5"):
            last = await world.put("a", value)
        assert [b"4", b"5"] == [event.kv.value for event in await receive_events(stream, 2)]
        await world.backend.compact(last)
        await world.put("a", b"6")
        assert [b"6"] == [event.kv.value for event in await receive_events(stream, 1)]


async def test_quiet_watch_survives_compaction(world):
    """S-D5: a watch without events is not ended when compaction passes its start."""
    async with world.backend.watch(world.one("quiet")) as stream:
        for _ in range(3):
            last = await world.put("loud")
        await world.backend.compact(last)
        assert await stays_silent(stream)
        await world.put("quiet")
        assert [b"quiet"] == [world.bare(event) for event in await receive_events(stream, 1)]


async def test_future_start_is_silent_until_it_is_reached(world):
    """S-D6: a watch from a future revision says nothing until the store gets there."""
    before = await world.revision()
    async with world.backend.watch(world.all, start_revision=before + 3) as stream:
        await world.put("a", b"1")
        await world.put("a", b"2")
        assert await stays_silent(stream)
        await world.put("a", b"3")
        (event,) = await receive_events(stream, 1)
    assert (before + 3, b"3") == (event.revision, event.kv.value)


# ── large histories and large revisions ─────────────────────────────────────────────────────────


async def test_catch_up_of_many_revisions_is_whole(world):
    """Finding 7: a catch-up of 2,500 revisions loses none, though each answer's header is far ahead."""
    before = await world.revision()
    for n in range(2_500):
        await world.put(f"{n % 7}", b"%d" % n)
    async with world.backend.watch(world.all, start_revision=before + 1) as stream:
        batches = []
        while sum(len(batch.events) for batch in batches) < 2_500:
            batches.append(await receive(stream))
    revisions = [event.revision for batch in batches for event in batch.events]
    assert list(range(before + 1, before + 2_501)) == revisions
    assert [batch.events[-1].revision for batch in batches] == [batch.revision for batch in batches]
    assert len(batches) > 1


async def test_fragments_are_joined(world):
    """S-D8: a revision too large for one message is delivered whole."""
    value = bytes(MIB)
    for name in "abcdef":
        last = await world.put(name, value)
    async with world.backend.watch(world.all, start_revision=last + 1, prev_kv=True) as stream:
        deleted = await world.backend.delete(world.all)
        batch = await receive(stream)
    assert (deleted, 6) == (batch.revision, len(batch.events))
    assert {MIB} == {len(event.prev_kv.value) for event in batch.events}


async def test_large_catch_up_arrives(world):
    """S-D9: a history of many mebibytes is delivered."""
    before = await world.revision()
    for n in range(8):
        await world.put("a", bytes(MIB) + bytes([n]))
    async with world.backend.watch(world.all, start_revision=before + 1) as stream:
        events = await receive_events(stream, 8)
    assert list(range(8)) == [event.kv.value[-1] for event in events]


# ── consumers ───────────────────────────────────────────────────────────────────────────────────


async def test_slow_consumer_loses_nothing(world):
    """S-D7: a consumer that comes late gets everything, in order."""
    before = await world.revision()
    async with world.backend.watch(world.all, start_revision=before + 1) as stream:
        for n in range(1_500):
            await world.put("a", b"%d" % n)
        events = await receive_events(stream, 1_500)
    assert [b"%d" % n for n in range(1_500)] == [event.kv.value for event in events]


async def test_cancelled_receive_loses_nothing(world):
    """S-D7: a `receive` that is cancelled loses no batch."""
    before = await world.revision()
    async with world.backend.watch(world.all, start_revision=before + 1) as stream:
        for n in range(5):
            await world.put("a", b"%d" % n)
            assert n < 5
            await stays_silent_or_cancelled(stream)
        events = await receive_events(stream, 5)
    assert [b"%d" % n for n in range(5)] == [event.kv.value for event in events]


async def stays_silent_or_cancelled(stream: object) -> None:
    """Call `receive` in a scope that is cancelled already."""
    import trio

    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.receive()  # type: ignore[attr-defined]


async def test_coordination_watch_delivers(world):
    """S-D19: a coordination watch delivers what happens after its creation, like any other."""
    async with world.backend.watch(world.all, coordination=True) as stream:
        created = await world.put("a")
        (event,) = await receive_events(stream, 1)
    assert created == event.revision


async def test_async_for_over_a_watch(world):
    """A watch can be iterated over with `async for`."""
    async with world.backend.watch(world.all) as stream:
        await world.put("a")
        async for batch in stream:
            assert [world.key("a")] == [event.key for event in batch.events]
            break
