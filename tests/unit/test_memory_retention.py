"""What the in-memory etcd remembers: compaction forgets, by hand or by itself, and who keeps up loses nothing."""

from __future__ import annotations

import pytest

from etcd_infra import open_coordinator
from etcd_infra._backends.memory_store import Store
from etcd_infra._etcd.model import KeyRange, Put, Range, Txn, WatchRequest
from etcd_infra.errors import CompactedError
from etcd_infra.testing import MemoryEtcd

KEY = KeyRange.one(b"a")
PUT = Txn(success=(Put(b"a", b"v"),))


def put(store: Store, times: int) -> None:
    """Write the key so many times."""
    for _ in range(times):
        store.txn(PUT, 0.0)


def versions(store: Store) -> int:
    """Count the states of the key that are remembered."""
    return len(store._keys._states[b"a"])


def drained(watcher) -> list[int]:
    """Poll all there is; return the events' revisions."""
    revisions: list[int] = []
    while (answer := watcher.poll(0.0)) is not None:
        assert not answer.canceled
        revisions += [event.revision for event in answer.events]
    return revisions


def test_compaction_forgets():
    """What was before the compaction revision is gone for good; the revisions go on as if nothing had been."""
    store = Store()
    put(store, 9)
    store.compact(8, 0.0)
    assert [8, 9, 10] == [commit.revision for commit in store.history.commits]
    assert (3, 10) == (versions(store), store.revision)
    put(store, 1)
    assert [11] == [commit.revision for commit in store.history.between(11, 11)]
    store.compact(11, 0.0)
    assert [11] == [commit.revision for commit in store.history.commits]
    assert 1 == versions(store)


def test_compaction_of_the_beginning_forgets_nothing():
    """No commit is before revision 2."""
    store = Store()
    put(store, 1)
    for revision in (0, 1, 2):
        store.compact(revision, 0.0)
        assert (1, 2) == (len(store.history.commits), store.revision)


def test_forgotten_commits_are_not_overlooked():
    """Who asks for commits that were forgotten is told so, not given fewer."""
    store = Store()
    put(store, 9)
    store.compact(8, 0.0)
    with pytest.raises(LookupError, match="revisions 5 to 7 were forgotten"):
        store.history.between(5, 10)


async def test_checker_keeps_everything(autojump_clock):
    """Asked to, the etcd keeps every commit; to its clients the compaction is one all the same."""
    etcd = MemoryEtcd(keep_history=True, auto_compact_revisions=3)
    for _ in range(20):
        last = await etcd.put(b"a", b"1")
    await etcd.compact(last)
    assert list(range(2, last + 1)) == [commit.revision for commit in etcd.store.history.between(2, last)]
    with pytest.raises(CompactedError):
        await etcd.range(Range(KEY, revision=last - 1))


def test_automatic_compaction_leaves_what_was_asked_for():
    """Once twice as many revisions have gathered as are to be left, the older half goes."""
    store = Store(auto_compact_revisions=10)
    put(store, 18)
    assert (19, 0) == (store.revision, store.compact_revision)
    put(store, 1)
    assert (20, 10) == (store.revision, store.compact_revision)
    put(store, 9)
    assert (29, 10) == (store.revision, store.compact_revision)
    put(store, 1)
    assert (30, 20) == (store.revision, store.compact_revision)
    assert list(range(20, 31)) == [commit.revision for commit in store.history.commits]


@pytest.mark.parametrize("puts", [45_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_long_life_needs_bounded_memory(puts):
    """After any number of writes as little is remembered as before; watches that keep up saw them all."""
    store = Store(auto_compact_revisions=1_000)
    polled_often, polled_seldom = (store.watch(WatchRequest(KEY), 0.0) for _ in range(2))
    often, seldom = [], []
    most = (0, 0)
    for number in range(puts // 100):
        put(store, 100)
        often += drained(polled_often)
        if number % 9 == 8:
            seldom += drained(polled_seldom)
        most = max(most[0], len(store.history.commits)), max(most[1], versions(store))
    assert list(range(2, puts + 2)) == often == seldom + drained(polled_seldom)
    assert max(most) <= 2_000
    assert puts + 1 == store.revision


def test_watch_that_lags_is_ended():
    """A watch that is read too late is told that it was compacted, and how far; one in step goes on."""
    store = Store(auto_compact_revisions=1_000)
    late, in_step = (store.watch(WatchRequest(KEY), 0.0) for _ in range(2))
    assert late.poll(0.0).created
    for _ in range(40):
        put(store, 100)
        drained(in_step)
    answer = late.poll(0.0)
    assert (True, store.compact_revision) == (answer.canceled, answer.compact_revision)
    put(store, 1)
    assert [4_002] == drained(in_step)


def test_unread_watch_in_step_survives_compaction():
    """What was handed to a watch before the compaction can still be read from it, as from a real one."""
    store = Store()
    watcher = store.watch(WatchRequest(KEY, prev_kv=True), 0.0)
    put(store, 500)
    store.compact(store.revision, 0.0)
    assert list(range(2, 502)) == drained(watcher)


async def test_lagging_stream_raises(autojump_clock):
    """A client that lags behind automatic compaction gets `CompactedError`, as from a real etcd."""
    etcd = MemoryEtcd(auto_compact_revisions=1_000)
    async with etcd.watch(KEY) as stream:
        for _ in range(4_000):
            await etcd.put(b"a", b"1")
        with pytest.raises(CompactedError) as caught:
            await stream.receive()
    assert etcd.store.compact_revision == caught.value.compact_revision


async def test_nothing_is_compacted_unless_asked(autojump_clock):
    """A test's etcd remembers everything by default."""
    etcd = MemoryEtcd()
    for _ in range(100):
        await etcd.put(b"a", b"1")
    assert (0, 100) == (etcd.store.compact_revision, len(etcd.store.history.commits))


async def test_embedded_etcd_compacts_itself(autojump_clock):
    """The etcd behind ``memory://`` lives as long as its service does, so it compacts itself."""
    async with open_coordinator("memory://", namespace="") as infra:
        for _ in range(20_000):
            await infra.backend.put(b"a", b"1")
        with pytest.raises(CompactedError):
            await infra.backend.range(Range(KEY, revision=2))
