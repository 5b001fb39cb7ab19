"""A mirror tells what is there, then every change in order, and says so when it can not."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager

import pytest
import trio

from etcd_infra import AccessDeniedError, UnavailableError
from etcd_infra._etcd.backend import WatchStream
from etcd_infra._etcd.model import KeyRange, Put, Range, RangeResult, Txn
from etcd_infra._etcd.wrapping import Wrapping
from etcd_infra._session.mirror import Changes, Snapshot, open_mirror
from etcd_infra._session.pages import PAGE_KEYS
from etcd_infra.errors import CompactedError
from etcd_infra.testing import FaultRates, FaultyBackend, MemoryEtcd, ServerBug
from tests.helpers.watches import FaultyWatches

KEYS = KeyRange.prefix(b"k/")


def mirror_of(backend, keys=KEYS):
    return open_mirror(backend, keys, random.Random(1))


def told(changes):
    """Show changes as (key, value or None, revision)."""
    return [(e.key, None if e.is_delete else e.kv.value, e.revision) for e in changes.events]


async def test_snapshot_then_every_change(etcd, autojump_clock):
    """First what is there, then each change at its revision; nothing of other keys."""
    one = await etcd.put(b"k/1", b"a")
    await etcd.put(b"other", b"x")
    async with mirror_of(etcd) as mirror:
        two = await etcd.put(b"k/2", b"b")
        three = await etcd.delete(KeyRange.one(b"k/1"))
        snapshot = await mirror.receive()
        assert [(b"k/1", one)] == [(kv.key, kv.mod_revision) for kv in snapshot.kvs]
        assert (two - 1, None, False) == (snapshot.revision, snapshot.missed_after, snapshot.store_reset)
        assert [(b"k/2", b"b", two)] == told(await mirror.receive())
        assert [(b"k/1", None, three)] == told(await mirror.receive())


@pytest.mark.parametrize("count", [0, 1, PAGE_KEYS, PAGE_KEYS + 1, 3 * PAGE_KEYS])
async def test_snapshot_of_many_keys_is_one_revision(etcd, autojump_clock, count):
    """A snapshot of several pages is of one revision; what is written under way comes as a change."""

    class Writing(Wrapping):
        async def range(self, request):
            page = await super().range(request)
            if request.revision == 0:
                await etcd.put(b"k/9999", b"late")
            return page

    for number in range(count):
        await etcd.put(b"k/%04d" % number, b"")
    async with mirror_of(Writing(etcd)) as mirror:
        assert count == len((await mirror.receive()).kvs)
        assert [b"k/9999"] == [event.key for event in (await mirror.receive()).events]


async def test_order_inside_a_revision(etcd, autojump_clock):
    """Keys that one Txn wrote come together, in the order of its operations."""
    async with mirror_of(etcd) as mirror:
        await mirror.receive()
        revision = (await etcd.txn(Txn(success=tuple(Put(b"k/" + key) for key in (b"z", b"a", b"m"))))).revision
        assert [(b"k/z", b"", revision), (b"k/a", b"", revision), (b"k/m", b"", revision)] == told(
            await mirror.receive()
        )


async def test_partition_loses_nothing(etcd, autojump_clock):
    """Changes during a partition come after it, each once."""
    node = etcd.node("one")
    async with mirror_of(node) as mirror:
        await mirror.receive()
        node.partition()
        revisions = [await etcd.put(b"k/1", b"%d" % number) for number in range(50)]
        await trio.sleep(5)
        node.heal()
        seen = []
        while len(seen) < 50:
            seen += [event.revision for event in (await mirror.receive()).events]
        assert revisions == seen


async def test_cut_anywhere_loses_nothing(autojump_clock):
    """200 seeds of cut streams: every change exactly once, in order."""
    for seed in range(200):
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"), random.Random(seed), FaultRates(cut_stream=0.3))
        async with mirror_of(faulty) as mirror:
            await mirror.receive()
            wanted, seen = [], []
            for _ in range(5):
                wanted += [await etcd.put(b"k/%d" % number, b"") for number in range(5)]
                while len(seen) < len(wanted):
                    seen += [event.revision for event in (await mirror.receive()).events]
            assert wanted == seen, seed


async def test_compaction_is_told_once(etcd, autojump_clock):
    """History that is compacted while cut off: one snapshot that says after what, then live again."""
    node = etcd.node("one")
    async with mirror_of(node) as mirror:
        await mirror.receive()
        last = await etcd.put(b"k/1", b"a")
        assert [(b"k/1", b"a", last)] == told(await mirror.receive())
        node.partition()
        await etcd.put(b"k/1", b"b")
        await etcd.delete(KeyRange.one(b"k/1"))
        now = await etcd.put(b"k/2", b"c")
        await etcd.compact(now)
        node.heal()
        assert Snapshot(now, (await etcd.get(b"k/2"),), last) == await mirror.receive()
        next_one = await etcd.put(b"k/3", b"d")
        assert [(b"k/3", b"d", next_one)] == told(await mirror.receive())


async def test_slow_consumer_is_told_of_its_gap(etcd, autojump_clock):
    """A consumer that sleeps through 5,000 changes and a compaction gets a snapshot that says so."""
    async with mirror_of(etcd) as mirror:
        first = await mirror.receive()
        for number in range(5_000):
            await etcd.put(b"k/1", b"%d" % number)
        await etcd.compact(etcd.store.revision)
        item = await mirror.receive()
        reached = first.revision
        while isinstance(item, Changes):  # what was on its way already
            reached = item.events[-1].revision
            item = await mirror.receive()
        assert reached == item.missed_after
        assert [b"4999"] == [kv.value for kv in item.kvs]


async def test_slow_consumer_gets_everything_while_history_lasts(etcd, autojump_clock):
    """Without a compaction a consumer that sleeps misses nothing."""
    async with mirror_of(etcd) as mirror:
        await mirror.receive()
        revisions = [await etcd.put(b"k/1", b"%d" % number) for number in range(3_000)]
        seen = []
        while len(seen) < 3_000:
            seen += [event.revision for event in (await mirror.receive()).events]
        assert revisions == seen


async def test_silent_watch_survives_compaction(autojump_clock):
    """A range in which nothing happens does not fall behind compaction, thanks to progress notifications."""
    etcd = MemoryEtcd()
    node = etcd.node("one")
    async with mirror_of(node) as mirror:
        await mirror.receive()
        for _ in range(10):
            await etcd.put(b"other", b"")
        await trio.sleep(2_000)
        await etcd.compact(etcd.store.revision)
        node.partition()
        await trio.sleep(1)
        node.heal()
        revision = await etcd.put(b"k/1", b"a")
        assert [(b"k/1", b"a", revision)] == told(await mirror.receive())


@pytest.mark.parametrize("seed", range(20))
async def test_notification_that_overtakes_events_hides_none(seed, autojump_clock):
    """On a server whose notifications are early every change is told all the same, once and in order."""
    etcd = MemoryEtcd(bugs=(ServerBug.EARLY_PROGRESS,), random=random.Random(seed))
    async with mirror_of(etcd.node("one")) as mirror:
        await mirror.receive()
        wanted = [await etcd.put(b"k/%d" % number, b"") for number in range(seed + 1)]
        seen = []
        with trio.fail_after(10):
            while len(seen) < len(wanted):
                seen += [event.revision for event in (await mirror.receive()).events]
        assert wanted == seen


@pytest.mark.parametrize("seed", range(20))
async def test_break_after_an_early_notification_loses_nothing(seed, autojump_clock):
    """Events that a notification has overtaken are told even if the connection breaks before they come."""
    etcd = MemoryEtcd(bugs=(ServerBug.EARLY_PROGRESS,), random=random.Random(seed))
    node = etcd.node("one")
    async with mirror_of(node) as mirror:
        await mirror.receive()
        wanted = []
        for number in range(10):
            wanted += [await etcd.put(b"k/%d" % number, b"")]
            if number % 2:
                await trio.lowlevel.checkpoint()
            node.partition()
            await trio.sleep(0.1)
            node.heal()
        seen = []
        with trio.fail_after(10):
            while len(seen) < len(wanted):
                seen += [event.revision for event in (await mirror.receive()).events]
        assert wanted == seen


async def test_reset_store_is_told(etcd, autojump_clock):
    """The watch says that the store went back: a snapshot with `store_reset`, then live again."""
    watches = FaultyWatches(etcd.node("one"))
    async with mirror_of(watches) as mirror:
        first = await mirror.receive()
        watches.break_all()
        item = await mirror.receive()
        assert (first.revision, True) == (item.missed_after, item.store_reset)
        revision = await etcd.put(b"k/1", b"a")
        assert [(b"k/1", b"a", revision)] == told(await mirror.receive())


class Compacting(Wrapping):
    """Its watches are compacted at once, `times` times."""

    times = 0

    @asynccontextmanager
    async def watch(self, watched, /, **options):
        async with super().watch(watched, **options) as stream:
            if self.times:
                self.times -= 1
                yield _Compacted()
            else:
                yield stream


class _Compacted(WatchStream):
    created_revision = 1

    async def receive(self):
        await trio.lowlevel.checkpoint()
        raise CompactedError("on demand", 5)


async def test_no_loop_of_compactions(etcd, autojump_clock):
    """Each compaction is answered by reading again, not by asking for the same revision for ever."""
    backend = Compacting(etcd)
    backend.times = 3
    async with mirror_of(backend) as mirror:
        snapshots = [await mirror.receive() for _ in range(4)]
        assert [None, 1, 1, 1] == [snapshot.missed_after for snapshot in snapshots]
        await etcd.put(b"k/1", b"a")
        assert 1 == len((await mirror.receive()).events)


class Stale(Wrapping):
    """Answers ranges as of revision `at` while that is set."""

    at = 0

    async def range(self, request: Range, /) -> RangeResult:
        found = await super().range(request)
        return RangeResult((), 0, revision=self.at) if self.at else found


async def test_never_goes_back(etcd, autojump_clock):
    """A read that is older than what was told is asked again before it becomes a snapshot."""
    node = etcd.node("one")
    backend = Stale(node)
    async with mirror_of(backend) as mirror:
        await mirror.receive()
        last = await etcd.put(b"k/1", b"a")
        await mirror.receive()
        node.partition()
        await etcd.put(b"k/2", b"")
        await etcd.put(b"k/1", b"b")
        await etcd.compact(etcd.store.revision)
        backend.at = 1
        node.heal()

        async def recover():
            await trio.sleep(0.1)
            backend.at = 0

        async with trio.open_nursery() as nursery:
            nursery.start_soon(recover)
            item = await mirror.receive()
        assert (last, False) == (item.missed_after, item.store_reset)
        assert [b"b", b""] == [kv.value for kv in item.kvs]


async def test_store_that_stays_behind_was_reset(etcd, autojump_clock):
    """A store that answers from the past again and again was restored: that is told."""
    node = etcd.node("one")
    backend = Stale(node)
    async with mirror_of(backend) as mirror:
        await mirror.receive()
        await etcd.put(b"k/1", b"a")
        await mirror.receive()
        node.partition()
        await etcd.put(b"k/2", b"")
        await etcd.put(b"k/1", b"b")
        await etcd.compact(etcd.store.revision)
        backend.at = 1
        node.heal()
        item = await mirror.receive()
        assert (1, True) == (item.revision, item.store_reset)


class Denying(Wrapping):
    """Watches and reads are denied while `denied`."""

    denied = False

    async def around(self, verb, request, call):
        if self.denied:
            raise AccessDeniedError("on demand")
        return await call()

    @asynccontextmanager
    async def watch(self, watched, /, **options):
        if self.denied:
            raise AccessDeniedError("on demand")
        async with super().watch(watched, **options) as stream:
            yield stream


async def test_denied_at_once(etcd, autojump_clock):
    """A mirror that may not be read raises on entering, bare."""
    backend = Denying(etcd)
    backend.denied = True
    with pytest.raises(AccessDeniedError):
        async with mirror_of(backend):
            pass


async def test_denied_later(etcd, autojump_clock):
    """A mirror that may not be read any more raises at the next step, again and again; the body goes on."""
    backend = Denying(FaultyWatches(etcd.node("one")))
    async with mirror_of(backend) as mirror:
        await mirror.receive()
        backend.denied = True
        backend.inner.break_all()
        for _ in range(2):
            with pytest.raises(AccessDeniedError):
                await mirror.receive()


async def test_unreachable_at_first(etcd, autojump_clock):
    """Entering waits for an etcd that can not be reached, under the caller's scope."""
    node = etcd.node("one")
    node.partition()
    with trio.move_on_after(30) as scope:
        async with mirror_of(node):
            pass
    assert scope.cancelled_caught

    async def heal():
        await trio.sleep(10)
        node.heal()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(heal)
        async with mirror_of(node) as mirror:
            assert () == (await mirror.receive()).kvs


