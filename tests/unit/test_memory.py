"""The in-memory etcd's own part: nodes and their faults, virtual time, no tasks."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
import trio

from etcd_infra._backends.memory_store import Store
from etcd_infra._etcd.model import Event, KeyRange, KeyValue, Put, Range, Txn, WatchBatch
from etcd_infra.errors import CompactedError, LeaseNotFoundError, OutcomeUnknownError, UnavailableError
from etcd_infra.testing import MemoryEtcd

KEY = KeyRange.one(b"a")


@pytest.fixture
def clock(autojump_clock):
    """Let time jump."""
    return autojump_clock


def verbs(node=MemoryEtcd()):  # noqa: B008 - only for its verbs' names
    """Name every verb as (call, whether an unanswered one is unknown)."""
    return {
        "range": (lambda: node.range(Range(KEY)), False),
        "reading txn": (lambda: node.txn(Txn(success=(Range(KEY),))), False),
        "writing txn": (lambda: node.put(b"a", b"v"), True),
        "compact": (lambda: node.compact(1), True),
        "grant": (lambda: node.lease_grant(60), True),
        "keep alive": (lambda: node.lease_keep_alive(1), False),
        "revoke": (lambda: node.lease_revoke(1), True),
        "time to live": (lambda: node.lease_time_to_live(1), False),
        "list": (node.lease_list, False),
        "status": (node.status, False),
    }


class Interrupted(Store):
    """A store in which something happens while it applies a transaction."""

    def __init__(self, interrupt) -> None:
        super().__init__()
        self._interrupt = interrupt

    def txn(self, request, now):
        """Apply, and interrupt."""
        try:
            return super().txn(request, now)
        finally:
            self._interrupt()


# ── nodes ───────────────────────────────────────────────────────────────────────────────────────


async def test_nodes_share_one_store(clock):
    """What one node writes every other one reads, and so does the etcd itself."""
    etcd = MemoryEtcd()
    await etcd.node("a").put(b"a", b"1")
    assert b"1" == (await etcd.node("b").get(b"a")).value == (await etcd.get(b"a")).value


async def test_node_has_one_backend_per_name(clock):
    """The same name gives the same node, until it crashed."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    assert node is etcd.node("a")
    assert node is not etcd.node("b")
    node.crash()
    assert node is not etcd.node("a")
    assert 2 == await etcd.node("a").put(b"a", b"1")


async def test_constructor_starts_nothing():
    """Making an etcd and its nodes needs no Trio run and starts no thread."""
    before = threading.active_count()
    etcd = MemoryEtcd()
    etcd.node("a")
    assert before == threading.active_count()


def test_etcd_is_made_outside_of_trio():
    """An etcd made before a run works in it, and in the next one, with what is stored."""
    etcd = MemoryEtcd()

    async def write() -> int:
        return await etcd.put(b"a", b"1")

    assert [2, 3] == [trio.run(write), trio.run(write)]


async def test_every_verb_is_a_checkpoint_before_and_after(clock):
    """A verb that is cancelled at its first checkpoint was not applied; at its second it was."""
    etcd = MemoryEtcd()
    with trio.CancelScope() as scope:
        scope.cancel()
        await etcd.put(b"a", b"1")
    assert 1 == etcd.store.revision

    with trio.CancelScope() as scope:
        etcd = MemoryEtcd(store=Interrupted(scope.cancel))
        await etcd.put(b"a", b"1")
    assert scope.cancelled_caught
    assert 2 == etcd.store.revision


# ── partition, pause, crash ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", verbs())
async def test_partitioned_call_ends_at_its_time_out(clock, verb):
    """Cut off, a call ends after its time-out: a read unavailable, a write unknown; nothing is applied."""
    etcd = MemoryEtcd()
    node = etcd.node("a", call_timeout=3.0)
    node.partition()
    call, unknown = verbs(node)[verb]
    began = trio.current_time()
    with pytest.raises(OutcomeUnknownError if unknown else UnavailableError):
        await call()
    assert 3.0 == pytest.approx(trio.current_time() - began)
    assert (1, ()) == (etcd.store.revision, await etcd.lease_list())
    assert 2 == await etcd.node("b").put(b"a", b"1")


