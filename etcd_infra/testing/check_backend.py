"""
A conformance kit for those who write a `Backend`: the facts that everything here relies on.

Each fact is a function whose first docstring line is the sentence that is reported when it does not hold.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    Event,
    KeyRange,
    KeyValue,
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
    EtcdError,
    FutureRevisionError,
    InvalidRequestError,
    LeaseExistsError,
    LeaseNotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from etcd_infra._etcd.backend import Backend, WatchStream

_PATIENCE: Final = 10.0
_TTL: Final = 60
_MISSING_LEASE: Final = 0x7EAD


async def check_backend(backend: Backend, *, prefix: bytes | None = None) -> None:
    """
    Check that a backend behaves like etcd, in a few seconds and about 150 calls.

    Use a store for tests, which nobody else writes to meanwhile: its revisions are counted and its history is
    compacted. Keys and leases of this check are removed again.

    Args:
        backend: What to check, open.
        prefix: What the keys of this check begin with; random by default.

    Raises:
        AssertionError: a fact does not hold; the text is its sentence and what was seen.
    """
    prefix = prefix or b"check-backend/" + secrets.token_hex(8).encode() + b"/"
    for number, fact in enumerate(FACTS):
        keys = _Keys(backend, prefix + b"%d/" % number)
        try:
            with trio.fail_after(_PATIENCE):
                await fact(keys)
        except (AssertionError, EtcdError, trio.TooSlowError) as error:
            sentence = (fact.__doc__ or fact.__name__).strip()
            raise AssertionError(f"{sentence} ({type(error).__name__}: {error})") from error
        finally:
            await keys.remove()


class _Keys:
    """One fact's part of the key space."""

    def __init__(self, backend: Backend, prefix: bytes) -> None:
        self.backend = backend
        self.all = KeyRange.prefix(prefix)
        self._prefix = prefix
        self._leases: list[int] = []

    def __call__(self, name: str) -> bytes:
        return self._prefix + name.encode()

    async def apply(self, *ops: Put | DeleteRange | Range | Txn) -> int:
        """Apply operations; return the revision."""
        return (await self.backend.txn(Txn(success=ops))).revision

    async def put(self, name: str, value: bytes = b"v", *, lease: int = 0) -> int:
        """Write one key."""
        return await self.backend.put(self(name), value, lease=lease)

    async def revision(self) -> int:
        """Return the store's revision."""
        return (await self.backend.range(Range(self.all, count_only=True))).revision

    async def holds(self, *compares: Compare) -> bool:
        """Say whether compares hold."""
        return (await self.backend.txn(Txn(compares))).succeeded

    async def grant(self, ttl: int = _TTL) -> int:
        """Grant a lease that `remove` ends."""
        lease = (await self.backend.lease_grant(ttl)).lease
        self._leases.append(lease)
        return lease

    async def remove(self) -> None:
        """Leave nothing behind."""
        with trio.move_on_after(_PATIENCE, shield=True):
            for lease in self._leases:
                try:
                    await self.backend.lease_revoke(lease)
                except EtcdError:
                    continue  # ended by the fact itself
            await self.backend.delete(self.all)


def _equal(wanted: object, seen: object) -> None:
    if wanted != seen:
        raise AssertionError(f"expected {wanted!r}, saw {seen!r}")


async def _refused(kind: type[Exception], call: Awaitable[object]) -> None:
    try:
        seen = await call
    except kind:
        return
    raise AssertionError(f"expected {kind.__name__}, saw {seen!r}")


async def _events(stream: WatchStream, count: int) -> list[Event]:
    events: list[Event] = []
    while len(events) < count:
        events += (await stream.receive()).events
    return events


# ── revisions and reads ─────────────────────────────────────────────────────────────────────────


async def _revisions_count_changes(keys: _Keys) -> None:
    """The revision grows by 1 per request that changes something, and not otherwise."""
    before = await keys.put("a")
    _equal(before + 1, await keys.apply(Put(keys("a")), Put(keys("b"))))
    _equal(before + 1, await keys.apply(DeleteRange(KeyRange.one(keys("missing")))))
    _equal(before + 1, await keys.apply(Range(keys.all)))
    lease = await keys.grant()
    _equal(before + 1, await keys.backend.lease_revoke(lease))
    _equal(before + 2, await keys.apply(DeleteRange(keys.all)))
    _equal(before + 2, await keys.revision())


