"""
The watches on the in-memory etcd.

Pure and pulled: a watch makes its answers when it is asked. As in etcd a watch is either *in step* (each
commit is handed to it as it happens, a thousand at most, so it survives compaction) or *behind* (it catches
up from history, up to 1,000 revisions at a time, unless that was compacted).

Source: etcd `server/storage/mvcc/watchable_store.go`, `server/etcdserver/api/v3rpc/watch.go`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from etcd_infra._etcd.model import Event, EventKind, WatchResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from etcd_infra._backends.memory_history import Commit, History
    from etcd_infra._etcd.model import WatchRequest

CATCH_UP_REVISIONS: Final = 1_000
IN_STEP_LIMIT: Final = 1_024
FRAGMENT_BYTES: Final = 1536 * 1024
PROGRESS_SECONDS: Final = 600.0


class Watcher:
    """One watch; `poll` gives the server's next answer about it, if there is one."""

    __slots__ = (
        "_answers",
        "_hub",
        "_in_step",
        "_next",
        "_pending",
        "_progress_at",
        "_quiet",
        "notify",
        "request",
    )

    def __init__(self, hub: Watchers, request: WatchRequest, now: float) -> None:
        history = hub.history
        self.request = request
        self.notify: Callable[[], None] | None = None
        self._hub = hub
        self._next = request.start_revision or history.revision + 1
        self._pending: deque[Commit] = deque()
        self._answers: deque[WatchResponse] = deque((WatchResponse(history.revision, created=True),))
        self._in_step = self._next > history.revision
        self._progress_at = now + hub.progress_seconds
        self._quiet = True

    @property
    def next_progress(self) -> float | None:
        """When `poll` may have a progress notification, if it was asked for."""
        return self._progress_at if self.request.progress_notify else None

    @property
    def in_step(self) -> bool:
        """Whether changes are noted for this watch as they happen."""
        return self._in_step

    def poll(self, now: float) -> WatchResponse | None:
        """Return the next answer, or None if there is none yet; `notify` is called when that changes."""
        if not self._answers:
            self._fetch(now)
        return self._answers.popleft() if self._answers else None

    def close(self) -> None:
        """End the watch; it answers nothing any more."""
        self._hub.discard(self)
        self._answers.clear()
        self._pending.clear()
        self._in_step = False
        self.notify = None

    def note(self, commit: Commit) -> None:
        """Take note of a commit that concerns this watch."""
        if commit.revision < self._next:
            return
        self._pending.append(commit)
        if len(self._pending) > IN_STEP_LIMIT:
            # etcd: a consumer that does not keep up has to catch up from history ("victims").
            self._next = self._pending[0].revision
            self._pending.clear()
            self._in_step = False
            self._hub.discard(self)
        if self.notify is not None:
            self.notify()

    def _fetch(self, now: float) -> None:
        while not self._answers:
            if self._pending:
                commit = self._pending.popleft()
                self._next = commit.revision + 1
                self._answer(commit.revision, [*self._events((commit,))])
            elif self._in_step:
                break
            else:
                self._catch_up()
        if not self._answers:
            self._progress(now)

    def _catch_up(self) -> None:
        history = self._hub.history
        if self._next < history.compact_revision:
            # etcd: neither the header's revision nor a reason is filled in; the watch is over.
            compacted = history.compact_revision
            self.close()
            self._answers.append(WatchResponse(canceled=True, compact_revision=compacted))
            return
        last = self._last_of_batch()
        events = [*self._events(history.between(self._next, last))]
        self._next = last + 1
        if self._next > history.revision:
            self._in_step = True
            self._hub.add(self)
        # etcd: the header says how far the store is, not how far the events go.
        self._answer(history.revision, events)

    def _last_of_batch(self) -> int:
        """Say how far one batch goes: 1,000 revisions that concern this watch."""
        history = self._hub.history
        found = 0
        for commit in history.between(self._next, history.revision):
            found += self.concerned(commit)
            if found == CATCH_UP_REVISIONS:
                return commit.revision
        return history.revision

    def concerned(self, commit: Commit) -> bool:
        """Say whether a commit changed a watched key."""
        watched = self.request.range
        return any(event.kv.key in watched for event in commit.events)

    def _events(self, commits: Iterable[Commit]) -> Iterator[Event]:
        request = self.request
        for commit in commits:
            for event in commit.events:
                if event.kv.key in request.range and not self._filtered(event):
                    yield self._shown(event)

    def _filtered(self, event: Event) -> bool:
        return self.request.no_delete if event.kind is EventKind.DELETE else self.request.no_put

    def _shown(self, event: Event) -> Event:
        if event.prev_kv is None:
            return event
        # etcd: what was there before is read at the revision before, when the event is sent.
        known = self._in_step or event.revision - 1 >= self._hub.history.compact_revision
        return event if self.request.prev_kv and known else replace(event, prev_kv=None)

    def _answer(self, revision: int, events: list[Event]) -> None:
        if not events:
            return  # etcd: when the filters leave nothing, nothing is sent.
        self._quiet = False
        pieces = list(_fragments(events))
        for piece in pieces[:-1]:
            self._answers.append(WatchResponse(revision, tuple(piece), fragment=True))
        self._answers.append(WatchResponse(revision, tuple(pieces[-1])))

    def _progress(self, now: float) -> None:
        if not self.request.progress_notify or now < self._progress_at:
            return
        missed = int((now - self._progress_at) // self._hub.progress_seconds)
        self._progress_at += (missed + 1) * self._hub.progress_seconds
        # etcd: left out when there were events since the last one, and for a watch that is ahead.
        if self._quiet and self._next <= self._hub.history.revision + 1:
            self._answers.append(WatchResponse(self._hub.history.revision))
        self._quiet = True


def _fragments(events: list[Event]) -> Iterator[list[Event]]:
    piece: list[Event] = []
    size = 0
    for event in events:
        prev = event.prev_kv
        more = len(event.kv.key) + len(event.kv.value) + (len(prev.key) + len(prev.value) if prev else 0)
        if piece and size + more >= FRAGMENT_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(event)
        size += more
    yield piece


class Watchers:
    """All watches that are in step, found by key."""

    def __init__(self, history: History, progress_seconds: float = PROGRESS_SECONDS) -> None:
        self.history = history
        self.progress_seconds = progress_seconds
        # Dictionaries as ordered sets: the order in which watches are told must not depend on addresses.
        self._by_key: dict[bytes, dict[Watcher, None]] = {}
        self._by_range: dict[Watcher, None] = {}

    def open(self, request: WatchRequest, now: float) -> Watcher:
        """Create a watch; its first answer says so."""
        watcher = self.make(request, now)
        if watcher.in_step:
            self.add(watcher)
        return watcher

    def make(self, request: WatchRequest, now: float) -> Watcher:
        """Make a watch of this store's kind."""
        return Watcher(self, request, now)

    def add(self, watcher: Watcher) -> None:
        """Tell a watch about commits from now on."""
        watched = watcher.request.range
        if watched.end:
            self._by_range[watcher] = None
        else:
            self._by_key.setdefault(watched.key, {})[watcher] = None

    def discard(self, watcher: Watcher) -> None:
        """Tell a watch nothing more."""
        watched = watcher.request.range
        if watched.end:
            self._by_range.pop(watcher, None)
        elif watched.key in self._by_key:
            self._by_key[watched.key].pop(watcher, None)
            if not self._by_key[watched.key]:
                del self._by_key[watched.key]

    def publish(self, commit: Commit) -> None:
        """Note a commit for every watch that it concerns."""
        concerned: dict[Watcher, None] = {}
        if self._by_key:
            for event in commit.events:
                concerned |= self._by_key.get(event.kv.key, {})
        for watcher in self._by_range:
            if watcher.concerned(commit):
                concerned[watcher] = None
        for watcher in concerned:
            watcher.note(commit)