async def test_unknown_outcome_names_the_keys(clock):
    """A write without an answer names the keys that it may have written."""
    node = MemoryEtcd().node("a")
    node.partition()
    with pytest.raises(OutcomeUnknownError) as caught:
        await node.txn(Txn(success=(Put(b"a"),), failure=(Put(b"b"),)))
    assert (b"a", b"b") == caught.value.keys


async def test_answer_lost_in_a_partition(clock):
    """A call that was applied before the partition, and not answered, ends as unknown too."""
    etcd = MemoryEtcd(store=Interrupted(lambda: etcd.node("a").partition()))
    node = etcd.node("a")
    with pytest.raises(OutcomeUnknownError):
        await node.put(b"a", b"1")
    assert 2 == etcd.store.revision
    assert 5.0 == pytest.approx(trio.current_time())


async def test_refusal_lost_in_a_partition(clock):
    """A refusal is an answer, and can be lost like one: the caller does not learn that nothing was written."""
    etcd = MemoryEtcd(store=Interrupted(lambda: etcd.node("a").partition()))
    node = etcd.node("a")
    with pytest.raises(OutcomeUnknownError):
        await node.put(b"", b"1")
    assert 1 == etcd.store.revision


async def test_call_goes_on_when_the_partition_heals(clock):
    """A call that still waits when the partition heals is applied and answered."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    node.partition()
    async with trio.open_nursery() as nursery:

        async def heal() -> None:
            await trio.sleep(4)
            node.heal()

        nursery.start_soon(heal)
        assert 2 == await node.put(b"a", b"1")


async def test_partition_leaves_other_nodes_alone(clock):
    """A partition concerns one node only, its watches included."""
    etcd = MemoryEtcd()
    async with etcd.node("b").watch(KEY) as stream:
        etcd.node("a").partition()
        await etcd.node("b").put(b"a", b"1")
        assert 2 == (await stream.receive()).revision


async def test_paused_node_has_no_time_outs(clock):
    """A paused process neither sends nor gives up; healed, it goes on."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    node.pause()
    async with trio.open_nursery() as nursery:

        async def heal() -> None:
            await trio.sleep(1_000)
            assert 1 == etcd.store.revision
            node.heal()

        nursery.start_soon(heal)
        assert 2 == await node.put(b"a", b"1")
    assert 1_000 <= trio.current_time()


async def test_paused_watch_goes_on_where_it_was(clock):
    """A paused process's watch is not broken: healed, it delivers what it missed, without `created`."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    async with node.watch(KEY) as stream:
        node.pause()
        await etcd.put(b"a", b"1")
        await etcd.put(b"a", b"2")
        with trio.move_on_after(100):
            await stream.receive()
            raise AssertionError("a paused process received something")
        node.heal()
        assert [2, 3] == [(await stream.receive()).revision for _ in range(2)]


@pytest.mark.parametrize("verb", verbs())
async def test_crashed_node_never_answers(clock, verb):
    """A crashed process's calls never return and are not applied; `heal` does not bring it back."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    node.crash()
    node.heal()
    call, _ = verbs(node)[verb]
    with trio.move_on_after(1_000_000) as scope:
        await call()
    assert scope.cancelled_caught
    assert (1, ()) == (etcd.store.revision, await etcd.lease_list())


async def test_crashed_watch_is_silent(clock):
    """A crashed process's watch delivers nothing, not even what had arrived."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    async with node.watch(KEY) as stream:
        await etcd.put(b"a", b"1")
        node.crash()
        with trio.move_on_after(1_000) as scope:
            await stream.receive()
        assert scope.cancelled_caught


async def test_lease_of_a_crashed_node_runs_out(clock):
    """What a crashed process held goes with its lease, and a waiting watch sees it in time."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    lease = await node.lease_grant(7)
    await node.put(b"a", b"1", lease=lease.lease)
    began = trio.current_time()
    node.crash()
    async with etcd.watch(KEY) as stream:
        batch = await stream.receive()
    assert (3, (Event.deleted(b"a", mod_revision=3),)) == (batch.revision, batch.events)
    assert 7.0 == pytest.approx(trio.current_time() - began)


