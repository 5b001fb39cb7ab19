"""The reading half of `State`: it needs no session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, overload

import trio

from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra._primitives._listing import Listing
from etcd_infra._primitives._many import read_many
from etcd_infra._primitives._space import Space, check_revision
from etcd_infra._primitives.entry import Consistency, Entry
from etcd_infra._primitives.state_watch import StateWatch, open_state_watch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._etcd.model import KeyValue

T = TypeVar("T")
U = TypeVar("U")

NOT_GIVEN: Final[Any] = object()


class StateReading(Generic[T]):
    """Reads the namespace's values."""

    def __init__(self, space: Space, type: type[T]) -> None:  # noqa: A002 - what it is
        self._space = space
        self._type = type

    @overload
    async def get(
        self, key: str, *, consistency: Consistency = ..., min_revision: int = ...
    ) -> Entry[T] | None: ...
    @overload
    async def get(
        self, key: str, *, type: type[U], consistency: Consistency = ..., min_revision: int = ...
    ) -> Entry[U] | None: ...
    async def get(
        self,
        key: str,
        *,
        type: Any = NOT_GIVEN,  # noqa: A002
        consistency: Consistency = Consistency.LINEARIZABLE,
        min_revision: int = 0,
    ) -> Entry[Any] | None:
        """
        Read one key; None if it is absent (a stored JSON null is an entry whose value is None).

        Args:
            key: Non-empty, at most 1,024 bytes, no control characters; slashes are allowed.
            type: What the value is decoded as, instead of this view's type.
            consistency: SERIALIZABLE is answered by one member, maybe from the past, also without a majority.
            min_revision: Answer nothing older: a serializable read that is, is repeated as a linearizable one.

        Raises:
            FutureRevisionError: the store has not reached `min_revision`: it is from elsewhere, or the store
                was restored or wiped since (then the session is lost, too).

        Round trips:
            One; more while answers are older than `min_revision`.
        """
        full = self._space.keys.state(key)
        consistency = Consistency(consistency)
        check_revision("min_revision", min_revision)
        self._space.tally.state_operations += 1
        kv = await self._read(full, consistency, min_revision)
        return self._space.entry(kv, self._type if type is NOT_GIVEN else type) if kv else None

    async def get_many(self, keys: Iterable[str]) -> dict[str, Entry[T] | None]:
        """
        Read keys, all at one revision: each of `keys` with its entry, or None.

        Raises:
            CompactedError: with more than 4,096 keys: compacted between two round trips; begin anew.

        Round trips:
            One; beyond 4,096 keys one for each 4,096, pinned to the revision of the first.
        """
        if isinstance(keys, str):
            msg = f"get_many takes several keys, not the characters of one: {keys!r}"
            raise TypeError(msg)
        full = {key: self._space.keys.state(key) for key in keys}
        self._space.tally.state_operations += 1
        if not full:
            await trio.lowlevel.checkpoint()
        found = await read_many(self._space.backend, tuple(full.values()))
        entries = [self._space.entry(kv, self._type) if kv else None for kv in found]
        return dict(zip(full, entries, strict=True))

    def list(self, prefix: str) -> Listing[T]:
        """
        Iterate (``async for``) over all entries whose key begins with `prefix`, by key, at one revision.

        Nothing is sent before the first step; see `Listing`.
        """
        self._space.tally.state_operations += 1
        return Listing(self._space, self._space.keys.state_prefix(prefix), self._type)

    def watch(
        self, key: str | None = None, *, prefix: str | None = None
    ) -> AbstractAsyncContextManager[StateWatch[T]]:
        """
        Follow a key, or all with a prefix: ``async with state.watch("k") as news: async for item in news``.

        First comes a `StateSnapshot` of what is there, then a `StateChange` for every change. See `StateWatch`.
        """
        if (key is None) == (prefix is None):
            msg = f"watch takes either a key or prefix=, not {key!r} and {prefix!r}"
            raise TypeError(msg)
        keys = self._space.keys
        if key is not None:
            watched = KeyRange.one(keys.state(key))
        else:
            watched = KeyRange.prefix(keys.state_prefix(prefix or ""))
        self._space.tally.state_operations += 1
        return open_state_watch(self._space, watched, self._type)

    async def _read(
        self, key: bytes, consistency: Consistency = Consistency.LINEARIZABLE, min_revision: int = 0
    ) -> KeyValue | None:
        request = Range(KeyRange.one(key))
        found = await self._space.read(request, consistency=consistency, min_revision=min_revision)
        return found.kvs[0] if found.kvs else None
