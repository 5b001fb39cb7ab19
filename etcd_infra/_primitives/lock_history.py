"""
Who owned a lock, as far back as etcd remembers. Needs no session, and writes nothing.

Algorithm
    1. Read the line: what it is now.
    2. Watch it from the first revision, or from where compaction left off, beginning with what was there then.
       Who is first in line owns the lock, until its key is deleted.
    3. etcd does not say when a watch has caught up. It has when the line is what was read, and nothing has come
       for half a second (etcd looks for watches that lag behind ten times a second).

Source
    etcd ``server/storage/mvcc/watchable_store.go`` (how watches catch up).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.model import KeyRange, Range, SortTarget
from etcd_infra._primitives._who import who_is
from etcd_infra.errors import CompactedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.model import Event, KeyValue

QUIET_SECONDS: Final = 0.5
PATIENCE_SECONDS: Final = 5.0
TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class Tenure:
    """
    One owner's time.

    Attributes:
        holder: Node id of the owner; for a foreign client's key its lease.
        token: Its fencing token, and the revision at which it joined the line.
        joined_at: Unix seconds, by its own clock, when it joined; None if foreign.
        from_revision: When its turn came, or the first revision that is remembered if that was earlier.
        to_revision: When its key was deleted, by itself or by the end of its lease; None: it owns it now.
    """

    holder: str
    token: int
    joined_at: float | None
    from_revision: int
    to_revision: int | None


@dataclass(frozen=True, slots=True)
class LockHistory:
    """
    What etcd remembers of a lock's owners.

    Attributes:
        name: The lock.
        since_revision: From where on it is remembered; what was before is compacted.
        tenures: One per owner, in the order of their turns.
    """

    name: str
    since_revision: int
    tenures: tuple[Tenure, ...]


async def lock_history(backend: Backend, name: str, line: KeyRange) -> LockHistory:
    """
    Replay the owners of a lock.

    Raises:
        CompactedError: history is compacted faster than it can be read.

    Round trips:
        One and a watch; with compacted history another two and a watch. Half a second at least.
    """
    since = 1
    for _ in range(TRIES - 1):
        try:
            return await _replayed(backend, name, line, since)
        except CompactedError as error:
            since = max(since, error.compact_revision)
    return await _replayed(backend, name, line, since)


async def _replayed(backend: Backend, name: str, line: KeyRange, since: int) -> LockHistory:
    replay = _Replay(since)
    if since > 1:
        began = await backend.range(Range(line, sort_by=SortTarget.CREATE, revision=since))
        replay.begin(began.kvs)
    now = await backend.range(Range(line, keys_only=True))
    places = {kv.key: kv.create_revision for kv in now.kvs}
    async with backend.watch(line, start_revision=since + 1 if since > 1 else 1) as batches:
        patience = trio.current_time() + PATIENCE_SECONDS
        while replay.revision < now.revision:
            with trio.move_on_after(QUIET_SECONDS) as quiet:
                batch = await batches.receive()
                replay.apply(batch.events)
                if not batch.events and not batch.created:
                    break  # a progress notification
                patience = trio.current_time() + PATIENCE_SECONDS
            is_late = trio.current_time() >= patience
            if quiet.cancelled_caught and (replay.places == places or is_late):
                break
    return LockHistory(name, since, replay.tenures())


class _Replay:
    """A line that is changed by one event after the other, and who was first in it."""

    def __init__(self, since: int) -> None:
        self.revision = since
        self._line: dict[bytes, KeyValue] = {}
        self._done: list[Tenure] = []
        self._owner: tuple[KeyValue, int] | None = None

    @property
    def places(self) -> dict[bytes, int]:
        """The keys in line, with their create revisions."""
        return {key: kv.create_revision for key, kv in self._line.items()}

    def begin(self, kvs: Iterable[KeyValue]) -> None:
        """Take in what was there in the beginning."""
        self._line = {kv.key: kv for kv in kvs}
        self._look(self.revision)

    def apply(self, events: Iterable[Event]) -> None:
        """Take in what happened; events of one revision happen at once."""
        for event in events:
            if event.kv.mod_revision > self.revision:
                self._look(self.revision)
                self.revision = event.kv.mod_revision
            if event.is_delete:
                self._line.pop(event.kv.key, None)
            else:
                self._line[event.kv.key] = event.kv
        self._look(self.revision)

    def tenures(self) -> tuple[Tenure, ...]:
        """Return all owners, the present one at the end."""
        last = [] if self._owner is None else [_tenure(*self._owner, None)]
        return (*self._done, *last)

    def _look(self, revision: int) -> None:
        first = min(self._line.values(), key=lambda kv: kv.create_revision, default=None)
        token = first.create_revision if first else 0
        if self._owner is not None and self._owner[0].create_revision != token:
            self._done.append(_tenure(*self._owner, revision))
            self._owner = None
        if first is not None and self._owner is None:
            self._owner = first, revision


def _tenure(kv: KeyValue, began: int, ended: int | None) -> Tenure:
    who = who_is(kv)
    return Tenure(who.node, kv.create_revision, who.since, began, ended)