async def _keys_have_numbers(keys: _Keys) -> None:
    """A key's create revision, mod revision and version count its present incarnation."""
    first = await keys.put("a", b"1")
    second = await keys.put("a", b"2")
    _equal(KeyValue(keys("a"), b"2", first, second, 2), await keys.backend.get(keys("a")))
    await keys.backend.delete(KeyRange.one(keys("a")))
    _equal(None, await keys.backend.get(keys("a")))
    again = await keys.put("a", b"")
    _equal(KeyValue(keys("a"), b"", again, again, 1), await keys.backend.get(keys("a")))


async def _ranges_are_ordered_and_counted(keys: _Keys) -> None:
    """A range is ordered by bytes, cut by its limit, and counted whole."""
    for name in ("c", "a", "b"):
        await keys.put(name)
    found = await keys.backend.range(Range(keys.all, limit=2))
    _equal(([keys("a"), keys("b")], 3, True), ([kv.key for kv in found.kvs], found.count, found.more))
    newest = Range(keys.all, sort_by=SortTarget.MOD, descending=True, limit=1)
    _equal([keys("b")], [kv.key for kv in (await keys.backend.range(newest)).kvs])
    counted = await keys.backend.range(Range(keys.all, count_only=True, limit=1))
    _equal(((), 3, False), (counted.kvs, counted.count, counted.more))


async def _history_can_be_read(keys: _Keys) -> None:
    """A read at a revision shows the state after it; compacted and future revisions are refused."""
    first = await keys.put("a", b"1")
    second = await keys.put("a", b"2")
    third = await keys.put("a", b"3")
    _equal(KeyValue(keys("a"), b"1", first, first, 1), await keys.backend.get(keys("a"), revision=first))
    _equal(third, (await keys.backend.range(Range(keys.all, revision=first))).revision)
    await _refused(FutureRevisionError, keys.backend.get(keys("a"), revision=third + 1))
    _equal(third, await keys.backend.compact(second))
    await _refused(CompactedError, keys.backend.get(keys("a"), revision=first))
    await _refused(CompactedError, keys.backend.compact(second))
    _equal(KeyValue(keys("a"), b"2", first, second, 2), await keys.backend.get(keys("a"), revision=second))


# ── transactions ────────────────────────────────────────────────────────────────────────────────


async def _compares_decide(keys: _Keys) -> None:
    """A Txn applies its success branch if all compares hold, otherwise its failure branch."""
    absent = Compare.absent(keys("a"))
    txn = Txn((absent,), (Put(keys("a"), b"first"),), (Range(KeyRange.one(keys("a"))),))
    won, lost = await keys.backend.txn(txn), await keys.backend.txn(txn)
    _equal((True, False), (won.succeeded, lost.succeeded))
    stored = KeyValue(keys("a"), b"first", won.revision, won.revision, 1)
    _equal((RangeResult((stored,), 1),), lost.results)


async def _missing_keys_compare_as_zero(keys: _Keys) -> None:
    """A missing key compares as 0 in numbers, and a VALUE compare on it is false."""
    for target in (Target.VERSION, Target.CREATE, Target.MOD, Target.LEASE):
        _equal(True, await keys.holds(Compare(target, Operator.EQUAL, KeyRange.one(keys("a")), 0)))
        _equal(True, await keys.holds(Compare(target, Operator.LESS, KeyRange.one(keys("a")), 1)))
    for operator in (Operator.EQUAL, Operator.NOT_EQUAL):
        _equal(False, await keys.holds(Compare(Target.VALUE, operator, KeyRange.one(keys("a")), b"")))


async def _range_compares_need_every_key(keys: _Keys) -> None:
    """A compare over a range needs every key of it; over an empty range it is that of a missing key."""
    _equal(True, await keys.holds(Compare.nothing_in(keys.all)))
    _equal(False, await keys.holds(Compare(Target.VERSION, Operator.GREATER, keys.all, 0)))
    await keys.put("a", b"same")
    await keys.put("b", b"same")
    _equal(False, await keys.holds(Compare.nothing_in(keys.all)))
    _equal(True, await keys.holds(Compare(Target.VALUE, Operator.EQUAL, keys.all, b"same")))
    await keys.put("b", b"other")
    _equal(False, await keys.holds(Compare(Target.VALUE, Operator.EQUAL, keys.all, b"same")))


