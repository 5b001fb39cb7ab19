"""
etcd as a step machine: a request and the time in, an answer out; the state is the store's own.

No I/O, no clock, no randomness, no Trio: the body of `MemoryEtcd`, the oracle of checkers and the subject of
the property tests. Every verb takes `now`, in seconds on any clock that does not go back, and first lets the
leases run out whose time is over by then.

Source: etcd `server/etcdserver/apply.go`, `server/storage/mvcc/kvstore_txn.go`; the facts are in
`tests/contract/`. Small overridable methods hold one rule each, so that a test can break one.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec.structs import replace

from etcd_infra._backends.memory_history import Commit, History
from etcd_infra._backends.memory_keys import KeySpace, in_bounds
from etcd_infra._backends.memory_leases import Lease, Leases
from etcd_infra._backends.memory_txn_check import MAX_OPS, check_range, check_size, check_txn, has_put
from etcd_infra._backends.memory_watch import PROGRESS_SECONDS, Watcher, Watchers
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    DeleteRangeResult,
    Event,
    KeyRange,
    KeyValue,
    LeaseGrant,
    LeaseRenewal,
    LeaseTimeToLive,
    Operator,
    Put,
    PutResult,
    Range,
    RangeResult,
    SortTarget,
    Target,
    Txn,
    TxnResult,
)
from etcd_infra.errors import (
    CompactedError,
    FutureRevisionError,
    InvalidRequestError,
    LeaseNotFoundError,
    StorageFullError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.model import OpResult, WatchRequest

_TARGETS: Final = {
    Target.VERSION: attrgetter("version"),
    Target.CREATE: attrgetter("create_revision"),
    Target.MOD: attrgetter("mod_revision"),
    Target.VALUE: attrgetter("value"),
    Target.LEASE: attrgetter("lease"),
}
_SORTS: Final = {
    SortTarget.KEY: attrgetter("key"),
    SortTarget.VERSION: attrgetter("version"),
    SortTarget.CREATE: attrgetter("create_revision"),
    SortTarget.MOD: attrgetter("mod_revision"),
    SortTarget.VALUE: attrgetter("value"),
}
_NOTHING: Final = KeyValue(b"")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole state of a store, for checkers."""

    revision: int
    compact_revision: int
    kvs: tuple[KeyValue, ...]
    leases: tuple[tuple[int, int, tuple[bytes, ...]], ...]
    """Id, granted TTL and keys of each."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What `Store.back_up` saved; of no use but to `Store.restore`."""

    history: History
    keys: KeySpace
    leases: Leases


@dataclass(frozen=True, slots=True)
class _Path:
    """Which branches a Txn and the ones nested in it take."""

    succeeded: bool
    steps: tuple[_Step, ...]


_Step: TypeAlias = "Range | Put | DeleteRange | _Path"


