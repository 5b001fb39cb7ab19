"""What the line of a read-write lock says of it. Needs no session, and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from etcd_infra._etcd.keys import WRITER
from etcd_infra._etcd.model import KeyRange, Range, SortTarget
from etcd_infra._primitives.lock_info import holder_of

if TYPE_CHECKING:
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys


@dataclass(frozen=True, slots=True)
class RWLockInfo:
    """
    One read-write lock, as its line was at one revision.

    Attributes:
        name: The lock.
        writer: Node id of who holds it to write; None if nobody does.
        readers: Node ids of those that hold it to read, the oldest first.
        queue: Who waits, next in line first, as "node to read" or "node to write".
    """

    name: str
    writer: str | None
    readers: tuple[str, ...]
    queue: tuple[str, ...]


async def inspect_rwlock(backend: Backend, keys: Keys, name: str) -> RWLockInfo:
    """Describe one read-write lock; one round trip."""
    line = keys.rwlock_line(name)
    kvs = (await backend.range(Range(KeyRange.prefix(line), sort_by=SortTarget.CREATE))).kvs
    places = [(holder_of(kv), kv.key.startswith(line + WRITER)) for kv in kvs]
    readers = tuple(node for node, _ in takewhile(lambda place: not place[1], places))
    writer = places[0][0] if places and places[0][1] else None
    waiting = places[len(readers) + (writer is not None) :]
    queue = tuple(f"{node} to {'write' if writes else 'read'}" for node, writes in waiting)
    return RWLockInfo(name, writer, readers, queue)