async def _nested_compares_see_the_state_before(keys: _Keys) -> None:
    """Compares of nested Txns see the state before the whole Txn, its operations what was written."""
    nested = Txn((Compare.absent(keys("a")),), (Range(keys.all, count_only=True),))
    result = await keys.backend.txn(Txn(success=(Put(keys("a")), nested)))
    wanted = (PutResult(), TxnResult(succeeded=True, results=(RangeResult(count=1),)))
    _equal(wanted, result.results)


async def _bad_txns_are_refused_whole(keys: _Keys) -> None:
    """A Txn with a key put twice, too many operations or a missing lease is refused, and writes nothing."""
    put = Put(keys("a"))
    many = tuple(Put(keys(f"{n}")) for n in range(129))
    await _refused(InvalidRequestError, keys.apply(put, put))
    await _refused(InvalidRequestError, keys.backend.txn(Txn(success=(put,), failure=many)))
    await _refused(InvalidRequestError, keys.apply(put, Put(b"")))
    await _refused(LeaseNotFoundError, keys.apply(put, Put(keys("b"), lease=_MISSING_LEASE)))
    _equal(None, await keys.backend.get(keys("a")))


# ── leases ──────────────────────────────────────────────────────────────────────────────────────


async def _leases_are_named_by_the_client(keys: _Keys) -> None:
    """A lease id of one's own makes a grant repeatable: the second one says that it exists."""
    lease = secrets.randbits(62) + 1
    granted = await keys.backend.lease_grant(_TTL, lease=lease)
    _equal((lease, _TTL), (granted.lease, granted.ttl))
    await _refused(LeaseExistsError, keys.backend.lease_grant(_TTL, lease=lease))
    _equal(_TTL, (await keys.backend.lease_keep_alive(lease)).ttl)
    _equal(True, lease in await keys.backend.lease_list())
    await keys.backend.lease_revoke(lease)


async def _missing_leases_are_told(keys: _Keys) -> None:
    """A missing lease is TTL 0 to a keep-alive, -1 to a time-to-live, and an error to a revoke."""
    _equal(0, (await keys.backend.lease_keep_alive(_MISSING_LEASE)).ttl)
    _equal(-1, (await keys.backend.lease_time_to_live(_MISSING_LEASE)).ttl)
    await _refused(LeaseNotFoundError, keys.backend.lease_revoke(_MISSING_LEASE))


async def _revoke_is_one_revision(keys: _Keys) -> None:
    """A revoke deletes all keys of the lease in one revision, in key order."""
    lease = await keys.grant()
    await keys.put("b", lease=lease)
    put = await keys.put("a", lease=lease)
    async with keys.backend.watch(keys.all, start_revision=put + 1) as stream:
        _equal(put + 1, await keys.backend.lease_revoke(lease))
        wanted = tuple(Event.deleted(keys(name), mod_revision=put + 1) for name in ("a", "b"))
        _equal(wanted, (await stream.receive()).events)


async def _keys_leave_their_lease(keys: _Keys) -> None:
    """A put without a lease, or a delete, takes the key off its lease; one that ignores it does not."""
    lease = await keys.grant()
    for name in ("a", "b", "c"):
        await keys.put(name, lease=lease)
    await keys.put("a")
    await keys.backend.delete(KeyRange.one(keys("b")))
    await keys.put("b")
    await keys.apply(Put(keys("c"), b"v", ignore_lease=True))
    _equal((keys("c"),), (await keys.backend.lease_time_to_live(lease, keys=True)).keys)
    await keys.backend.lease_revoke(lease)
    left = await keys.backend.range(Range(keys.all, keys_only=True))
    _equal([keys("a"), keys("b")], [kv.key for kv in left.kvs])


