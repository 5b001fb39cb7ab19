"""The in-memory etcd with the bugs of real servers, and with what happens to a cluster as a whole."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra._etcd.model import KeyRange, Put, Range, Txn
from etcd_infra.errors import (
    AccessDeniedError,
    LeaseNotFoundError,
    OutcomeUnknownError,
    StoreResetError,
    UnavailableError,
)
from etcd_infra.testing import MemoryEtcd, ServerBug
from tests.conftest import open_infra

EVERYTHING = KeyRange.everything()


def buggy(*bugs, **options):
    """Make an etcd with these bugs."""
    return MemoryEtcd(bugs=bugs, random=random.Random(1), **options)


async def raw_answers(etcd, number, **options):
    """Return a watch's answers as the server sends them, after so many puts."""
    from etcd_infra._etcd.model import WatchRequest

    watcher = etcd.start_watcher(WatchRequest(EVERYTHING, **options))
    answers = []
    for _ in range(number):
        await etcd.put(b"k", b"")
        while (answer := watcher.poll(trio.current_time())) is not None:
            answers.append(answer)
    return [answer for answer in answers if answer.events]


async def test_no_bug_by_default(autojump_clock):
    """Without bugs switched on, each of 50 events comes once, in order."""
    answers = await raw_answers(MemoryEtcd(), 50)
    assert [*range(2, 52)] == [event.revision for answer in answers for event in answer.events]


async def test_duplicate_events(autojump_clock):
    """With DUPLICATE_EVENTS some events come twice in a row, and none is out of order."""
    revisions = [answer.revision for answer in await raw_answers(buggy(ServerBug.DUPLICATE_EVENTS), 50)]
    assert sorted(revisions) == revisions
    assert 50 < len(revisions)
    assert set(range(2, 52)) == set(revisions)


async def test_past_events(autojump_clock):
    """With PAST_EVENTS a watch goes back in time now and then."""
    revisions = [answer.revision for answer in await raw_answers(buggy(ServerBug.PAST_EVENTS), 50)]
    assert sorted(revisions) != revisions


@pytest.mark.parametrize("bug", [ServerBug.DUPLICATE_EVENTS, ServerBug.PAST_EVENTS])
async def test_watch_delivers_each_event_once_all_the_same(bug, autojump_clock):
    """A backend's watch drops what comes twice or from the past."""
    etcd = buggy(bug)
    async with etcd.watch(EVERYTHING, start_revision=2) as stream:
        seen = []
        for number in range(40):
            await etcd.put(b"k", b"%d" % number)
            seen += [event.revision for event in (await stream.receive()).events]
    assert [*range(2, 42)] == seen


async def test_early_progress(autojump_clock):
    """With EARLY_PROGRESS a notification overtakes events, on a watch that asked for progress."""
    from etcd_infra._etcd.model import WatchRequest

    etcd = buggy(ServerBug.EARLY_PROGRESS)
    overtaken = 0
    for _ in range(20):
        watcher = etcd.start_watcher(WatchRequest(EVERYTHING, progress_notify=True))
        watcher.poll(0.0)
        revision = await etcd.put(b"k", b"")
        answer = watcher.poll(0.0)
        overtaken += answer is not None and not answer.events and answer.revision == revision
    assert 0 < overtaken < 20


async def test_created_and_canceled(autojump_clock):
    """With CREATED_CANCELED a watch's creation is refused now and then, and the caller is told at once."""
    etcd = buggy(ServerBug.CREATED_CANCELED)
    refused = 0
    for _ in range(20):
        try:
            async with etcd.watch(EVERYTHING):
                pass
        except AccessDeniedError:
            refused += 1
    assert 0 < refused < 20