class Store:
    """One etcd: `full` is its NOSPACE alarm, and `history` has every commit since the last compaction."""

    def __init__(
        self,
        *,
        min_ttl: int = 2,
        max_ops: int = MAX_OPS,
        progress_seconds: float = PROGRESS_SECONDS,
        keep_history: bool = False,
        auto_compact_revisions: int = 0,
    ) -> None:
        self.full = False
        self.history = History(keep=keep_history, auto_compact=auto_compact_revisions)
        self._keys = KeySpace()
        self._leases = Leases(min_ttl)
        self._watchers = self._make_watchers(progress_seconds)
        self._max_ops = max_ops
        self._changes: list[Event] = []

    def _make_watchers(self, progress_seconds: float) -> Watchers:
        return Watchers(self.history, progress_seconds)

    # ── reads ───────────────────────────────────────────────────────────────────────────────────

    @property
    def revision(self) -> int:
        """The store's revision."""
        return self.history.revision

    @property
    def compact_revision(self) -> int:
        """The oldest revision that can be read; 0 before the first compaction."""
        return self.history.compact_revision

    @property
    def next_deadline(self) -> float | None:
        """When the next lease runs out: `advance` changes nothing before."""
        return self._leases.next_deadline()

    def snapshot(self) -> Snapshot:
        """Return the whole present state."""
        leases = [self._leases.find(lease) for lease in self._leases.ids()]
        return Snapshot(
            self.revision,
            self.compact_revision,
            tuple(self._keys.select(KeyRange.everything())),
            tuple((lease.id, lease.ttl, tuple(sorted(lease.keys))) for lease in leases if lease),
        )

    def range(self, request: Range, now: float) -> RangeResult:
        """Read keys."""
        self.advance(now)
        check_range(request)
        # etcd: outside of a Txn a negative revision is the current one, too.
        self._check_revision(max(0, request.revision))
        return replace(self._read(request), revision=self.revision)

    # ── transactions ────────────────────────────────────────────────────────────────────────────

    def txn(self, request: Txn, now: float) -> TxnResult:
        """Evaluate the compares and apply one branch."""
        self.advance(now)
        check_txn(request, self._max_ops)
        if self.full and has_put(request):
            raise StorageFullError("etcdserver: mvcc: database space exceeded")
        check_size(request)
        path = self._choose(request)
        # Invariant: after these checks nothing can fail, so a Txn is applied whole or not at all.
        self._check_puts(path)
        self._check_ranges(path)
        results = self._apply(path)
        self._commit()
        return TxnResult(path.succeeded, results, self.revision)

    def _choose(self, txn: Txn) -> _Path:
        succeeded = all(self._holds(compare) for compare in txn.compare)
        return _Path(
            succeeded,
            tuple(
                # etcd: the compares of nested Txns, too, are evaluated before anything is applied.
                self._choose(op) if isinstance(op, Txn) else op
                for op in (txn.success if succeeded else txn.failure)
            ),
        )

    def _holds(self, compare: Compare) -> bool:
        found = False
        for state in self._keys.select(compare.range):
            found = True
            if not self._satisfies(compare, state):
                return False
        return found or self._holds_for_nothing(compare)

    def _holds_for_nothing(self, compare: Compare) -> bool:
        # etcd: protobuf can not tell an empty value from none, so this is false for every operator.
        return compare.target is not Target.VALUE and self._satisfies(compare, _NOTHING)

    @staticmethod
    def _satisfies(compare: Compare, state: KeyValue) -> bool:
        stored = _TARGETS[compare.target](state)
        match compare.operator:
            case Operator.EQUAL:
                return stored == compare.operand
            case Operator.GREATER:
                return stored > compare.operand
            case Operator.LESS:
                return stored < compare.operand
            case Operator.NOT_EQUAL:
                return stored != compare.operand

    def _check_puts(self, path: _Path) -> None:
        for step in path.steps:
            if isinstance(step, _Path):
                self._check_puts(step)
            elif isinstance(step, Put):
                if (step.ignore_value or step.ignore_lease) and self._keys.get(step.key) is None:
                    raise InvalidRequestError("etcdserver: key not found")
                if step.lease and step.lease not in self._leases:
                    raise LeaseNotFoundError("etcdserver: requested lease not found")

    def _check_ranges(self, path: _Path) -> None:
        for step in path.steps:
            if isinstance(step, _Path):
                self._check_ranges(step)
            elif isinstance(step, Range):
                self._check_revision(step.revision)

    def _check_revision(self, revision: int) -> None:
        if revision > self.revision:
            raise FutureRevisionError("etcdserver: mvcc: required revision is a future revision")
        # etcd: inside a Txn a negative revision is a compacted one (all but -1 before the first compaction).
        if revision and revision < self.history.compacted:
            raise CompactedError("etcdserver: mvcc: required revision has been compacted")

    def _apply(self, path: _Path) -> tuple[OpResult, ...]:
        return tuple(self._apply_step(step) for step in path.steps)

    def _apply_step(self, step: _Step) -> OpResult:
        match step:
            case Put():
                return self._put(step)
            case Range():
                return self._read(step)
            case DeleteRange():
                return self._delete(step)
            case _Path():
                return TxnResult(step.succeeded, self._apply(step))

    # ── single operations ───────────────────────────────────────────────────────────────────────

    def _read(self, request: Range) -> RangeResult:
        past = request.revision > 0
        found = self._keys.select_at(request.range, request.revision) if past else None
        count = len(found) if found is not None else self._keys.count(request.range)
        if request.count_only:
            return RangeResult(count=count)
        limit, looks_at_all = request.limit, self._looks_at_all(request)
        if found is None:
            # One more than asked for tells whether there is more.
            found = self._keys.head(request.range, 0 if looks_at_all or limit <= 0 else limit + 1)
        if looks_at_all:
            found = self._sorted([state for state in found if in_bounds(request, state)], request)
        more = 0 < limit < len(found)
        if more:
            found = found[:limit]
        if request.keys_only:
            found = [replace(state, value=b"") for state in found]
        return RangeResult(tuple(found), self._counted(count, found), more)

    @staticmethod
    def _counted(count: int, _found: list[KeyValue]) -> int:
        # etcd: all keys of the range, whatever the limit and the bounds on revisions leave.
        return count

    @staticmethod
    def _looks_at_all(request: Range) -> bool:
        return any(
            (
                request.sort_by is not None,
                request.descending,
                request.min_mod_revision,
                request.max_mod_revision,
                request.min_create_revision,
                request.max_create_revision,
            )
        )

    @staticmethod
    def _sorted(found: list[KeyValue], request: Range) -> list[KeyValue]:
        # Descending order without a target is that of the keys; ascending they are in it already.
        by = _SORTS[request.sort_by or SortTarget.KEY]
        return sorted(found, key=by, reverse=request.descending)

    def _put(self, put: Put) -> PutResult:
        revision = self.revision + 1
        old = self._keys.get(put.key)
        before = old or _NOTHING
        value = before.value if put.ignore_value else put.value
        lease = self._lease_after(put, before)
        state = KeyValue(
            put.key,
            value,
            before.create_revision or revision,
            revision,
            self._next_version(put.key, old),
            lease,
        )
        self._keys.write(state)
        self._leases.move(put.key, before.lease, lease)
        self._changes.append(Event.put(state, old))
        return PutResult(old if put.prev_kv else None)

    @staticmethod
    def _lease_after(put: Put, before: KeyValue) -> int:
        # etcd: a put without a lease takes the key off the lease that it had.
        return before.lease if put.ignore_lease else put.lease

    def _next_version(self, _key: bytes, old: KeyValue | None) -> int:
        return old.version + 1 if old is not None else 1

    def _delete(self, delete: DeleteRange) -> DeleteRangeResult:
        gone = self._keys.head(delete.range, 0)
        for state in gone:
            self._remove(state)
        return DeleteRangeResult(len(gone), tuple(gone) if delete.prev_kv else ())

    def _remove(self, state: KeyValue) -> None:
        revision = self.revision + 1
        self._keys.write(KeyValue(state.key, mod_revision=revision))
        self._leases.move(state.key, state.lease, 0)
        self._changes.append(self._delete_event(state, revision))

    @staticmethod
    def _delete_event(state: KeyValue, revision: int) -> Event:
        return Event.deleted(state.key, mod_revision=revision, prev_kv=state)

    def _commit(self) -> None:
        # etcd: a request that changed nothing makes no revision.
        if self._changes:
            commit = Commit(self.revision + 1, _as_told(self._changes))
            self._changes.clear()
            self.history.commits.append(commit)
            self._watchers.publish(commit)
            if overdue := self.history.overdue():
                self._keys.compact(overdue, self.history.compact(overdue))

    # ── compaction and watches ──────────────────────────────────────────────────────────────────

    def compact(self, revision: int, now: float) -> int:
        """Forget what was overwritten before `revision`; return the store's revision."""
        self.advance(now)
        if revision <= self.history.compacted:
            raise CompactedError("etcdserver: mvcc: required revision has been compacted")
        if revision > self.revision:
            raise FutureRevisionError("etcdserver: mvcc: required revision is a future revision")
        self._keys.compact(revision, self.history.compact(revision))
        return self.revision

    def watch(self, request: WatchRequest, now: float) -> Watcher:
        """Create a watch, to be polled and closed by whoever asked."""
        self.advance(now)
        return self._watchers.open(request, now)

    # ── leases ──────────────────────────────────────────────────────────────────────────────────

    def lease_grant(self, ttl: int, lease: int, now: float) -> LeaseGrant:
        """Grant a lease."""
        self.advance(now)
        if self.full:
            raise StorageFullError("etcdserver: mvcc: database space exceeded")
        granted = self._leases.grant(ttl, lease, now)
        return LeaseGrant(granted.id, granted.ttl, self.revision)

    def lease_keep_alive(self, lease: int, now: float) -> LeaseRenewal:
        """Renew a lease; TTL 0 says that it does not exist."""
        self.advance(now)
        return LeaseRenewal(lease, self._leases.renew(lease, now), self.revision)

    def lease_revoke(self, lease: int, now: float) -> int:
        """End a lease and delete its keys."""
        self.advance(now)
        self._end(self._leases.remove(lease))
        return self.revision

    def lease_time_to_live(self, lease: int, now: float, *, keys: bool = False) -> LeaseTimeToLive:
        """Say what is left of a lease; TTL -1 says that it does not exist."""
        self.advance(now)
        found = self._leases.find(lease)
        if found is None:
            return LeaseTimeToLive(lease, -1, revision=self.revision)
        attached = tuple(sorted(found.keys)) if keys else ()
        return LeaseTimeToLive(lease, int(found.deadline - now), found.ttl, attached, self.revision)

    def lease_list(self, now: float) -> tuple[int, ...]:
        """List the ids of all leases."""
        self.advance(now)
        return self._leases.ids()

    def refresh_leases(self, now: float) -> None:
        """Give every lease its full time again, as a new leader does, also one that is overdue."""
        # etcd: only the leader revokes, and checkpoints of remaining TTLs are off by default.
        self._leases.refresh(now)

    # ── backups ─────────────────────────────────────────────────────────────────────────────────

    def back_up(self, now: float) -> Backup:
        """Save everything."""
        self.advance(now)
        return Backup(self.history.copy(), self._keys.copy(), self._leases.copy())

    def restore(self, backup: Backup | None, now: float) -> None:
        """
        Go back to a backup, or (None) to an empty store; whoever has a watch must make it anew.

        Leases that the backup has get their full time again, as under a new leader.
        """
        if backup is None:
            self.history, self._keys, self._leases = self.history.none(), KeySpace(), self._leases.none()
        else:
            self.history = backup.history.copy()
            self._keys, self._leases = backup.keys.copy(), backup.leases.copy()
            self._leases.refresh(now)
        self._watchers = self._make_watchers(self._watchers.progress_seconds)

    def advance(self, now: float) -> None:
        """End the leases whose time is over at `now`, the earliest first."""
        while (lease := self._leases.due(now)) is not None:
            self._end(self._leases.remove(lease))

    def _end(self, lease: Lease) -> None:
        # etcd: all keys of a lease go in one revision, in the order of the keys.
        for key in sorted(lease.keys):
            state = self._keys.get(key)
            if state is not None:
                self._remove(state)
        self._commit()


def _as_told(changes: Sequence[Event]) -> tuple[Event, ...]:
    """Say of each change what was there before the revision, whatever else the revision did to the key."""
    if len(changes) == 1:
        return tuple(changes)
    # etcd: a watch reads what was there at the revision before; a key that the revision created has none.
    before: dict[bytes, KeyValue | None] = {}
    told: list[Event] = []
    for event in changes:
        was = before.setdefault(event.key, event.prev_kv)
        told.append(replace(event, prev_kv=was) if event.prev_kv not in {None, was} else event)
    return tuple(told)
