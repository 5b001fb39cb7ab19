"""What a semaphore's keys say of it. Needs no session, and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from etcd_infra._etcd.model import KeyRange, Range, SortTarget
from etcd_infra._primitives.lock_info import holder_of

if TYPE_CHECKING:
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys


@dataclass(frozen=True, slots=True)
class SemaphoreInfo:
    """
    One semaphore, as it was at one revision.

    Attributes:
        name: The semaphore.
        permits: How many there are; None if nobody has ever taken one.
        holders: Node ids of those that have one, the oldest first.
        queue: Who waits, next in line first.
    """

    name: str
    permits: int | None
    holders: tuple[str, ...]
    queue: tuple[str, ...]


async def inspect_semaphore(backend: Backend, keys: Keys, name: str) -> SemaphoreInfo:
    """Describe one semaphore; one round trip."""
    everything = Range(KeyRange.prefix(keys.semaphore(name)), sort_by=SortTarget.CREATE)
    kvs = (await backend.range(everything)).kvs
    permits = next((int(kv.value) for kv in kvs if kv.key == keys.semaphore_permits(name)), None)
    lines = [
        tuple(holder_of(kv) for kv in kvs if kv.key.startswith(line))
        for line in (keys.semaphore_holders(name), keys.semaphore_queue(name))
    ]
    return SemaphoreInfo(name, permits, *lines)