async def test_spurious_revoke(autojump_clock):
    """With SPURIOUS_REVOKE a renewal succeeds, and the lease is gone all the same."""
    etcd = buggy(ServerBug.SPURIOUS_REVOKE)
    gone = 0
    for number in range(1, 21):
        await etcd.lease_grant(10, lease=number)
        await etcd.put(b"k", b"", lease=number)
        assert 10 == (await etcd.lease_keep_alive(number)).ttl
        gone += await etcd.get(b"k") is None
        if number in await etcd.lease_list():
            await etcd.lease_revoke(number)
    assert 0 < gone < 20


async def test_renewed_though_revoked(autojump_clock):
    """With RENEWED_THOUGH_REVOKED a renewal of a lease that was revoked may succeed; one never granted does not."""
    etcd = buggy(ServerBug.RENEWED_THOUGH_REVOKED)
    await etcd.lease_grant(10, lease=7)
    await etcd.lease_keep_alive(7)
    await etcd.lease_revoke(7)
    answers = [(await etcd.lease_keep_alive(7)).ttl for _ in range(20)]
    assert {0, 10} == set(answers)
    with pytest.raises(LeaseNotFoundError):
        await etcd.put(b"k", b"", lease=7)
    assert {0} == {(await etcd.lease_keep_alive(8)).ttl for _ in range(20)}


@pytest.mark.parametrize("within", [False, True], ids=["range", "read-only Txn"])
async def test_stale_read(within, autojump_clock):
    """With STALE_READ a linearizable read may show an older revision, and says so in its header."""
    etcd = buggy(ServerBug.STALE_READ)
    for number in range(10):
        await etcd.put(b"k", b"%d" % number)
    read = Range(KeyRange.one(b"k"))
    seen = set()
    for _ in range(20):
        if within:
            answer = await etcd.txn(Txn(success=(read,)))
            seen.add((answer.revision, answer.results[0].kvs[0].mod_revision))
        else:
            answer = await etcd.range(read)
            seen.add((answer.revision, answer.kvs[0].mod_revision))
    assert {(11, 11), (6, 6)} == seen


async def test_lost_delete(autojump_clock):
    """With LOST_DELETE a watch from the compaction revision on lacks its DELETE now and then."""
    etcd = buggy(ServerBug.LOST_DELETE)
    await etcd.put(b"k", b"")
    deleted = await etcd.delete(KeyRange.one(b"k"))
    await etcd.compact(deleted)
    await etcd.put(b"k", b"")
    first = set()
    for _ in range(20):
        async with etcd.watch(EVERYTHING, start_revision=deleted) as stream:
            first.add((await stream.receive()).events[0].is_delete)
    assert {False, True} == first


async def test_waiter_is_not_misled_by_stale_reads(autojump_clock):
    """A waiter that reads an older revision looks again: it is granted its turn within a second, 50 times of 50."""
    etcd = buggy(ServerBug.STALE_READ)
    async with open_infra(etcd.node("one")) as one, open_infra(etcd.node("two"), seed=2) as two:
        for _ in range(50):
            hold = await one.lock("job").acquire()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(take_in_time, two, hold)
                await trio.sleep(0.5)
                await hold.release()


async def take_in_time(infra, held):
    """Take the lock within a second after its holder has let go of it."""
    with trio.fail_after(1.5):
        async with infra.lock("job") as hold:
            assert held.token < hold.token


# ── what happens to a cluster as a whole ────────────────────────────────────────────────────────


async def test_restore_goes_back(autojump_clock):
    """A restored store has the backup's revision, keys and leases, with their full time; what came later is gone."""
    etcd = MemoryEtcd()
    await etcd.lease_grant(10, lease=7)
    await etcd.put(b"old", b"", lease=7)
    await trio.sleep(6)
    backup = etcd.back_up()
    await etcd.put(b"new", b"")
    etcd.restore(backup)
    assert 2 == etcd.store.revision
    assert [b"old"] == [kv.key for kv in (await etcd.range(Range(EVERYTHING))).kvs]
    assert 10 == (await etcd.lease_time_to_live(7)).ttl
    await trio.sleep(10)
    assert await etcd.get(b"old") is None