async def _leases_run_out(keys: _Keys) -> None:
    """A key lives as long as its lease's granted TTL after the last keep-alive, and a watch sees it go."""
    lease = await keys.grant(1)
    put = await keys.put("a", lease=lease)
    await trio.sleep(1)
    renewed_at = trio.current_time()
    renewal = await keys.backend.lease_keep_alive(lease)
    async with keys.backend.watch(keys.all, start_revision=put + 1) as stream:
        (event,) = await _events(stream, 1)
    lived = trio.current_time() - renewed_at
    _equal(Event.deleted(keys("a"), mod_revision=put + 1), event)
    if lived < renewal.ttl:
        raise AssertionError(f"expected {renewal.ttl} s, saw {lived} s")
    _equal(-1, (await keys.backend.lease_time_to_live(lease)).ttl)


# ── watches ─────────────────────────────────────────────────────────────────────────────────────


async def _watches_deliver_whole_revisions(keys: _Keys) -> None:
    """A watch delivers whole revisions in order, from its start on, in the order of the operations."""
    first = await keys.put("a", b"1")
    async with keys.backend.watch(keys.all, start_revision=first, prev_kv=True) as stream:
        _equal(first, stream.created_revision)
        second = await keys.apply(Put(keys("z")), Put(keys("a"), b"2"), DeleteRange(KeyRange.one(keys("b"))))
        third = await keys.backend.delete(keys.all)
        events = await _events(stream, 5)
    one, two = KeyValue(keys("a"), b"1", first, first, 1), KeyValue(keys("a"), b"2", first, second, 2)
    other = KeyValue(keys("z"), b"", second, second, 1)
    wanted = [
        Event.put(one),
        Event.put(other),
        Event.put(two, one),
        Event.deleted(keys("a"), mod_revision=third, prev_kv=two),
        Event.deleted(keys("z"), mod_revision=third, prev_kv=other),
    ]
    _equal(wanted, events)


async def _watches_from_now_miss_nothing(keys: _Keys) -> None:
    """A watch from now delivers everything after its creation, coordination or not."""
    for coordination in (False, True):
        async with keys.backend.watch(keys.all, coordination=coordination) as stream:
            created = stream.created_revision
            _equal(created + 1, await keys.put("a"))
            _equal([created + 1], [event.revision for event in await _events(stream, 1)])


async def _filters_leave_out(keys: _Keys) -> None:
    """The filters leave out PUT or DELETE events."""
    before = await keys.revision()
    await keys.put("a")
    await keys.backend.delete(keys.all)
    for filters, revision in (({"no_put": True}, before + 2), ({"no_delete": True}, before + 1)):
        async with keys.backend.watch(keys.all, start_revision=before + 1, **filters) as stream:
            _equal([revision], [event.revision for event in await _events(stream, 1)])


async def _compacted_watches_end(keys: _Keys) -> None:
    """A watch from a compacted revision ends with the revision that is left; one that keeps up goes on."""
    first = await keys.put("a")
    async with keys.backend.watch(keys.all, start_revision=first) as kept:
        await _events(kept, 1)
        last = await keys.put("a")
        await _events(kept, 1)
        await keys.backend.compact(last)
        async with keys.backend.watch(keys.all, start_revision=first) as late:
            try:
                await late.receive()
            except CompactedError as error:
                _equal(last, error.compact_revision)
            else:
                raise AssertionError("the watch went on")
        await keys.put("a")
        _equal([last + 1], [event.revision for event in await _events(kept, 1)])


async def _cancelled_receive_loses_nothing(keys: _Keys) -> None:
    """A `receive` that is cancelled loses no batch."""
    async with keys.backend.watch(keys.all) as stream:
        put = await keys.put("a")
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.receive()
        _equal([put], [event.revision for event in await _events(stream, 1)])


FACTS: Final[tuple[Callable[[_Keys], Awaitable[None]], ...]] = (
    _revisions_count_changes,
    _keys_have_numbers,
    _ranges_are_ordered_and_counted,
    _history_can_be_read,
    _compares_decide,
    _missing_keys_compare_as_zero,
    _range_compares_need_every_key,
    _nested_compares_see_the_state_before,
    _bad_txns_are_refused_whole,
    _leases_are_named_by_the_client,
    _missing_leases_are_told,
    _revoke_is_one_revision,
    _keys_leave_their_lease,
    _leases_run_out,
    _watches_deliver_whole_revisions,
    _watches_from_now_miss_nothing,
    _filters_leave_out,
    _compacted_watches_end,
    _cancelled_receive_loses_nothing,
)
