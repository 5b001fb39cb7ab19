"""State, followed: what is there, then every change, as values (see `_session/mirror.py`)."""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from etcd_infra._session.mirror import Changes, Snapshot, open_mirror
from etcd_infra.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from etcd_infra._etcd.model import Event, KeyRange
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.entry import Entry
    from etcd_infra._session.mirror import Mirror

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StateSnapshot(Generic[T]):
    """
    What is there: everything that was told before is replaced by it.

    Attributes:
        revision: At which everything is as told.
        entries: By key.
        missed_after: None for the first one. Else this is a resynchronisation, as etcd's history was
            compacted before it was read here: changes after this revision, up to `revision`, may be missing,
            and show only in what is there now.
        store_reset: The store was restored or wiped, so versions may be lower than those told before.
    """

    revision: int
    entries: dict[str, Entry[T]]
    missed_after: int | None = None
    store_reset: bool = False


@dataclass(frozen=True, slots=True)
class StateChange(Generic[T]):
    """
    One change of one key.

    Attributes:
        entry: What is there now; None: the key was deleted.
        revision: Of the change; several keys that were written at once share it, and come in their order.
    """

    key: str
    entry: Entry[T] | None
    revision: int


class StateWatch(Generic[T]):
    """
    A watch of state, to be iterated over: a `StateSnapshot` first, then a `StateChange` for every change.

    It goes on over reconnects. A consumer that does not keep up costs no memory beyond the backend's bounded
    buffer (4,096 changes, 16 MiB): it gets every change as long as etcd's history lasts, and after that
    another snapshot that says so.
    """

    def __init__(self, space: Space, mirror: Mirror, type: type[T]) -> None:  # noqa: A002
        self._space = space
        self._mirror = mirror
        self._type = type
        self._ready: deque[StateSnapshot[T] | StateChange[T] | CodecError] = deque()

    def __aiter__(self) -> StateWatch[T]:
        return self

    async def __anext__(self) -> StateSnapshot[T] | StateChange[T]:
        """
        Wait for what comes next.

        Raises:
            CodecError: a value does not decode; the next step goes on after it. (A snapshot comes after the
                errors of its entries, and without those.)
            EtcdError: etcd does not let these keys be read any more.

        Cancellation:
            Nothing is lost; call again.
        """
        if self._ready:
            await trio.lowlevel.checkpoint()
        else:
            match await self._mirror.receive():
                case Snapshot() as snapshot:
                    self._take(snapshot)
                case Changes(events):
                    self._ready.extend(map(self._changed, events))
        item = self._ready.popleft()
        if isinstance(item, CodecError):
            raise item
        return item

    def _take(self, snapshot: Snapshot) -> None:
        entries: dict[str, Entry[T]] = {}
        for kv in snapshot.kvs:
            try:
                entries[self._space.name_of(kv)] = self._space.entry(kv, self._type)
            except CodecError as error:
                self._ready.append(error)
        self._ready.append(
            StateSnapshot(snapshot.revision, entries, snapshot.missed_after, snapshot.store_reset)
        )

    def _changed(self, event: Event) -> StateChange[T] | CodecError:
        try:
            entry = None if event.is_delete else self._space.entry(event.kv, self._type)
        except CodecError as error:
            return error
        return StateChange(self._space.name_of(event.kv), entry, event.revision)


@asynccontextmanager
async def open_state_watch(
    space: Space,
    keys: KeyRange,
    type: type[T],  # noqa: A002
) -> AsyncGenerator[StateWatch[T]]:
    """
    Follow `keys`.

    Raises:
        EtcdError: etcd refuses.

    Round trips:
        Two, and one more for each further 256 keys.
    """
    async with open_mirror(space.backend, keys, space.random) as mirror:
        yield StateWatch(space, mirror, type)
