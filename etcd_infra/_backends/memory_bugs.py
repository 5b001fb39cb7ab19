"""
Bugs that real etcd servers have, or had, for the in-memory one: off by default, switched on one by one.

Each strikes at some of its opportunities, as the real ones do. What a client must withstand is told in
`docs/guarantees.md`: safety never rests on a read, a renewal's answer or an event alone.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from etcd_infra._backends.memory_store import Store
from etcd_infra._backends.memory_watch import PROGRESS_SECONDS, Watcher, Watchers
from etcd_infra._etcd.model import LeaseRenewal, Range, TxnResult, WatchResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from random import Random

    from etcd_infra._backends.memory_history import Commit, History
    from etcd_infra._etcd.model import Event, RangeResult, Txn, WatchRequest

_STALE_BY: Final = 5
_STRIKES: Final = 0.3


class ServerBug(StrEnum):
    """A bug of some etcd servers (etcd-io/etcd's numbers)."""

    DUPLICATE_EVENTS = "duplicate events"
    """A watch sends events twice (#15274)."""
    PAST_EVENTS = "past events"
    """A watch goes back in time, and sends what it sent before (#15271)."""
    EARLY_PROGRESS = "early progress"
    """A progress notification overtakes events, once before a watch is in step again (#15220)."""
    LOST_DELETE = "lost delete"
    """A watch that starts at the compaction revision lacks that revision's DELETEs (#18089, #19179)."""
    CREATED_CANCELED = "created and canceled"
    """A watch is created and canceled in one answer, with id 0 and "permission denied" (#14547)."""
    SPURIOUS_REVOKE = "spurious revoke"
    """A leader that was paused revokes leases that are being renewed (#15247)."""
    RENEWED_THOUGH_REVOKED = "renewed though revoked"
    """A renewal is answered with success although the lease was revoked (#20615)."""
    STALE_READ = "stale read"
    """A linearizable read shows an older revision (#20418). What writes or compares is not concerned."""


class Misbehaviour:
    """Which bugs are switched on, and whether one of them strikes now."""

    def __init__(self, bugs: Iterable[ServerBug], random: Random) -> None:
        self.bugs = frozenset(bugs)
        self.struck = 0
        self._random = random

    def strikes(self, bug: ServerBug) -> bool:
        """Draw whether `bug` strikes at this opportunity."""
        if bug not in self.bugs or self._random.random() >= _STRIKES:
            return False
        self.struck += 1
        return True


class BuggyStore(Store):
    """A store that has the bugs of `misbehaviour`; otherwise it is etcd as it should be."""

    def __init__(
        self,
        misbehaviour: Misbehaviour,
        *,
        min_ttl: int = 2,
        progress_seconds: float = PROGRESS_SECONDS,
        keep_history: bool = False,
        auto_compact_revisions: int = 0,
    ) -> None:
        self.misbehaviour = misbehaviour
        self._once_granted: dict[int, int] = {}
        super().__init__(
            min_ttl=min_ttl,
            progress_seconds=progress_seconds,
            keep_history=keep_history,
            auto_compact_revisions=auto_compact_revisions,
        )

    def _make_watchers(self, progress_seconds: float) -> Watchers:
        return _BuggyWatchers(self.history, progress_seconds, self.misbehaviour)

    def range(self, request: Range, now: float) -> RangeResult:
        """Read keys, perhaps as they were some revisions ago."""
        self.advance(now)
        stale = 0 if request.revision > 0 else self._stale_revision()
        if not stale:
            return super().range(request, now)
        return replace(super().range(replace(request, revision=stale), now), revision=stale)

    def txn(self, request: Txn, now: float) -> TxnResult:
        """Apply a Txn; one that only reads, perhaps as of some revisions ago."""
        self.advance(now)
        reads = [op for op in request.success if isinstance(op, Range) and not op.revision]
        if request.compare or not request.is_read_only or len(reads) < len(request.success):
            return super().txn(request, now)
        stale = self._stale_revision()
        if not stale:
            return super().txn(request, now)
        answers = [super(BuggyStore, self).range(replace(read, revision=stale), now) for read in reads]
        return TxnResult(succeeded=True, results=tuple(answers), revision=stale)

    def _stale_revision(self) -> int:
        """Draw whether a read is stale; return how old it is, or 0."""
        oldest = max(2, self.compact_revision, self.revision - _STALE_BY)
        return oldest if oldest < self.revision and self.misbehaviour.strikes(ServerBug.STALE_READ) else 0

    def lease_keep_alive(self, lease: int, now: float) -> LeaseRenewal:
        """Renew a lease, or say so."""
        renewal = super().lease_keep_alive(lease, now)
        if renewal.ttl:
            self._once_granted[lease] = renewal.ttl
            if self.misbehaviour.strikes(ServerBug.SPURIOUS_REVOKE):
                self.lease_revoke(lease, now)
        elif lease in self._once_granted and self.misbehaviour.strikes(ServerBug.RENEWED_THOUGH_REVOKED):
            return LeaseRenewal(lease, self._once_granted[lease], renewal.revision)
        return renewal


class _BuggyWatchers(Watchers):
    def __init__(self, history: History, progress_seconds: float, misbehaviour: Misbehaviour) -> None:
        super().__init__(history, progress_seconds)
        self.misbehaviour = misbehaviour

    def make(self, request: WatchRequest, now: float) -> Watcher:
        return _BuggyWatcher(self, request, now)


class _BuggyWatcher(Watcher):
    __slots__ = ("_again", "_early", "_misbehaviour", "_sent")

    def __init__(self, hub: _BuggyWatchers, request: WatchRequest, now: float) -> None:
        super().__init__(hub, request, now)
        self._misbehaviour = hub.misbehaviour
        self._sent: deque[WatchResponse] = deque(maxlen=5)
        self._again: deque[WatchResponse] = deque()
        self._early = False
        if self._misbehaviour.strikes(ServerBug.CREATED_CANCELED):
            self.close()
            reason = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
            self._answers.append(WatchResponse(created=True, canceled=True, reason=reason))

    def poll(self, now: float) -> WatchResponse | None:
        if self._again:
            return self._again.popleft()
        strikes = self._misbehaviour.strikes
        if not self._pending and self._in_step:
            self._early = False
        elif self.request.progress_notify and not self._early and strikes(ServerBug.EARLY_PROGRESS):
            self._early = True
            return WatchResponse(self._hub.history.revision)
        response = super().poll(now)
        if response is not None and response.events and not response.fragment:
            if strikes(ServerBug.PAST_EVENTS):
                self._again.extend(self._sent)
            if strikes(ServerBug.DUPLICATE_EVENTS):
                self._again.append(response)
            self._sent.append(response)
        return response

    def _events(self, commits: Iterable[Commit]) -> Iterator[Event]:
        boundary = self._hub.history.compact_revision
        for event in super()._events(commits):
            lost = event.is_delete and event.revision == boundary and not self._in_step
            if not (lost and self._misbehaviour.strikes(ServerBug.LOST_DELETE)):
                yield event
