"""
Where a watch stands: a server's answers in, whole revisions out, and where to go on after a break.

Pure; both the in-memory etcd and the network share it, so the in-memory one proves it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from etcd_infra._backends.status import watch_error
from etcd_infra._etcd.model import Event, WatchBatch, WatchRequest, WatchResponse
from etcd_infra.errors import CompactedError

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_watch(request: WatchRequest) -> None:
    """
    Refuse what a server would misunderstand.

    Raises:
        ValueError: an empty key (etcd would watch the key of one zero byte), an inverted range, a negative
            revision (which harms other watchers of old servers).
    """
    if not request.range.key:
        msg = "a watch needs a key; watch everything with KeyRange.everything()"
        raise ValueError(msg)
    if request.range.end not in {b"", b"\0"} and request.range.end <= request.range.key:
        msg = f"a watch's range must not be empty: {request.range}"
        raise ValueError(msg)
    if request.start_revision < 0:
        msg = f"a watch must not start at a negative revision: {request.start_revision}"
        raise ValueError(msg)


class WatchCursor:
    """
    The resume point of one watch.

    `next_revision` is the first revision that was not yet delivered (0: not known before the first
    creation). It moves only with whole revisions: never with the header of an event answer, which may be
    far ahead of its events, and never in the middle of fragments. A notification moves it when the next
    one comes, and is delivered then: one that has overtaken events thus loses none, even if the connection
    breaks before they come.
    """

    __slots__ = (
        "_delivered",
        "_fragments",
        "_from_now",
        "_notified",
        "_request",
        "creations",
        "dropped",
        "next_revision",
        "revision",
    )

    def __init__(self, request: WatchRequest, *, from_now: bool = False) -> None:
        check_watch(request)
        self._request = request
        self._from_now = from_now
        self._fragments: list[Event] = []
        self.next_revision = request.start_revision
        self._delivered = request.start_revision - 1
        self._notified = 0
        self.revision = 0
        self.creations = 0
        self.dropped = 0

    def request(self) -> WatchRequest:
        """Say how to create the watch (anew), at its resume point."""
        self._fragments.clear()
        self._notified = 0
        return replace(self._request, start_revision=0 if self._from_now else self.next_revision)

    @property
    def may_be_reset(self) -> bool:
        """
        Whether the last creation was answered by a store behind what this watch has seen.

        Either a member lags, or the store was restored; a linearizable read tells.
        """
        return self.creations > 1 and self.revision < self.next_revision - 1

    def feed(self, response: WatchResponse) -> WatchBatch | None:
        """
        Take one answer in; return a batch when whole revisions are complete.

        Raises:
            CompactedError, AccessDeniedError, EtcdError: the server canceled the watch.
        """
        if response.canceled:
            raise self._canceled(response)
        if response.created:
            return self._created(response)
        if response.events or self._fragments:
            return self._events(response)
        return self._believed(response.revision)

    def _believed(self, revision: int) -> WatchBatch | None:
        # etcd: a requested notification (for the whole stream) overtakes events on old servers (#15220) and
        # must not be fed in here; that a periodic one never does is disputed there.
        believed, self._notified = self._notified, revision
        if not believed:
            return None
        self.next_revision = max(self.next_revision, believed + 1)
        return WatchBatch(believed)

    def _canceled(self, response: WatchResponse) -> Exception:
        # etcd: neither reason nor header is filled in when the start is compacted.
        if response.compact_revision:
            return CompactedError(
                f"the watch's next revision {self.next_revision} is compacted; the oldest left is "
                f"{response.compact_revision}",
                response.compact_revision,
            )
        return watch_error(response.reason)

    def _created(self, response: WatchResponse) -> WatchBatch:
        self.creations += 1
        self.revision = response.revision
        if self._from_now or not self.next_revision:
            self.next_revision = response.revision + 1
            self._delivered = response.revision
        return WatchBatch(response.revision, created=True)

    def _events(self, response: WatchResponse) -> WatchBatch | None:
        self._fragments.extend(response.events)
        if response.fragment:
            return None
        events, self._fragments = self._fragments, []
        # etcd: duplicates and events from the past are server faults (#15271): never deliver those.
        fresh = self._fresh(events)
        self.dropped += len(events) - len(fresh)
        if not fresh:
            return None
        self._delivered = fresh[-1].revision
        self._notified = 0
        self.next_revision = max(self.next_revision, self._delivered + 1)
        return WatchBatch(fresh[-1].revision, tuple(fresh))

    def _fresh(self, events: Sequence[Event]) -> list[Event]:
        return [event for event in events if event.revision > self._delivered]
