"""
Stores that break one rule each: the bugs that an in-memory etcd could have.

Each overrides as little as it can. `test_mutants.py` names the fact that tells each from an etcd.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from etcd_infra._backends.memory import MemoryEtcd
from etcd_infra._backends.memory_history import Commit, History
from etcd_infra._backends.memory_leases import Lease, Leases
from etcd_infra._backends.memory_store import Store
from etcd_infra._backends.memory_watch import Watcher, Watchers
from etcd_infra._etcd.model import DeleteRange, Event, KeyValue, Operator, Put, PutResult, Range, Target, Txn
from etcd_infra.errors import InvalidRequestError, LeaseNotFoundError

if TYPE_CHECKING:
    from etcd_infra._etcd.model import Compare, DeleteRangeResult, RangeResult, TxnResult, WatchRequest


class Unchecked(MemoryEtcd):
    """An etcd whose backend leaves all checks to the store."""

    async def txn(self, request: Txn, /) -> TxnResult:
        return await self._write("a transaction", partial(self._store.txn, request))


class Mutant(Store):
    """A store that is put together from replaceable parts."""

    etcd: type[MemoryEtcd] = MemoryEtcd
    leases: type[Leases] = Leases
    watcher: type[Watcher] = Watcher

    def __init__(self, *, min_ttl: int = 2) -> None:
        super().__init__(min_ttl=min_ttl)
        self._leases = self.leases(min_ttl)
        self._watchers = _Watchers(self.history, self.watcher)


class _Watchers(Watchers):
    def __init__(self, history: History, watcher: type[Watcher]) -> None:
        super().__init__(history)
        self._watcher = watcher

    def open(self, request: WatchRequest, now: float) -> Watcher:
        watcher = self._watcher(self, request, now)
        if watcher.in_step:
            self.add(watcher)
        return watcher


# ── revisions ───────────────────────────────────────────────────────────────────────────────────


class RevisionGrowsOnNoOpDelete(Mutant):
    """A delete that finds nothing makes a revision."""

    def _delete(self, delete: DeleteRange) -> DeleteRangeResult:
        result = super()._delete(delete)
        if not result.deleted:
            self.history.commits.append(Commit(self.revision + 1, ()))
        return result


class RevisionPerKey(Mutant):
    """Each key of a Txn is a revision of its own."""

    def _put(self, put: Put) -> PutResult:
        result = super()._put(put)
        self._commit()
        return result


class SameValueIsNoChange(Mutant):
    """Writing the same value again does nothing."""

    def _put(self, put: Put) -> PutResult:
        old = self._keys.get(put.key)
        same = old is not None and (old.value, old.lease) == (put.value, put.lease)
        return PutResult(old if put.prev_kv else None) if same else super()._put(put)


class FirstRevisionIsZero(Mutant):
    """An empty store is at revision 0."""

    @property
    def revision(self) -> int:
        return self.history.revision if self.history.commits else 0


class VersionGoesOnAfterDelete(Mutant):
    """A re-created key does not start at version 1 again."""

    def __init__(self) -> None:
        super().__init__()
        self._versions: dict[bytes, int] = {}

    def _next_version(self, key: bytes, old: KeyValue | None) -> int:
        del old
        self._versions[key] = self._versions.get(key, 0) + 1
        return self._versions[key]


class RejectedTxnIsHalfApplied(Mutant):
    """What stands before the operation that fails is applied."""

    def _check_puts(self, path: object) -> None:
        del path

    def _put(self, put: Put) -> PutResult:
        if put.lease and put.lease not in self._leases:
            self._commit()
            raise LeaseNotFoundError("etcdserver: requested lease not found")
        return super()._put(put)


class CompactedReadsAreAnswered(Mutant):
    """A read below the compaction revision is answered."""

    def _check_revision(self, revision: int) -> None:
        if revision >= self.compact_revision:
            super()._check_revision(revision)


class FutureReadsAreAnswered(Mutant):
    """A read at a revision that is not reached is answered."""

    def _check_revision(self, revision: int) -> None:
        if revision <= self.revision:
            super()._check_revision(revision)


class CompactionTwiceIsFine(Mutant):
    """Compacting the same revision again is no error."""

    def compact(self, revision: int, now: float) -> int:
        return self.revision if revision == self.history.compacted else super().compact(revision, now)


class CompactionEatsItsOwnRevision(Mutant):
    """The compaction revision itself can not be read any more."""

    def _check_revision(self, revision: int) -> None:
        super()._check_revision(revision - 1 if revision == self.compact_revision else revision)


# ── ranges ──────────────────────────────────────────────────────────────────────────────────────


class CountHonoursLimit(Mutant):
    """`count` is the number of keys in the answer."""

    @staticmethod
    def _counted(count: int, found: list[KeyValue]) -> int:
        return min(count, len(found))


class HeaderIsTheRequestedRevision(Mutant):
    """A read at a revision answers that revision."""

    def range(self, request: Range, now: float) -> RangeResult:
        found = super().range(request, now)
        return replace(found, revision=request.revision or found.revision)


class LimitComesBeforeSort(Mutant):
    """A range cuts first and sorts then."""

    def _read(self, request: Range) -> RangeResult:
        cut = super()._read(replace(request, sort_by=None))
        kvs = tuple(self._sorted(list(cut.kvs), request))
        return replace(cut, kvs=kvs)


# ── transactions ────────────────────────────────────────────────────────────────────────────────


class NestedComparesSeeTheStateAfter(Mutant):
    """A nested Txn is decided when its turn comes."""

    def _choose(self, txn: Txn) -> object:
        path = super()._choose(Txn(txn.compare))
        return dataclasses.replace(path, steps=txn.success if path.succeeded else txn.failure)

    def _apply_step(self, step: object) -> object:
        return super()._apply_step(self._choose(step) if isinstance(step, Txn) else step)


class MissingValueIsNotEqual(Mutant):
    """A VALUE compare NOT_EQUAL on a missing key is true."""

    def _holds_for_nothing(self, compare: Compare) -> bool:
        if compare.target is Target.VALUE:
            return compare.operator is Operator.NOT_EQUAL
        return super()._holds_for_nothing(compare)


class MissingValueIsEmpty(Mutant):
    """A VALUE compare on a missing key takes it for empty."""

    def _holds_for_nothing(self, compare: Compare) -> bool:
        return self._satisfies(compare, KeyValue(b""))


class EmptyRangeCompareIsVacuous(Mutant):
    """A compare over an empty range is true, as over all of nothing."""

    def _holds_for_nothing(self, compare: Compare) -> bool:
        return bool(compare.range.end) or super()._holds_for_nothing(compare)


class EmptyRangeCompareIsFalse(Mutant):
    """A compare over an empty range is false."""

    def _holds_for_nothing(self, compare: Compare) -> bool:
        return not compare.range.end and super()._holds_for_nothing(compare)


class RangeCompareNeedsOneKey(Mutant):
    """A compare over a range is true if one key satisfies it."""

    def _holds(self, compare: Compare) -> bool:
        states = list(self._keys.select(compare.range))
        return any(self._satisfies(compare, state) for state in states) if states else super()._holds(compare)


class OperatorIsTurnedAround(Mutant):
    """The operand stands on the left."""

    @staticmethod
    def _satisfies(compare: Compare, state: KeyValue) -> bool:
        turned = {Operator.GREATER: Operator.LESS, Operator.LESS: Operator.GREATER}
        operator = turned.get(compare.operator, compare.operator)
        return Store._satisfies(replace(compare, operator=operator), state)


class DuplicateKeysAreAllowed(Mutant):
    """A key may be put twice in one branch: the check is missing."""

    etcd = Unchecked

    def txn(self, request: Txn, now: float) -> TxnResult:
        try:
            return super().txn(request, now)
        except InvalidRequestError as error:
            if "duplicate key" not in str(error):
                raise
            return super().txn(replace(request, success=request.success[:1], failure=request.failure[:1]), now)


class OtherBranchIsNotChecked(Mutant):
    """Only the branch that is taken is checked."""

    etcd = Unchecked

    def txn(self, request: Txn, now: float) -> TxnResult:
        taken = super()._choose(Txn(request.compare)).succeeded
        return super().txn(replace(request, **{"failure" if taken else "success": ()}), now)


class LimitIsOnAllOperations(Mutant):
    """128 operations are allowed in all lists together."""

    def txn(self, request: Txn, now: float) -> TxnResult:
        if len(request.compare) + len(request.success) + len(request.failure) > self._max_ops:
            raise InvalidRequestError("etcdserver: too many operations in txn request")
        return super().txn(request, now)


class RangesSeeTheStateBefore(Mutant):
    """A range in a Txn does not see the puts before it."""

    def _read(self, request: Range) -> RangeResult:
        past = self._changes and not request.revision
        return super()._read(replace(request, revision=self.revision) if past else request)


# ── leases ──────────────────────────────────────────────────────────────────────────────────────


class PutKeepsTheLease(Mutant):
    """A put without a lease leaves the key on the lease that it had."""

    @staticmethod
    def _lease_after(put: Put, before: KeyValue) -> int:
        return put.lease or before.lease


class IgnoreLeaseDetaches(Mutant):
    """A put that ignores the lease takes the key off it."""

    @staticmethod
    def _lease_after(put: Put, before: KeyValue) -> int:
        del before
        return put.lease


class RevokeKeyByKey(Mutant):
    """A revoke, or an expiry, deletes each key in a revision of its own."""

    def _end(self, lease: Lease) -> None:
        for key in sorted(lease.keys):
            super()._end(Lease(lease.id, lease.ttl, lease.deadline, {key}))


class RevokeMakesARevision(Mutant):
    """A revoke of a lease without keys makes a revision."""

    def _end(self, lease: Lease) -> None:
        super()._end(lease)
        if not lease.keys:
            self.history.commits.append(Commit(self.revision + 1, ()))


class RevokeInOrderOfAttachment(Mutant):
    """A revoke deletes the newest key first."""

    def _end(self, lease: Lease) -> None:
        for key in sorted(lease.keys, reverse=True):
            state = self._keys.get(key)
            if state is not None:
                self._remove(state)
        self._commit()


class DeletedKeyStaysAttached(Mutant):
    """A deleted key stays on its lease, which later deletes its successor."""

    def _remove(self, state: KeyValue) -> None:
        super()._remove(state)
        self._leases.move(state.key, 0, state.lease)


class _NoMinimum(Leases):
    def granted_ttl(self, ttl: int) -> int:
        return ttl


class MinimumTtlIsIgnored(Mutant):
    """A TTL of 1 is granted as it is."""

    leases = _NoMinimum


class _RenewalIsForgotten(Leases):
    def renew(self, lease: int, now: float) -> int:
        del now
        found = self.find(lease)
        return found.ttl if found else 0


class KeepAliveDoesNothing(Mutant):
    """A keep-alive answers, but the lease ends when it would have."""

    leases = _RenewalIsForgotten


class _Early(Leases):
    def due(self, now: float) -> int | None:
        return super().due(now + 0.5)

    def next_deadline(self) -> float | None:
        deadline = super().next_deadline()
        return None if deadline is None else deadline - 0.25


class LeaseEndsEarly(Mutant):
    """A lease ends half a second before its TTL is over."""

    leases = _Early


class _Endless(Leases):
    def next_deadline(self) -> float | None:
        return None


class LeaseNeverEnds(Mutant):
    """A lease does not run out."""

    leases = _Endless


class KeepAliveOfNothingRevives(Mutant):
    """A keep-alive of a missing lease answers a TTL."""

    def lease_keep_alive(self, lease: int, now: float) -> object:
        renewed = super().lease_keep_alive(lease, now)
        return renewed if renewed.ttl else replace(renewed, ttl=2)


class GrantTwiceRenews(Mutant):
    """Granting an id again is no error."""

    def lease_grant(self, ttl: int, lease: int, now: float) -> object:
        if lease and lease in self._leases:
            self._leases.remove(lease)
        return super().lease_grant(ttl, lease, now)


# ── watches ─────────────────────────────────────────────────────────────────────────────────────


class DeleteEventsHaveMetadata(Mutant):
    """A DELETE event carries the key's former numbers."""

    @staticmethod
    def _delete_event(state: KeyValue, revision: int) -> Event:
        event = Event.deleted(state.key, mod_revision=revision, prev_kv=state)
        return replace(event, kv=replace(state, value=b"", mod_revision=revision))


