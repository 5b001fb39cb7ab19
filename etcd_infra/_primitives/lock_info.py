"""What a line says of a lock: who holds it, who waits. Needs no session, and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from etcd_infra._etcd.model import KeyRange, KeyValue, Range, SortTarget
from etcd_infra._primitives._who import least_ttl, who_is

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys


@dataclass(frozen=True, slots=True)
class LockInfo:
    """
    One lock, as its line was at one revision.

    Attributes:
        name: The lock.
        holder: Node id of the owner; for a foreign client's key its lease; None if the lock is free.
        token: The owner's fencing token; None if free.
        queue: Who waits, next in line first.
        ttl: Whole seconds left of the owner's lease, as the server says; None if free.
        acquired_at: Unix seconds, by the owner's clock, when it joined the line (it says nothing of its
            own about when its turn came); None if free or foreign.
        queued_at: The same for each in the queue.
    """

    name: str
    holder: str | None = None
    token: int | None = None
    queue: tuple[str, ...] = ()
    ttl: int | None = None
    acquired_at: float | None = None
    queued_at: tuple[float | None, ...] = ()


async def inspect_lock(backend: Backend, keys: Keys, name: str) -> LockInfo:
    """Describe one lock; two round trips."""
    line = Range(KeyRange.prefix(keys.lock_line(name)), sort_by=SortTarget.CREATE)
    return await _describe(backend, name, (await backend.range(line)).kvs)


async def inspect_locks(backend: Backend, keys: Keys) -> tuple[LockInfo, ...]:
    """Describe every lock that somebody holds, by name; one round trip, and one per lock."""
    everything = Range(KeyRange.prefix(keys.locks), sort_by=SortTarget.CREATE)
    lines = by_name((await backend.range(everything)).kvs, keys.parse_lock)
    return tuple([await _describe(backend, name, kvs) for name, kvs in lines.items()])


def by_name(
    kvs: Sequence[KeyValue], parse: Callable[[bytes], str | None], names: Sequence[str] = ()
) -> dict[str, list[KeyValue]]:
    """Sort keys by the name of what they belong to, those of `names` included that have no keys."""
    found: dict[str, list[KeyValue]] = {name: [] for name in names}
    for kv in kvs:
        name = parse(kv.key)
        if name is not None:
            found.setdefault(name, []).append(kv)
    return dict(sorted(found.items()))


async def _describe(backend: Backend, name: str, kvs: Sequence[KeyValue]) -> LockInfo:
    if not kvs:
        return LockInfo(name)
    owner, *queue = [who_is(kv) for kv in kvs]
    return LockInfo(
        name,
        holder=owner.node,
        token=kvs[0].create_revision,
        queue=tuple(who.node for who in queue),
        ttl=await least_ttl(backend, kvs[:1]),
        acquired_at=owner.since,
        queued_at=tuple(who.since for who in queue),
    )