async def test_backup_does_not_change(autojump_clock):
    """A backup can be restored twice, whatever was written in between."""
    etcd = MemoryEtcd()
    await etcd.put(b"k", b"1")
    backup = etcd.back_up()
    for value in (b"2", b"3"):
        await etcd.put(b"k", value)
        etcd.restore(backup)
        assert b"1" == (await etcd.get(b"k")).value


@pytest.mark.parametrize("way", ["restore", "wipe"])
async def test_watch_across_a_restore_is_told(way, autojump_clock):
    """A watch whose next revision lies in the future of a restored store raises `StoreResetError`, and is not mute."""
    etcd = MemoryEtcd()
    backup = etcd.back_up()
    async with etcd.watch(EVERYTHING) as stream:
        await etcd.put(b"k", b"")
        assert (await stream.receive()).events
        if way == "restore":
            etcd.restore(backup)
        else:
            etcd.wipe()
        with trio.fail_after(1), pytest.raises(StoreResetError):
            await stream.receive()


async def test_wiped_store_is_empty(autojump_clock):
    """A wiped store is at revision 1, without keys and leases; a session on it is lost."""
    etcd = MemoryEtcd()
    async with open_infra(etcd.node("one"), ttl=10) as infra:
        session = infra.session
        await infra.lock("job").acquire()
        etcd.wipe()
        assert 1 == etcd.store.revision
        assert () == await etcd.lease_list()
        with trio.fail_after(5):
            await session.wait_lost()


async def test_leader_change_refreshes_leases(autojump_clock):
    """After a leader change a lease has its full time again; a watch goes on without losing anything."""
    etcd = MemoryEtcd()
    await etcd.lease_grant(10, lease=7)
    async with etcd.watch(EVERYTHING) as stream:
        await trio.sleep(8)
        etcd.change_leader()
        assert 10 == (await etcd.lease_time_to_live(7)).ttl
        await etcd.put(b"k", b"")
        assert (await stream.receive()).created
        assert (await stream.receive()).events


async def test_cut_requests(autojump_clock):
    """With only requests cut, nothing is applied, and a watch that exists goes on."""
    etcd = MemoryEtcd()
    node = etcd.node("one")
    async with node.watch(EVERYTHING) as stream:
        node.partition(answers=False)
        with pytest.raises(OutcomeUnknownError):
            await node.put(b"mine", b"")
        assert await etcd.get(b"mine") is None
        await etcd.put(b"theirs", b"")
        assert [b"theirs"] == [event.key for event in (await stream.receive()).events]


async def test_cut_answers(autojump_clock):
    """With only answers cut, a write is applied without an answer, a read has none, and events wait for the healing."""
    etcd = MemoryEtcd()
    node = etcd.node("one")
    async with node.watch(EVERYTHING) as stream:
        node.partition(requests=False)
        with pytest.raises(OutcomeUnknownError):
            await node.put(b"mine", b"")
        assert await etcd.get(b"mine") is not None
        with pytest.raises(UnavailableError):
            await node.get(b"mine")
        with trio.move_on_after(20) as waiting:
            await stream.receive()
        assert waiting.cancelled_caught
        node.heal()
        assert [b"mine"] == [event.key for event in (await stream.receive()).events]


def test_partition_needs_a_direction():
    """A partition that cuts nothing is refused."""
    with pytest.raises(ValueError, match="cuts"):
        MemoryEtcd().node("one").partition(requests=False, answers=False)


async def test_holder_is_not_misled_by_stale_reads(autojump_clock):
    """A holder whose key is read at an older revision keeps its lock."""
    etcd = buggy(ServerBug.STALE_READ)
    async with open_infra(etcd.node("one")) as infra:
        for _ in range(30):
            async with infra.lock("job") as hold:
                await etcd.txn(Txn(hold.fence.proof, (Put(b"data"),)))
                await trio.sleep(1)
