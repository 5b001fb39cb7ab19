"""The election's invariants: all of the lock's, and E2 to E4, on what really happened in a simulated run."""

from __future__ import annotations

import json
from collections import defaultdict

from etcd_infra._etcd.keys import place_lease
from etcd_infra.testing import FaultKind, Violation
from tests.simulation.elections import QUORUM, ElectionProgram, shape_from, shape_of
from tests.simulation.lock_checks import CELLS, RESETS, LockChecks, nothing_left
from tests.simulation.locks import KEYS
from tests.simulation.workload import Workload


class ElectionChecks(LockChecks):
    """All checks of one run."""

    prefix = KEYS.elections
    registers = staticmethod(ElectionProgram.registers)

    def __call__(self):
        """Check everything."""
        return [
            *super().__call__(),
            *self.observers(),
            *self.pairs(),
            *self.proposals(),
            *self.new_keys(),
            *self.quorums(),
        ]

    def observers(self):
        """E2: terms that an observer sees never decrease, and are those of keys that were first in line."""
        if any(strike.kind in RESETS for strike in self.run.strikes):
            return
        ever_first = {token for (_, token) in self._turns(len(self.run.lineages) - 1)}
        last = defaultdict(int)
        for note in self.run.notes:
            if note.what != "observed" or not note.facts["term"]:
                continue
            who = (note.process, note.facts["election"], note.facts["observer"])
            self.hit("E2", note.at, note.process.partition("#")[0])
            if note.facts["term"] < last[who]:
                yield Violation("E2", f"{who} saw {note.facts['term']} after {last[who]}", note.at)
            if note.facts["term"] not in ever_first:
                yield Violation("E2", f"{who} saw a leader {note.facts['term']} that was none", note.at)
            last[who] = note.facts["term"]

    def pairs(self):
        """Check that each leadership begins once and ends once, and that partitions and healings take turns."""
        led = {}
        partitioned = {}
        for note in self.run.notes:
            if note.what != "transition":
                continue
            kind, who = note.facts["kind"], (note.process, note.facts["election"])
            leadership = (*who, note.facts["term"])
            if kind == "became-leader":
                wrong = led.get(leadership) is True
                led[leadership] = True
            elif kind == "lost":
                wrong = led.get(leadership) is not True
                led[leadership] = False
            else:
                wrong = partitioned.get(who, False) is (kind == "partitioned")
                partitioned[who] = kind == "partitioned"
            if wrong:
                yield Violation("transitions", f"{who}: {kind} {note.facts['term']} out of turn", note.at)

    def proposals(self):
        """E1: a proposal is only ever put to a key that is there, and keeps its lease."""
        for number, lineage in enumerate(self.run.lineages):
            for timed in lineage:
                if timed.at < self.run.began_at[number] or "#" not in timed.origin:
                    continue
                for event in timed.commit.events:
                    if event.is_delete or not event.key.startswith(self.prefix):
                        continue
                    if event.kv.version > 1:
                        self.hit("E1", timed.at, timed.origin.partition("#")[0])
                    if event.kv.lease != place_lease(event.key):
                        yield Violation("E1", f"{event.kv} hangs on no lease, or another one", timed.at)

    def new_keys(self):
        """E4: nobody who lost a session leads by a key of that session."""
        lost_at = {}
        for note in self.run.notes:
            if note.what == "granted":
                key = note.facts["key"]
                if key in lost_at:
                    yield Violation("E4", f"{key!r} was granted again, after {lost_at[key]}", note.at)
                self.hit("E4", note.at, note.process.partition("#")[0])
            elif note.what == "failed":
                story = next((s for s in self.stories if s.operation == note.facts["operation"]), None)
                if story is not None and story.key:
                    lost_at[story.key] = note.at

    def quorums(self):
        """Check that so many distinct nodes were members when a place was taken that needs a quorum."""
        for number, lineage in enumerate(self.run.lineages):
            needed = {
                story.token: story
                for story in self.stories
                if story.way == "quorum" and story.granted_lineage == number == story.lineage
            }
            members = {}
            for timed in lineage:
                for event in timed.commit.events:
                    if event.key.startswith(KEYS.members) and event.is_delete:
                        members.pop(event.key, None)
                    elif event.key.startswith(KEYS.members):
                        members[event.key] = json.loads(event.kv.value)["node"]
                    elif event.key.startswith(self.prefix) and event.revision in needed and not event.is_delete:
                        story = needed[event.revision]
                        self.hit("quorum", timed.at, story.node)
                        if len(set(members.values())) < QUORUM:
                            yield Violation("quorum", f"{story} joined among {members}", timed.at)


def at_rest(simulation):
    """Check that neither a place nor a registration is left."""
    return nothing_left(simulation, (KEYS.elections, KEYS.members))


ELECTION_CELLS = CELLS | {
    FaultKind.PARTITION: ("L1", "L7", "E2"),
    FaultKind.COMPACTION: ("L4", "E2"),
    FaultKind.STALE_READ: ("L3", "L4", "E2"),
    FaultKind.LEADER_CHANGE: ("L4", "L7", "E2"),
    FaultKind.LOST_ANSWER: ("L3", "L6", "E1"),
    FaultKind.LATE: ("L1", "L3", "L6", "E1"),
    FaultKind.REVOKE: ("L1", "L7", "E4"),
}
ELECTIONS = Workload(
    "elections", shape_of, shape_from, ElectionProgram, ElectionChecks, at_rest, ELECTION_CELLS
)
