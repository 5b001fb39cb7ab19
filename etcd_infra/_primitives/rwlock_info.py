"""What the line of a read-write lock says of it. Needs no session, and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from etcd_infra._etcd.keys import is_writer
from etcd_infra._etcd.model import KeyRange, Range, SortTarget
from etcd_infra._primitives._who import least_ttl, who_is
from etcd_infra._primitives.lock_info import by_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._etcd.model import KeyValue


@dataclass(frozen=True, slots=True)
class RWLockInfo:
    """
    One read-write lock, as its line was at one revision.

    Attributes:
        name: The lock.
        writer: Node id of who holds it to write; None if nobody does.
        readers: Node ids of those that hold it to read, the oldest first.
        queue: Who waits, next in line first, as "node to read" or "node to write".
        ttl: Whole seconds left of the holders' leases, the least of them; None if it is free.
        acquired_at: Unix seconds, by its own clock, when the oldest holder joined the line.
        queued_at: The same for each in the queue.
    """

    name: str
    writer: str | None
    readers: tuple[str, ...]
    queue: tuple[str, ...]
    ttl: int | None = None
    acquired_at: float | None = None
    queued_at: tuple[float | None, ...] = ()


async def inspect_rwlock(backend: Backend, keys: Keys, name: str) -> RWLockInfo:
    """Describe one read-write lock; one round trip, and one per holder's lease."""
    line = Range(KeyRange.prefix(keys.rwlock_line(name)), sort_by=SortTarget.CREATE)
    return await _describe(backend, name, (await backend.range(line)).kvs)


async def inspect_rwlocks(backend: Backend, keys: Keys) -> tuple[RWLockInfo, ...]:
    """Describe every read-write lock that is held, by name; one round trip, and one per holder's lease."""
    everything = Range(KeyRange.prefix(keys.rwlocks), sort_by=SortTarget.CREATE)
    lines = by_name((await backend.range(everything)).kvs, keys.parse_rwlock)
    return tuple([await _describe(backend, name, kvs) for name, kvs in lines.items()])


def count_holders(kvs: Sequence[KeyValue]) -> int:
    """Say how many of a line, in order, hold the lock: one writer, or the readers up to the first."""
    for ahead, kv in enumerate(kvs):
        if is_writer(kv.key):
            return max(1, ahead)
    return len(kvs)


async def _describe(backend: Backend, name: str, kvs: Sequence[KeyValue]) -> RWLockInfo:
    held = count_holders(kvs)
    people = [who_is(kv) for kv in kvs]
    writes = bool(kvs) and is_writer(kvs[0].key)
    waiting = [
        f"{who.node} to {'write' if is_writer(kv.key) else 'read'}"
        for kv, who in zip(kvs[held:], people[held:], strict=True)
    ]
    return RWLockInfo(
        name,
        writer=people[0].node if writes else None,
        readers=() if writes else tuple(who.node for who in people[:held]),
        queue=tuple(waiting),
        ttl=await least_ttl(backend, kvs[:held]),
        acquired_at=people[0].since if people else None,
        queued_at=tuple(who.since for who in people[held:]),
    )
