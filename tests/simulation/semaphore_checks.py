"""The invariants of semaphores: all of the lock's, and how permits are counted and given."""

from __future__ import annotations

from etcd_infra.testing import FaultKind, Violation
from etcd_infra.testing.fences import everybody
from tests.helpers.semaphore_history import Semaphores, misgiven
from tests.simulation.lock_checks import STRAY_COPIES, LockChecks
from tests.simulation.lock_family import LockFamilyProgram
from tests.simulation.locks import KEYS

# For how long after a restore a request may arrive whose sender has not heard of it.
RESTORED_SECONDS = 8.0


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
            taken_as = {}
            for story in self.told_in(number):
                _, name, permits = story.lock.split()
                taken_as[story.token, name.encode()] = int(permits)
            settled = self.run.began_at[number] + (RESTORED_SECONDS if number else 0.0)
            semaphores, since = Semaphores(self.prefix), {}
            for timed in lineage:
                for name, before, after in semaphores.apply(timed.commit, timed.origin, timed.at):
                    if timed.at >= settled and "#" in timed.origin:
                        yield from self._given(
                            timed, before, after, taken_as.get((timed.commit.revision, name))
                        )
                    if before.awaited != after.awaited:
                        if before.awaited is not None:
                            yield from self._awaited(before.awaited, since[name], timed.at)
                        since[name] = timed.at

    def _given(self, timed, before, after, taken_as):
        """Check what one transaction of a process did to a semaphore."""
        node = timed.origin.partition("#")[0]
        for invariant, what in misgiven(before, after, counts=lambda holder: "#" in holder.origin):
            yield Violation(invariant, f"{timed.origin}: {what}", timed.at)
        if after.holders.keys() <= before.holders.keys():
            return
        self.hit("permits", timed.at, node)
        if before.queue:
            self.hit("queue", timed.at, node)
        if taken_as not in {None, after.permits}:
            yield Violation("permits", f"{timed.origin} took one of {taken_as}: {after}", timed.at)

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
