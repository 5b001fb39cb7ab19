"""
Who waits for each other in a ring, across locks, read-write locks and semaphores. Writes nothing.

Algorithm
    1. Read all lines at one revision.
    2. Whoever waits for nothing gets on; and so does whoever waits only for those that get on: in a lock's line
       all that are ahead, to read all writers ahead, and in a semaphore's all that are ahead and *some* holder.
       What is left when nobody else gets on is stuck for good, unless a hold is lost or given up.
    3. Following whom each one of these waits for leads into a ring.

Source
    R. C. Holt, "Some deadlock properties of computer systems" (reduction of a wait-for graph).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from etcd_infra._etcd.keys import is_writer
from etcd_infra._etcd.model import KeyRange, Range, SortTarget, Txn
from etcd_infra._primitives._cas import found_in
from etcd_infra._primitives._who import Who, who_is
from etcd_infra._primitives.lock_info import by_name
from etcd_infra._primitives.rwlock_info import count_holders

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._etcd.model import KeyValue


@dataclass(frozen=True, slots=True)
class CycleInfo:
    """
    A ring of tasks that wait for each other.

    Attributes:
        nodes: The node ids, each waiting for the next, and the last for the first.
        waits: What each of them waits for, as "lock job".
    """

    nodes: tuple[str, ...]
    waits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Wait:
    """One task waits: of each group somebody must get on."""

    who: Who
    what: str
    groups: tuple[tuple[Who, ...], ...]

    def blockers(self, stuck: Collection[str]) -> list[Who]:
        """Return those that it waits for in vain, if `stuck` never get on."""
        return [group[0] for group in self.groups if group and all(blocker.task in stuck for blocker in group)]


async def inspect_cycles(backend: Backend, keys: Keys) -> tuple[CycleInfo, ...]:
    """Find every ring; one round trip."""
    looks = tuple(
        Range(KeyRange.prefix(prefix), sort_by=SortTarget.CREATE)
        for prefix in (keys.locks, keys.rwlocks, keys.semaphores)
    )
    answer = await backend.txn(Txn(success=looks))
    locks, rwlocks, semaphores = map(found_in, answer.results)
    waits = [
        *_of_locks(by_name(locks, keys.parse_lock)),
        *_of_rwlocks(by_name(rwlocks, keys.parse_rwlock)),
        *_of_semaphores(keys, by_name(semaphores, keys.parse_semaphore)),
    ]
    return tuple(_rings(waits))


def _of_locks(lines: dict[str, list[KeyValue]]) -> Iterator[_Wait]:
    for name, kvs in lines.items():
        people = [who_is(kv) for kv in kvs]
        for ahead in range(1, len(people)):
            yield _Wait(people[ahead], f"lock {name}", _each(people[:ahead]))


def _of_rwlocks(lines: dict[str, list[KeyValue]]) -> Iterator[_Wait]:
    for name, kvs in lines.items():
        for ahead in range(count_holders(kvs), len(kvs)):
            writes = is_writer(kvs[ahead].key)
            before = [who_is(kv) for kv in kvs[:ahead] if writes or is_writer(kv.key)]
            yield _Wait(who_is(kvs[ahead]), f"rwlock {name}", _each(before))


def _of_semaphores(keys: Keys, found: dict[str, list[KeyValue]]) -> Iterator[_Wait]:
    for name, kvs in found.items():
        holders = tuple(who_is(kv) for kv in kvs if kv.key.startswith(keys.semaphore_holders(name)))
        queue = [who_is(kv) for kv in kvs if kv.key.startswith(keys.semaphore_queue(name))]
        for ahead, who in enumerate(queue):
            yield _Wait(who, f"semaphore {name}", (*_each(queue[:ahead]), holders))


def _each(people: Sequence[Who]) -> tuple[tuple[Who, ...], ...]:
    return tuple((who,) for who in reversed(people))


def _rings(waits: Sequence[_Wait]) -> list[CycleInfo]:
    stuck = {wait.who.task for wait in waits}
    while moving := stuck - {wait.who.task for wait in waits if wait.blockers(stuck)}:
        stuck -= moving
    next_of: dict[str, tuple[_Wait, Who]] = {}
    for wait in waits:
        if blockers := wait.blockers(stuck):
            next_of.setdefault(wait.who.task, (wait, blockers[0]))
    rings: list[CycleInfo] = []
    seen: set[str] = set()
    for start in next_of:
        path: list[str] = []
        task = start
        while task not in seen:
            seen.add(task)
            path.append(task)
            task = next_of[task][1].task
        if task in path:
            ring = [next_of[member][0] for member in path[path.index(task) :]]
            rings.append(CycleInfo(tuple(w.who.node for w in ring), tuple(w.what for w in ring)))
    return rings