class EventsAreSortedByKey(Mutant):
    """The events of a revision come in key order."""

    def _commit(self) -> None:
        self._changes.sort(key=lambda event: event.key)
        super()._commit()


class _NeverCompacted(Watcher):
    def _catch_up(self) -> None:
        compacted, self._hub.history.compacted = self._hub.history.compacted, -1
        super()._catch_up()
        self._hub.history.compacted = compacted


class CompactedWatchGoesOn(Mutant):
    """A watch from a compacted revision delivers what was there, without a word."""

    watcher = _NeverCompacted

    def __init__(self) -> None:
        super().__init__()
        self.history = History(keep=True)
        self._watchers.history = self.history


class _StartsAtTheCompactionPlusOne(Watcher):
    def _catch_up(self) -> None:
        self._next = max(self._next, self._hub.history.compact_revision)
        super()._catch_up()


class CompactedWatchSkips(Mutant):
    """A watch from a compacted revision goes on at the first one that is left."""

    watcher = _StartsAtTheCompactionPlusOne


class _Exclusive(Watcher):
    def __init__(self, hub: Watchers, request: WatchRequest, now: float) -> None:
        super().__init__(hub, request, now)
        if request.start_revision:
            self._next += 1


class StartIsExclusive(Mutant):
    """A watch begins after its start revision."""

    watcher = _Exclusive