async def test_cancelled_receive_loses_nothing(etcd, autojump_clock):
    """A receive that is cancelled again and again misses no change."""
    async with mirror_of(etcd) as mirror:
        await mirror.receive()
        wanted = []
        seen = []
        for number in range(50):
            wanted.append(await etcd.put(b"k/1", b"%d" % number))
            with trio.CancelScope() as scope:
                scope.cancel()
                seen += [event.revision for event in (await mirror.receive()).events]
        with trio.move_on_after(1):
            while True:
                seen += [event.revision for event in (await mirror.receive()).events]
        assert wanted == seen


async def test_bodys_exception_leaves_bare(etcd, autojump_clock):
    """The body's exception is not wrapped in a group."""
    with pytest.raises(ZeroDivisionError):
        async with mirror_of(etcd) as mirror:
            await mirror.receive()
            raise ZeroDivisionError


async def test_failing_watch_is_opened_again(etcd, autojump_clock):
    """A watch that can not be opened for a while costs no second snapshot."""

    class Breaking(Wrapping):
        @asynccontextmanager
        async def watch(self, watched, /, **options):
            async with super().watch(watched, **options) as stream:
                yield _BreaksOnce(stream)

    class _BreaksOnce(WatchStream):
        def __init__(self, inner):
            self.inner = inner
            self.created_revision = inner.created_revision
            self.left = 1

        async def receive(self):
            if not self.left:
                raise UnavailableError("on demand")
            self.left -= 1
            return await self.inner.receive()

    async with mirror_of(Breaking(etcd)) as mirror:
        assert isinstance(await mirror.receive(), Snapshot)
        for number in range(5):
            revision = await etcd.put(b"k/1", b"%d" % number)
            assert [(b"k/1", b"%d" % number, revision)] == told(await mirror.receive())