# ── watches over partitions ─────────────────────────────────────────────────────────────────────


async def test_watch_is_made_anew_after_a_partition(clock):
    """After a partition a watch says that it was created anew, and goes on without loss or repetition."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    async with node.watch(KEY) as stream:
        assert 1 == stream.created_revision
        await etcd.put(b"a", b"1")
        assert 2 == (await stream.receive()).revision
        await etcd.put(b"a", b"2")
        node.partition()
        await etcd.put(b"a", b"3")
        node.heal()
        assert WatchBatch(4, created=True) == await stream.receive()
        assert 4 == stream.created_revision
        batch = await stream.receive()
        assert ([b"2", b"3"], 4) == ([event.kv.value for event in batch.events], batch.revision)


async def test_coordination_watch_starts_from_now_again(clock):
    """A coordination watch does not go back for what it missed: its consumer reads again after `created`."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    async with node.watch(KEY, coordination=True) as stream:
        await etcd.put(b"a", b"1")
        node.partition()
        await etcd.put(b"a", b"2")
        node.heal()
        assert WatchBatch(3, created=True) == await stream.receive()
        await etcd.put(b"a", b"3")
        assert 4 == (await stream.receive()).revision


async def test_partition_wakes_a_blocked_receive(clock):
    """A `receive` that is blocked through a partition gets the `created` batch."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    async with node.watch(KEY) as stream, trio.open_nursery() as nursery:

        async def break_and_heal() -> None:
            await trio.sleep(1)
            node.partition()
            await trio.sleep(10)
            node.heal()

        nursery.start_soon(break_and_heal)
        assert WatchBatch(1, created=True) == await stream.receive()
        assert 11 <= trio.current_time()


async def test_compaction_during_a_partition_ends_the_watch(clock):
    """A watch whose next revision was compacted while it was cut off ends with `CompactedError`, for good."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    async with node.watch(KEY) as stream:
        node.partition()
        for _ in range(3):
            last = await etcd.put(b"a", b"1")
        await etcd.compact(last)
        node.heal()
        assert (await stream.receive()).created
        for _ in range(2):
            with pytest.raises(CompactedError) as caught:
                await stream.receive()
            assert last == caught.value.compact_revision


async def test_entering_a_watch_waits_for_the_partition_to_heal(clock):
    """Entering a watch waits, without a time-out of its own, until the watch is created."""
    etcd = MemoryEtcd()
    node = etcd.node("a")
    node.partition()
    with trio.move_on_after(100) as scope:
        async with node.watch(KEY):
            raise AssertionError("created through a partition")
    assert scope.cancelled_caught
    node.heal()
    async with node.watch(KEY) as stream:
        assert 1 == stream.created_revision


# ── virtual time ────────────────────────────────────────────────────────────────────────────────


async def test_hour_passes_at_once(clock):
    """Leases run out in virtual time: an hour takes no time."""
    etcd = MemoryEtcd()
    lease = await etcd.lease_grant(3_600)
    await etcd.put(b"a", b"1", lease=lease.lease)
    await trio.sleep(3_599)
    assert await etcd.get(b"a") is not None
    await trio.sleep(1)
    assert await etcd.get(b"a") is None


async def test_blocked_watch_notices_a_lease_that_is_granted_later(clock):
    """A watch that sleeps until a far deadline wakes up for a nearer one that comes up meanwhile."""
    etcd = MemoryEtcd()
    far = await etcd.lease_grant(1_000)
    await etcd.put(b"far", b"1", lease=far.lease)
    async with etcd.watch(KEY) as stream, trio.open_nursery() as nursery:

        async def grant() -> None:
            await trio.sleep(10)
            near = await etcd.node("b").lease_grant(5)
            await etcd.node("b").put(b"a", b"1", lease=near.lease)

        nursery.start_soon(grant)
        assert [3, 4] == [(await stream.receive()).revision for _ in range(2)]
        assert 15.0 == pytest.approx(trio.current_time())


