"""The invariants of read-write locks, semaphores and multi-locks: all of the lock's, and those of their kind."""

from __future__ import annotations

from math import inf

from etcd_infra._etcd.keys import WRITER
from etcd_infra.testing import FaultKind, Violation
from etcd_infra.testing.fences import Lines, readers_or_writer, turns
from tests.simulation.lock_checks import CELLS, LockChecks, nothing_left
from tests.simulation.lock_family import LockFamilyProgram, shape_from, shape_of
from tests.simulation.locks import KEYS
from tests.simulation.semaphore_checks import SemaphoreChecks
from tests.simulation.workload import Workload


class RWLockChecks(LockChecks):
    """All checks of a run with read-write locks."""

    prefix = KEYS.rwlocks
    rule = staticmethod(readers_or_writer)
    registers = staticmethod(LockFamilyProgram.registers)

    def __call__(self):
        """Check everything."""
        self.sharing()
        return [*super().__call__(), *self.passing()]

    def sharing(self):
        """Note who reads together with another node: it must really happen."""
        readers = [story for story in self.told_in(0) if story.lock.startswith("read")]
        for story in readers:
            if any(
                other.lock == story.lock
                and other.node != story.node
                and other.granted <= story.granted < (other.leaving or inf)
                for other in readers
            ):
                self.hit("sharing", story.granted, story.node)

    def passing(self):
        """Check that no reader passes a writer that waited already when it came: writers do not starve."""
        deleted = self._deletions()
        for number, lineage in enumerate(self.run.lineages):
            readers = {story.token: story for story in self.told_in(number) if story.lock.startswith("read")}
            lines = Lines(self.prefix, self.rule)
            for timed in lineage:
                for event in timed.commit.events:
                    lines.apply(event)
                story = readers.get(timed.commit.revision)
                if story is None:
                    continue
                for key, token in self._waiting_writers(lines, story):
                    self.hit("passing", story.granted, story.node)
                    gone = deleted.get((number, key, token))
                    if gone is None or gone.commit.revision > story.granted_revision:
                        yield Violation("passing", f"{story} passed {key!r} of {token}", story.granted)

    def _waiting_writers(self, lines, story):
        (line,) = self.registers(story.lock).values()
        owners = lines.owners(line)
        for key, token in lines.places(line).items():
            if key.startswith(line + WRITER) and token not in owners:
                yield key, token


class MultiLockChecks(LockChecks):
    """All checks of a run with multi-locks."""

    registers = staticmethod(LockFamilyProgram.registers)

    def __call__(self):
        """Check everything."""
        return [*super().__call__(), *self.joins(), *self.wholes()]

    def joins(self):
        """Check that whoever asks for several locks comes to all their lines at one revision."""
        for number, lineage in enumerate(self.run.lineages):
            for timed in lineage:
                if timed.at < self.run.began_at[number] or "#" not in timed.origin:
                    continue
                came = {
                    event.key[: event.key.rfind(b"/") + 1]
                    for event in timed.commit.events
                    if event.key.startswith(self.prefix) and not event.is_delete
                }
                # Transactions that travel together are one commit.
                asked = [
                    lines
                    for story in self.stories
                    if story.process == timed.origin
                    and story.asked <= timed.at
                    and (lines := {*self.registers(story.lock).values()}) <= came
                ]
                if came != set().union(*asked):
                    yield Violation("whole", f"{timed.origin} came to no more than {came}", timed.at)

    def wholes(self):
        """Check that all of the locks were owned at one moment, and that the fence proves each."""
        for number, lineage in enumerate(self.run.lineages):
            owned = {
                (line, turn.token): turn
                for line, found in turns([timed.commit for timed in lineage], self.prefix).items()
                for turn in found
            }
            for story in self.told_in(number):
                lines = [*self.registers(story.lock).values()]
                if len(lines) > 1:
                    self.hit("whole", story.granted, story.node)
                proven = [key[: key.rfind(b"/") + 1] for key in story.keys]
                mine = [turn for line in lines if (turn := owned.get((line, story.token))) is not None]
                if sorted(lines) != sorted(proven) or len(mine) < len(lines):
                    yield Violation("whole", f"{story} owned {mine}, and proves {proven}", story.granted)
                elif max(turn.begin for turn in mine) >= min(turn.end or inf for turn in mine):
                    yield Violation("whole", f"{story} never owned all at one moment: {mine}", story.granted)


def checks_of(run):
    """Make the checker of a run: of which kind it is, the prefix of its lines tells."""
    kinds = (RWLockChecks, SemaphoreChecks, MultiLockChecks)
    return next(kind for kind in kinds if kind.prefix == run.settings.prefix)(run)


def at_rest(simulation):
    """Check that no place is left in any line."""
    return nothing_left(simulation, (KEYS.locks, KEYS.rwlocks, KEYS.semaphores))


LOCK_FAMILY_CELLS = CELLS | {
    FaultKind.KILL: ("L4", "L6", "permits", "whole", "passing"),
    FaultKind.PAUSE: ("L1", "L7", "permits", "whole"),
    FaultKind.PARTITION: ("L1", "L7", "permits", "whole"),
    FaultKind.LOST_ANSWER: ("L3", "L6", "permits", "whole"),
    FaultKind.LATE: ("L1", "L3", "L6", "permits", "whole"),
    FaultKind.DUPLICATE: ("L3", "L8", "permits", "whole"),
    FaultKind.CANCEL: ("L6", "L8", "permits", "whole"),
}
LOCK_FAMILY = Workload(
    "lock_family", shape_of, shape_from, LockFamilyProgram, checks_of, at_rest, LOCK_FAMILY_CELLS
)
