"""What is left behind: keys, leases and watches in etcd; tasks, threads and descriptors in this process."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from etcd_infra.testing.violation import Violation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from etcd_infra._backends.memory import MemoryEtcd

_DESCRIPTORS = Path("/proc/self/fd")


@dataclass(frozen=True, slots=True)
class Inventory:
    """
    What there is at one moment; made by `take_inventory`.

    Attributes:
        keys, leases: What the store has.
        watches: How many are open.
        tasks: Names of Trio's tasks, one entry each.
        threads: Names of living threads.
        descriptors: What this process's open descriptors lead to.
    """

    keys: tuple[bytes, ...] = ()
    leases: tuple[int, ...] = ()
    watches: int = 0
    tasks: tuple[str, ...] = ()
    threads: tuple[str, ...] = ()
    descriptors: tuple[str, ...] = ()


def take_inventory(etcd: MemoryEtcd | None = None) -> Inventory:
    """
    List what there is; call it in a Trio task.

    Args:
        etcd: The store to look into, besides this process; leases that are due end first.
    """
    inside = Inventory(
        tasks=tuple(sorted(_tasks())),
        threads=tuple(sorted(thread.name for thread in threading.enumerate())),
        descriptors=tuple(sorted(_descriptors())),
    )
    if etcd is None:
        return inside
    etcd.advance()
    snapshot = etcd.store.snapshot()
    return replace(
        inside,
        keys=tuple(kv.key for kv in snapshot.kvs),
        leases=tuple(lease for lease, _, _ in snapshot.leases),
        watches=etcd.open_watches,
    )


def find_leaks(before: Inventory, after: Inventory, *, allowed_keys: Iterable[bytes] = ()) -> list[Violation]:
    """
    Name what is there now and was not before.

    Args:
        before: Taken before the operation began.
        after: Taken after it ended; with leases that it had, before they could have run out.
        allowed_keys: Keys that may be left.
    """
    found = [
        *_more("key", before.keys, tuple(key for key in after.keys if key not in set(allowed_keys))),
        *_more("lease", before.leases, after.leases),
        *_more("task", before.tasks, after.tasks),
        *_more("thread", before.threads, after.threads),
        *_more("descriptor", before.descriptors, after.descriptors),
    ]
    if after.watches > before.watches:
        found.append(f"{after.watches - before.watches} open watches more")
    return [Violation("leak", what) for what in found]


def _more(what: str, before: tuple[object, ...], after: tuple[object, ...]) -> list[str]:
    left = list(after)
    for thing in before:
        if thing in left:
            left.remove(thing)
    return [f"{what} {thing!r}" for thing in left]


def _tasks() -> list[str]:
    found: list[str] = []
    waiting = [trio.lowlevel.current_root_task()]
    while waiting:
        task = waiting.pop()
        if task is not None:
            found.append(task.name)
            waiting.extend(child for nursery in task.child_nurseries for child in nursery.child_tasks)
    return found


def _descriptors() -> list[str]:
    if not _DESCRIPTORS.exists():
        return []
    found: list[str] = []
    for entry in tuple(_DESCRIPTORS.iterdir()):
        try:
            found.append(str(entry.readlink()))
        except OSError:  # the one that listing needed
            continue
    return found