async def test_leases_end_in_the_order_of_their_deadlines(clock):
    """Leases that ran out unnoticed end in the order of their deadlines, one revision each."""
    etcd = MemoryEtcd()
    for name, ttl in ((b"slow", 30), (b"fast", 10), (b"middle", 20)):
        await etcd.put(name, b"1", lease=(await etcd.lease_grant(ttl)).lease)
    await trio.sleep(100)
    await etcd.get(b"a")
    ended = [(commit.revision, commit.events[0].key) for commit in etcd.store.history.commits[3:]]
    assert [(5, b"fast"), (6, b"middle"), (7, b"slow")] == ended


async def test_expired_lease_can_not_be_revoked(clock):
    """At its deadline a lease is gone, for every verb."""
    etcd = MemoryEtcd()
    lease = (await etcd.lease_grant(5)).lease
    await trio.sleep(5)
    with pytest.raises(LeaseNotFoundError):
        await etcd.lease_revoke(lease)


async def test_progress_is_told_to_a_quiet_watch(clock):
    """A quiet watch that asked for it is told now and then how far the store is."""
    etcd = MemoryEtcd(progress_interval=60)
    async with etcd.watch(KEY, progress_notify=True) as stream:
        await etcd.put(b"b", b"1")
        assert WatchBatch(2) == await stream.receive()
        assert 120.0 == pytest.approx(trio.current_time())
        await etcd.put(b"a", b"1")
        assert 3 == (await stream.receive()).revision
        assert WatchBatch(3) == await stream.receive()
        # Left out at 180 s, as there had been an event; that of 240 s is believed with the next one.
        assert 300.0 == pytest.approx(trio.current_time())


async def test_progress_keeps_a_quiet_watch_above_compaction(clock):
    """A progress notification moves the resume point, so that compaction does not end the watch."""
    etcd = MemoryEtcd(progress_interval=60)
    node = etcd.node("a")
    async with node.watch(KEY, progress_notify=True) as stream:
        for _ in range(5):
            last = await etcd.put(b"b", b"1")
        await stream.receive()
        node.partition()
        await etcd.compact(last)
        node.heal()
        assert (await stream.receive()).created
        await etcd.put(b"a", b"1")
        assert last + 1 == (await stream.receive()).revision


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


async def test_slow_consumer_costs_no_memory(clock):
    """A watch that nobody reads holds no events: ten thousand revisions later it is as large as before."""
    etcd = MemoryEtcd()
    async with etcd.watch(KeyRange.everything()) as stream:
        for _ in range(10_000):
            await etcd.put(b"a", b"1")
        watcher = stream._watcher
        assert watcher is not None
        assert 10_000 > sys.getsizeof(watcher._pending)
        revisions = []
        while len(revisions) < 10_000:
            revisions += [event.revision for event in (await stream.receive()).events]
    assert list(range(2, 10_002)) == revisions


async def test_closed_watches_are_forgotten(clock):
    """A watch that was left is held by nobody."""
    etcd = MemoryEtcd()
    for _ in range(10):
        async with etcd.watch(KEY), etcd.watch(KeyRange.everything()):
            pass
    gc.collect()
    assert ({}, {}) == (etcd.store._watchers._by_key, etcd.store._watchers._by_range)


async def test_watch_that_was_left_is_closed(clock):
    """A watch whose block was left delivers nothing any more, and says so."""
    etcd = MemoryEtcd()
    async with etcd.watch(KEY) as stream:
        await etcd.put(b"a", b"1")
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive()


async def test_snapshot_is_the_whole_state(clock):
    """A snapshot has the revisions, the keys and the leases."""
    etcd = MemoryEtcd()
    lease = (await etcd.lease_grant(60, lease=7)).lease
    await etcd.put(b"a", b"1")
    await etcd.put(b"a", b"2", lease=lease)
    await etcd.compact(3)
    snapshot = etcd.store.snapshot()
    assert (3, 3) == (snapshot.revision, snapshot.compact_revision)
    assert (KeyValue(b"a", b"2", 2, 3, 2, 7),) == snapshot.kvs
    assert ((7, 60, (b"a",)),) == snapshot.leases
