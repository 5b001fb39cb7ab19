"""The oracle of watches, on deliveries made by hand: good ones pass, bad ones are found under their names."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from etcd_infra._backends.memory_store import Store
from etcd_infra._etcd.model import DeleteRange, Event, EventKind, KeyRange, KeyValue, Put, Txn, WatchBatch
from etcd_infra.testing import Watched, check_watch

KEYS = KeyRange.prefix(b"k")


def truth():
    """Make a history: 2 puts k1; 3 puts x and k2; 4 puts k1 again; 5 deletes k2; 6 puts z, k3, k2; 7 puts x."""
    store = Store(keep_history=True)
    for success in (
        (Put(b"k1", b"a"),),
        (Put(b"x", b"b"), Put(b"k2", b"c")),
        (Put(b"k1", b"d"),),
        (DeleteRange(KeyRange.one(b"k2")),),
        (Put(b"z", b""), Put(b"k3", b"e"), Put(b"k2", b"f")),
        (Put(b"x", b"g"),),
    ):
        store.txn(Txn(success=success), 0.0)
    return store.history.commits


COMMITS = truth()


def events(revision, *, prev=False, only=None):
    """Return what a watch on k… has to deliver of one revision."""
    found = [
        event for event in COMMITS[revision - 2].events if event.key in KEYS and (only is None or only(event))
    ]
    return tuple(event if prev else replace(event, prev_kv=None) for event in found)


def batch(*revisions, prev=False):
    """Make the right batch of some revisions."""
    return WatchBatch(revisions[-1], tuple(event for each in revisions for event in events(each, prev=prev)))


CREATED = WatchBatch(4, created=True)
ALL = [batch(2), batch(3), batch(4), batch(5), batch(6)]


def watched(*batches, start=2, **options):
    """Make a watch on k…."""
    return Watched(KEYS, start, batches, **options)


def changed(revision, **fields):
    """Make a batch whose first event's key-value is changed."""
    first, *rest = events(revision)
    return WatchBatch(revision, (replace(first, kv=replace(first.kv, **fields)), *rest))


puts = [WatchBatch(each, events(each, only=lambda event: not event.is_delete)) for each in (2, 3, 4, 6)]
GOOD = {
    "nothing yet": watched(),
    "all": watched(*ALL),
    "together": watched(batch(2, 3, 4, 5, 6)),
    "in two": watched(batch(2, 3), batch(4, 5, 6)),
    "not all yet": watched(*ALL[:3]),
    "from the middle": watched(*ALL[2:], start=4),
    "made anew": watched(*ALL[:2], CREATED, *ALL[2:]),
    "made anew twice": watched(ALL[0], CREATED, CREATED, *ALL[1:]),
    "progress": watched(*ALL, WatchBatch(7)),
    "progress in between": watched(*ALL[:2], WatchBatch(3), *ALL[2:]),
    "no deletes": watched(*puts, no_delete=True),
    "no puts": watched(batch(5), no_put=True),
    "with what was before": watched(*(batch(each, prev=True) for each in range(2, 7)), prev_kv=True),
    "before is compacted": watched(*(batch(each) for each in range(2, 7)), prev_kv=True, compacted=6),
    "gap that is told": watched(*ALL[:2], gap_at=6, compacted=6),
    "compacted behind it": watched(*ALL, compacted=6),
    "nothing of it was compacted": watched(*ALL, start=2, compacted=7),
}
swapped = WatchBatch(6, tuple(reversed(events(6))))
BAD = {
    "other key": (watched(WatchBatch(2, (Event.put(KeyValue(b"x", b"b", 3, 3, 1)),))), "filter"),
    "never happened": (watched(WatchBatch(2, (Event.put(KeyValue(b"k9", b"", 2, 2, 1)),))), "filter"),
    "wrong value": (watched(changed(2, value=b"z")), "filter"),
    "delete that was a put": (watched(WatchBatch(2, (Event.deleted(b"k1", mod_revision=2),))), "filter"),
    "delete though filtered": (watched(*ALL, no_delete=True), "filter"),
    "put though filtered": (watched(*ALL, no_put=True), "filter"),
    "of another revision": (watched(ALL[0], changed(3, mod_revision=4)), "filter"),
    "going back": (watched(ALL[0], ALL[2], ALL[1]), "ordered"),
    "going back within": (watched(WatchBatch(3, (*events(3), *events(2)))), "ordered"),
    "order within a revision": (watched(*ALL[:4], swapped), "ordered"),
    "twice": (watched(ALL[0], ALL[0]), "unique"),
    "twice in one batch": (watched(WatchBatch(2, events(2) * 2)), "unique"),
    "twice after being made anew": (watched(*ALL[:2], CREATED, ALL[1]), "unique"),
    "half a revision": (watched(*ALL[:4], WatchBatch(6, events(6)[:1])), "atomic"),
    "other half": (watched(*ALL[:4], WatchBatch(6, events(6)[1:])), "atomic"),
    "two halves": (watched(*ALL[:4], WatchBatch(6, events(6)[:1]), WatchBatch(6, events(6)[1:])), "atomic"),
    "one left out": (watched(*ALL[:2], *ALL[3:]), "reliable"),
    "first left out": (watched(*ALL[1:]), "reliable"),
    "delete left out": (watched(*ALL[:3], ALL[4]), "reliable"),
    "left out within a batch": (watched(batch(2, 4)), "reliable"),
    "progress instead of events": (watched(ALL[0], WatchBatch(4)), "reliable"),
    "lost while made anew": (watched(*ALL[:2], CREATED, *ALL[3:]), "resumable"),
    "lost while made anew at once": (watched(CREATED, *ALL[1:]), "resumable"),
    "after its notification": (watched(ALL[0], WatchBatch(5), batch(3)), "bookmarkable"),
    "created though changed": (watched(*ALL[:2], changed(4, version=1, create_revision=4)), "is-create"),
    "changed though created": (watched(changed(2, version=2, create_revision=1)), "is-create"),
    "wrong state before": (
        watched(
            WatchBatch(4, (replace(events(4, prev=True)[0], prev_kv=KeyValue(b"k1", b"q", 2, 2, 1)),)), start=4
        ),
        "prev-kv",
    ),
    "state before though new": (
        watched(WatchBatch(2, (replace(events(2)[0], prev_kv=KeyValue(b"k1", b"q", 1, 1, 1)),))),
        "prev-kv",
    ),
    "lacks the state before": (watched(*ALL, prev_kv=True), "prev-kv"),
    "gap that is not told": (watched(*ALL[:2], compacted=6), "gap"),
    "gap that is none": (watched(*ALL[:2], gap_at=4, compacted=4), "gap"),
    "gap before anything, not told": (watched(compacted=5), "gap"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_delivery_passes(name):
    """What a watch may deliver has no violation."""
    assert [] == check_watch(COMMITS, GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_bad_delivery_is_found(name):
    """What a watch must not deliver is found, under the name of the promise."""
    delivered, promise = BAD[name]
    assert f"watch {promise}" in {violation.invariant for violation in check_watch(COMMITS, delivered)}


def test_history_is_what_it_says():
    """The history that the tables stand on has six commits, and one of them deletes."""
    assert [2, 3, 4, 5, 6, 7] == [commit.revision for commit in COMMITS]
    assert EventKind.DELETE == COMMITS[3].events[0].kind
