"""The invariants of semaphores: all of the lock's, and how permits are counted and given."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from etcd_infra.testing import FaultKind, Violation
from etcd_infra.testing.fences import everybody
from tests.simulation.lock_checks import STRAY_COPIES, LockChecks
from tests.simulation.lock_family import LockFamilyProgram
from tests.simulation.locks import KEYS

# For how long after a restore a request may arrive whose sender has not heard of it.
RESTORED_SECONDS = 8.0


@dataclass(frozen=True, order=True)
class Standing:
    """A key of a semaphore: its create revision, its name, who put it and when."""

    created: int
    key: bytes
    origin: str
    at: float


@dataclass
class Semaphore:
    """One semaphore while a history is replayed; `permits` is what is stored, 0 if nothing is."""

    queue: dict[bytes, Standing] = field(default_factory=dict)
    holders: dict[bytes, Standing] = field(default_factory=dict)
    permits: int = 0

    def copy(self):
        """Return what it is now."""
        return Semaphore({**self.queue}, {**self.holders}, self.permits)

    def apply(self, event, timed):
        """Take in one event."""
        part = event.key.split(b"/")[3]
        if part == b"permits":
            self.permits = 0 if event.is_delete else int(event.kv.value)
            return
        places = self.queue if part == b"queue" else self.holders
        if event.is_delete:
            places.pop(event.key, None)
        else:
            places[event.key] = Standing(event.kv.create_revision, event.key, timed.origin, timed.at)

    @property
    def head(self):
        """Return who is first in the queue."""
        return min(self.queue.values(), default=None)

    @property
    def awaited(self):
        """Return who should take a permit that is left; None: nobody waits, or none is."""
        return self.head if len(self.holders) < self.permits else None


class SemaphoreChecks(LockChecks):
    """All checks of a run with semaphores."""

    prefix = KEYS.semaphores
    rule = staticmethod(everybody)
    registers = staticmethod(LockFamilyProgram.registers)

    def __call__(self):
        """Check everything."""
        return [*super().__call__(), *self.permits()]

    def permits(self):
        """Check that permits are counted, compared, given in the order of the queue, and never lie idle."""
        for number, lineage in enumerate(self.run.lineages):
            wanted = {}
            for story in self.told_in(number):
                _, name, permits = story.lock.split()
                wanted[story.token, name.encode()] = int(permits)
            settled = self.run.began_at[number] + (RESTORED_SECONDS if number else 0.0)
            semaphores = defaultdict(Semaphore)
            since = {}
            for timed in lineage:
                mine = defaultdict(list)
                for event in timed.commit.events:
                    if event.key.startswith(self.prefix):
                        mine[event.key.split(b"/")[2]].append(event)
                for name, events in mine.items():
                    now = semaphores[name]
                    before = now.copy()
                    for event in events:
                        now.apply(event, timed)
                    if timed.at >= settled and "#" in timed.origin:
                        taken_as = wanted.get((timed.commit.revision, name), now.permits)
                        yield from self._given(timed, before, now, taken_as)
                    if before.awaited != now.awaited:
                        if before.awaited is not None:
                            yield from self._awaited(before.awaited, since[name], timed.at)
                        since[name] = timed.at

    def _given(self, timed, before, now, wanted):
        """Check what one transaction of a process did to a semaphore."""
        node = timed.origin.partition("#")[0]
        if before.permits not in {0, now.permits} and before.holders:
            yield Violation("permits", f"{before} is in use, and has {now.permits} permits now", timed.at)
        came = now.holders.keys() - before.holders.keys()
        if not came:
            return
        self.hit("permits", timed.at, node)
        # What strangers put in vain takes permits away, and gives none.
        counted = [place for place in now.holders.values() if "#" in place.origin]
        if len(counted) > now.permits or len(came) > 1:
            yield Violation("permits", f"{timed.origin} made it {now}", timed.at)
        if wanted != now.permits:
            yield Violation("permits", f"{timed.origin} took one of {now.permits}", timed.at)
        left = before.queue.keys() - now.queue.keys()
        if before.head is None:
            return
        self.hit("queue", timed.at, node)
        if left != {before.head.key}:
            yield Violation("queue", f"{timed.origin} left {left}, and the first was {before.head}", timed.at)

    def _awaited(self, head, begin, end):
        """Check that the head of the queue took a permit, or went, as soon as one was left."""
        node, _, life = head.origin.partition("#")
        kills = [
            strike
            for strike in self.run.strikes
            if strike.node == node and strike.kind is FaultKind.KILL and strike.begin <= end
        ]
        strays = any(strike.kind in STRAY_COPIES for strike in self.run.strikes)
        # Whoever was killed, or has lost its session, stands there until its lease ends.
        if not life or len(kills) != int(life) - 1 or strays or not self._undisturbed(node, head.at, end):
            return
        self.hit("L4", begin, "")
        if end > begin + self._hand_over_seconds(begin, end):
            yield Violation("L4", f"a permit was left at {begin}, and {head} did not take it", end)
