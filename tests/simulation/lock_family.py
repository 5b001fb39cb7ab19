"""Programs that contend for what is more than a lock: read-write locks, semaphores, several locks at once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random

import trio

from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra.errors import ConflictError, EtcdError
from etcd_infra.testing import FaultKind
from tests.simulation.locks import DATA, KEYS, LockProgram, Shape, settings_of
from tests.simulation.locks import shape_of as lock_shape_of

# Nobody in a queue races another one for a permit; those that attempt do.
ATTEMPTS = {"rwlock": 1, "semaphore": 4, "multi-lock": 1}
WAYS = ("block", "block", "block", "by hand", "in time")
# Each kind, and below which prefix its lines are.
PREFIXES = {"rwlock": KEYS.rwlocks, "semaphore": KEYS.semaphores, "multi-lock": KEYS.locks}
KINDS = tuple(PREFIXES)


@dataclass(frozen=True)
class FamilyShape(Shape):
    """
    What a seed decides besides its faults.

    What is taken is named by a text: ``read job``, ``write job``, ``semaphore job 2`` (of two permits),
    ``locks a b c``.
    """

    kind: str = ""


def shape_of(seed, *, kinds=tuple(FaultKind)):
    """Draw a run's shape; one run has one kind, by turns."""
    kind = KINDS[seed % len(KINDS)]
    draw = Random(f"{seed}/family")
    shape = lock_shape_of(seed, kinds=kinds)
    # Some of them share, so that there must be more tasks until somebody waits.
    tasks = max(shape.tasks, draw.choice((1, 2, 2, 3)))
    common = vars(shape) | {"locks": _draw_locks(kind, draw), "tasks": tasks}
    settings = replace(shape.settings, prefix=PREFIXES[kind])
    return FamilyShape(**(common | {"settings": settings}), kind=kind)


def _draw_locks(kind, draw):
    if kind == "rwlock":
        one = draw.choice((("read job", "write job"), ("read job", "read job", "write job")))
        return (*one, *draw.choice(((), (), ("read job2", "write job2"))))
    if kind == "semaphore":
        permits = draw.choice((1, 2, 2, 3))
        # Who asks for another number of permits is refused while it is in use.
        others = draw.choice(((), (), (f"semaphore job {permits + 1}",), ("semaphore job2 1",)))
        return (*([f"semaphore job {permits}"] * 2), *others)
    sets = [draw.sample("abcd", draw.choice((1, 2, 2, 3))) for _ in range(draw.choice((2, 3, 4)))]
    return tuple(" ".join(("locks", *names)) for names in sets)


def shape_from(*, nodes, seconds, locks, kind, **others):
    """Make a shape of its fields as JSON has them."""
    settings = settings_of(tuple(nodes), seconds, others["ttl"], prefix=PREFIXES[kind])
    return FamilyShape(locks=tuple(locks), settings=settings, kind=kind, **others)


class LockFamilyProgram(LockProgram):
    """The program of one run."""

    refusals = (*LockProgram.refusals, ConflictError)

    @property
    def ways(self):
        """List the ways of taking it, as often as each should be drawn."""
        return (*WAYS, *["attempt"] * ATTEMPTS[self.shape.kind])

    def lock_of(self, infra, way, name):
        """Make what a name says."""
        what, *names = name.split()
        if what == "locks":
            return infra.multi_lock(*names)
        if what == "semaphore":
            return infra.semaphore(names[0], int(names[1]))
        return getattr(infra.rwlock(names[0]), what)

    async def _work(self, process, infra):
        await super()._work(process, infra)
        # Where several hold it together, nobody waits for a place that the janitor still has to remove.
        places = Range(KeyRange.prefix(PREFIXES[self.shape.kind]))
        while True:
            with suppress(EtcdError):
                kvs = (await infra.backend.range(places)).kvs
                if infra.session.lease.id not in {kv.lease for kv in kvs}:
                    return
            await trio.sleep(0.1)

    @staticmethod
    def registers(name):
        """Name what is written, each with the line that decides who may."""
        what, *names = name.split()
        if what == "locks":
            return {DATA + one.encode(): KEYS.lock_line(one) for one in names}
        line = KEYS.semaphore_holders if what == "semaphore" else KEYS.rwlock_line
        return {DATA + names[0].encode(): line(names[0])}