class _Forgetful(Watcher):
    def _fetch(self, now: float) -> None:
        last = self._hub.history.compact_revision
        if self._next < last and not self._pending:
            self._in_step = False
        super()._fetch(now)


class CompactionEndsQuietWatches(Mutant):
    """Compaction cancels a watch whose last event is older."""

    watcher = _Forgetful


class _HeaderOnly(Watcher):
    def _last_of_batch(self) -> int:
        last = super()._last_of_batch()
        self._next = max(self._next, self._hub.history.revision - 1_500)
        return max(last, self._next)


class CatchUpResumesFromTheHeader(Mutant):
    """A long catch-up skips what lies between its first batch and the present."""

    watcher = _HeaderOnly


class _PrevKvKnowsAll(Watcher):
    def _shown(self, event: Event) -> Event:
        return event if self.request.prev_kv else replace(event, prev_kv=None)


class PrevKvSurvivesCompaction(Mutant):
    """A watch shows what was there before, though it is compacted."""

    watcher = _PrevKvKnowsAll


class _AlwaysPrevKv(Watcher):
    def _shown(self, event: Event) -> Event:
        return event


class PrevKvUnasked(Mutant):
    """Every event carries what was there before."""

    watcher = _AlwaysPrevKv


class _Unfiltered(Watcher):
    def _filtered(self, event: Event) -> bool:
        return False


class FiltersDoNothing(Mutant):
    """The filters are ignored."""

    watcher = _Unfiltered


class _Deaf(Watcher):
    def __init__(self, hub: Watchers, request: WatchRequest, now: float) -> None:
        super().__init__(hub, request, now)
        if self._next > hub.history.revision + 1:
            hub.discard(self)

    @property
    def in_step(self) -> bool:
        return self._next == self._hub.history.revision + 1


class FutureWatchStaysMute(Mutant):
    """A watch from a future revision never begins."""

    watcher = _Deaf


# ── a full store ────────────────────────────────────────────────────────────────────────────────


class FullStoreRefusesDeletes(Mutant):
    """A full store refuses every Txn that may write."""

    def txn(self, request: Txn, now: float) -> TxnResult:
        if self.full and not request.is_read_only:
            return super().txn(replace(request, success=(*request.success, Put(b"x"))), now)
        return super().txn(request, now)


class FullStoreTakesPutsOfTheOtherBranch(Mutant):
    """A full store looks at the branch taken only."""

    def txn(self, request: Txn, now: float) -> TxnResult:
        if self._choose(Txn(request.compare)).succeeded:
            return super().txn(replace(request, failure=()), now)
        return super().txn(request, now)
