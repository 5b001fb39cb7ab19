"""What a line says of a lock: who holds it, who waits. Needs no session, and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from etcd_infra._etcd.keys import place_lease
from etcd_infra._etcd.model import KeyRange, KeyValue, Range, SortTarget

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """

    name: str
    holder: str | None = None
    token: int | None = None
    queue: tuple[str, ...] = ()
    ttl: int | None = None
    acquired_at: float | None = None


class _Who(msgspec.Struct):
    node: str
    since: float | None = None


async def inspect_lock(backend: Backend, keys: Keys, name: str) -> LockInfo:
    """Describe one lock; two round trips."""
    line = Range(KeyRange.prefix(keys.lock_line(name)), sort_by=SortTarget.CREATE)
    return await _describe(backend, name, (await backend.range(line)).kvs)


async def inspect_locks(backend: Backend, keys: Keys) -> tuple[LockInfo, ...]:
    """Describe every lock that somebody holds, by name; one round trip, and one per lock."""
    everything = Range(KeyRange.prefix(keys.locks), sort_by=SortTarget.CREATE)
    lines: dict[str, list[KeyValue]] = {}
    for kv in (await backend.range(everything)).kvs:
        name = keys.parse_lock(kv.key)
        if name is not None:
            lines.setdefault(name, []).append(kv)
    return tuple([await _describe(backend, name, kvs) for name, kvs in sorted(lines.items())])


async def _describe(backend: Backend, name: str, kvs: Sequence[KeyValue]) -> LockInfo:
    if not kvs:
        return LockInfo(name)
    owner = kvs[0]
    ttl = (await backend.lease_time_to_live(owner.lease)).ttl if owner.lease else None
    return LockInfo(
        name,
        holder=_who(owner).node,
        token=owner.create_revision,
        queue=tuple(_who(kv).node for kv in kvs[1:]),
        ttl=ttl,
        acquired_at=_who(owner).since,
    )


def holder_of(kv: KeyValue) -> str:
    """Name the node that stands at a place; for a foreign client its lease."""
    return _who(kv).node


def _who(kv: KeyValue) -> _Who:
    try:
        return msgspec.json.decode(kv.value, type=_Who)
    except msgspec.DecodeError:  # etcdctl's and Go's values are empty
        lease = kv.lease or place_lease(kv.key) or 0
        return _Who(f"lease {lease:x}")
