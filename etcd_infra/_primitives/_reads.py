"""
What one run of a transaction has read, and the compares that prove that it still is so.

A range takes one compare (nothing in it is newer) *and* one per key that was found: a range compare does not
notice deletions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.model import Compare, KeyRange, Operator, Range, Target, Txn
from etcd_infra._primitives._cas import found_in
from etcd_infra.errors import CompactedError, FutureRevisionError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.model import KeyValue

MAX_LISTED: Final = 100
_FETCH_TOGETHER: Final = 100


class SnapshotGoneError(Exception):
    """The snapshot can not be read any more; the run must begin anew."""


class Reads:
    """
    The reads of one run.

    Args:
        one_snapshot: Whether all are of the revision of the first one.
        likely: Keys that the run before has read: fetched along with the first.

    Attributes:
        revision: Of the first read; 0 before it.
    """

    def __init__(self, backend: Backend, *, one_snapshot: bool, likely: Sequence[bytes] = ()) -> None:
        self._backend = backend
        self._one_snapshot = one_snapshot
        self._likely = likely
        self._fetched: dict[bytes, KeyValue | None] = {}
        self._fetched_at = 0
        self._keys: dict[bytes, tuple[KeyValue | None, int]] = {}
        self._ranges: dict[KeyRange, int] = {}
        self._one_at_a_time = trio.Lock()
        self.revision = 0

    async def key(self, key: bytes) -> KeyValue | None:
        """
        Read one key; what was read once is not read again.

        Raises:
            SnapshotGoneError: compacted, or the store is another one.
            EtcdError: as the backend says.
        """
        async with self._one_at_a_time:  # or two first reads would be of two snapshots
            if key not in self._keys:
                self._keys[key] = await self._read(key)
            return self._keys[key][0]

    async def range(self, wanted: KeyRange) -> tuple[KeyValue, ...]:
        """
        Read a range.

        Raises:
            InvalidRequestError: it holds more keys than can be guarded.
            SnapshotGoneError, EtcdError: as `key`.
        """
        async with self._one_at_a_time:
            kvs, at = await self._fetch(Range(wanted, limit=MAX_LISTED + 1))
        if len(kvs) > MAX_LISTED:
            msg = f"more than {MAX_LISTED} keys in {wanted}: a transaction can not guard them"
            raise InvalidRequestError(msg)
        self._ranges.setdefault(wanted, at)
        for kv in kvs:
            self._keys.setdefault(kv.key, (kv, at))
        return kvs

    async def _read(self, key: bytes) -> tuple[KeyValue | None, int]:
        for wanted, at in self._ranges.items():
            if key in wanted:
                return None, at  # or the range would have found it
        if not self.revision and key in self._likely:
            await self._fetch_likely()
        if key in self._fetched:
            return self._fetched[key], self._fetched_at
        kvs, at = await self._fetch(Range(KeyRange.one(key)))
        return (kvs[0] if kvs else None), at

    async def _fetch_likely(self) -> None:
        keys = self._likely[:_FETCH_TOGETHER]
        answer = await self._backend.txn(Txn(success=tuple(Range(KeyRange.one(key)) for key in keys)))
        self.revision = self._fetched_at = answer.revision
        for key, found in zip(keys, answer.results, strict=True):
            kvs = found_in(found)
            self._fetched[key] = kvs[0] if kvs else None

    async def _fetch(self, request: Range) -> tuple[tuple[KeyValue, ...], int]:
        at = self.revision if self._one_snapshot else 0
        try:
            found = await self._backend.range(Range(request.range, revision=at, limit=request.limit))
        except (CompactedError, FutureRevisionError) as error:
            raise SnapshotGoneError from error
        self.revision = self.revision or found.revision
        return found.kvs, at or found.revision

    # ── what they prove, and what would change them ─────────────────────────────────────────────

    @property
    def read_keys(self) -> tuple[bytes, ...]:
        """The keys that were read."""
        return tuple(self._keys)

    def conditions(self) -> tuple[Compare, ...]:
        """Return what must still hold for all of it to be as it was."""
        keys = [Compare.modified_at(key, kv.mod_revision if kv else 0) for key, (kv, _) in self._keys.items()]
        return (*keys, *[unchanged_since(wanted, at) for wanted, at in self._ranges.items()])

    def unwritten_since(self, keys: Sequence[bytes]) -> tuple[Compare, ...]:
        """Return what must hold: nobody has written `keys` since the first read (those read are guarded so)."""
        if not self.revision:
            return ()
        return tuple(unchanged_since(KeyRange.one(key), self.revision) for key in keys if key not in self._keys)

    def watched(self) -> list[tuple[KeyRange, int]]:
        """Return what was read, and the revision after which a change of it is news."""
        single = [
            (KeyRange.one(key), at)
            for key, (_, at) in self._keys.items()
            if not any(key in wanted for wanted in self._ranges)
        ]
        return [*single, *self._ranges.items()]


def unchanged_since(wanted: KeyRange, revision: int) -> Compare:
    """Nothing that is in the range was written after `revision`."""
    return Compare(Target.MOD, Operator.LESS, wanted, revision + 1)
