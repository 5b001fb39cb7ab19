"""What a semaphore's keys say of it. Needs no session, and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from etcd_infra._etcd.model import KeyRange, Range, SortTarget
from etcd_infra._primitives._who import least_ttl, who_is
from etcd_infra._primitives.lock_info import by_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._etcd.model import KeyValue


@dataclass(frozen=True, slots=True)
class SemaphoreInfo:
    """
    One semaphore, as it was at one revision.

    Attributes:
        name: The semaphore.
        permits: How many there are; None if nobody has ever taken one, or somebody else's value says it.
        holders: Node ids of those that have one, the oldest first.
        queue: Who waits, next in line first.
        ttl: Whole seconds left of the holders' leases, the least of them; None if there is no holder.
        acquired_at: Unix seconds, by its own clock, when the oldest holder began to ask.
        queued_at: The same for each in the queue.
    """

    name: str
    permits: int | None
    holders: tuple[str, ...]
    queue: tuple[str, ...]
    ttl: int | None = None
    acquired_at: float | None = None
    queued_at: tuple[float | None, ...] = ()


async def inspect_semaphore(backend: Backend, keys: Keys, name: str) -> SemaphoreInfo:
    """Describe one semaphore; one round trip, and one per holder's lease."""
    everything = Range(KeyRange.prefix(keys.semaphore(name)), sort_by=SortTarget.CREATE)
    return await _describe(backend, keys, name, (await backend.range(everything)).kvs)


async def inspect_semaphores(backend: Backend, keys: Keys) -> tuple[SemaphoreInfo, ...]:
    """Describe every semaphore that was ever used, by name; one round trip, and one per holder's lease."""
    everything = Range(KeyRange.prefix(keys.semaphores), sort_by=SortTarget.CREATE)
    found = by_name((await backend.range(everything)).kvs, keys.parse_semaphore)
    return tuple([await _describe(backend, keys, name, kvs) for name, kvs in found.items()])


async def _describe(backend: Backend, keys: Keys, name: str, kvs: Sequence[KeyValue]) -> SemaphoreInfo:
    holders, queue = (
        [kv for kv in kvs if kv.key.startswith(line)]
        for line in (keys.semaphore_holders(name), keys.semaphore_queue(name))
    )
    permits = [kv.value for kv in kvs if kv.key == keys.semaphore_permits(name) and kv.value.isdigit()]
    return SemaphoreInfo(
        name,
        permits=int(permits[0]) if permits else None,
        holders=tuple(who_is(kv).node for kv in holders),
        queue=tuple(who_is(kv).node for kv in queue),
        ttl=await least_ttl(backend, holders),
        acquired_at=who_is(holders[0]).since if holders else None,
        queued_at=tuple(who_is(kv).since for kv in queue),
    )
