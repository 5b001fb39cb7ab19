"""Where a watch stands when a server misbehaves."""

from __future__ import annotations

from etcd_infra._backends.watch_cursor import WatchCursor
from etcd_infra._etcd.model import Event, KeyRange, KeyValue, WatchRequest, WatchResponse


def put(revision):
    """A change of one key."""
    return Event.put(KeyValue(b"k", b"v", 1, revision, revision))


def test_events_from_the_past_are_dropped_and_counted():
    """What was delivered before is not delivered again, alone or mixed with news, and is counted."""
    cursor = WatchCursor(WatchRequest(KeyRange.one(b"k"), 1))
    cursor.feed(WatchResponse(revision=1, created=True))
    assert (put(2), put(3)) == cursor.feed(WatchResponse(revision=3, events=(put(2), put(3)))).events
    assert None is cursor.feed(WatchResponse(revision=3, events=(put(2), put(3))))
    assert (put(4),) == cursor.feed(WatchResponse(revision=4, events=(put(3), put(4)))).events
    assert 3 == cursor.dropped
    assert 5 == cursor.next_revision
