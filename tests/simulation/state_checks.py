"""Invariants of state (V1 to V5) and counters (C1, C2), checked on what really happened in a simulated run."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from etcd_infra.testing import Claim, FaultKind, Hit, Violation, check_fences
from etcd_infra.testing.simulation.server import OPERATOR
from tests.simulation.lock_checks import RESETS, nothing_left
from tests.simulation.locks import KEYS
from tests.simulation.state import (
    BEHIND,
    COUNT,
    FENCED,
    LOCK,
    PER_OPERATION,
    StateProgram,
    shape_from,
    shape_of,
)
from tests.simulation.workload import Workload

ENDS = frozenset({"done", "unknown", "refused", "failed", "cancelled"})

# Which invariants each fault threatens: each of these pairs must really meet, in enough runs.
CELLS = {
    FaultKind.KILL: ("V4", "C1"),
    FaultKind.PAUSE: ("V2", "C1"),
    FaultKind.PARTITION: ("V4", "C1"),
    FaultKind.CUT_REQUESTS: ("V4", "C1"),
    FaultKind.CUT_ANSWERS: ("V4", "C1"),
    FaultKind.RESET: ("V4", "C1", "C2"),
    FaultKind.SLOW: ("V4", "C1"),
    FaultKind.LOST_REQUEST: ("V2", "V4", "C1"),
    FaultKind.LOST_ANSWER: ("V2", "V4", "C1", "C2"),
    FaultKind.LATE: ("V2", "V4", "C1", "C2"),
    FaultKind.DUPLICATE: ("V2", "C1"),
    FaultKind.LEADER_CHANGE: ("V1", "C1"),
    FaultKind.NO_QUORUM: ("V1", "C1"),
    FaultKind.COMPACTION: ("V5",),
    FaultKind.FULL: ("V4", "C1"),
    FaultKind.DENY: ("V4",),
    FaultKind.CANCEL: ("V4", "C1"),
    FaultKind.FOREIGN_RECREATE: ("V3", "C1"),
    FaultKind.FOREIGN_DELETE: ("V3", "C1"),
    FaultKind.DUPLICATE_EVENTS: ("V5",),
    FaultKind.PAST_EVENTS: ("V5",),
    FaultKind.EARLY_PROGRESS: ("V5",),
    FaultKind.STALE_READ: ("V2", "V5"),
}


@dataclass
class Story:
    """One operation; moments are true seconds."""

    process: str
    number: int
    way: str
    key: str
    delta: int
    begin: float
    end: float = float("inf")
    outcome: str = "cut"
    expected: int = 0
    token: int = 0
    written: int = 0
    facts: dict = field(default_factory=dict)

    @property
    def node(self):
        """Name the node."""
        return self.process.partition("#")[0]


@dataclass(frozen=True)
class Write:
    """What one commit made of one key: version 0 is a deletion."""

    at: float
    revision: int
    version: int
    value: object
    before: object
    origin: str


class StateChecks:
    """All checks of one run; a run whose store was restored or wiped is only asked whether all got through."""

    def __init__(self, run):
        self.run = run
        self.hits = []
        self.stories = self._stories()
        self.writes = defaultdict(list)
        self.events = []
        for timed in run.lineages[-1]:
            for event in timed.commit.events:
                if (key := KEYS.parse_state(event.key)) is not None:
                    self._take(key, event, timed)

    def __call__(self):
        """Check everything."""
        if any(strike.kind in RESETS for strike in self.run.strikes):
            return []
        self._count_settled()
        return [
            *self.outcomes(),
            *self.reads(),
            *self.deletions(),
            *self.counts(),
            *self.fences(),
            *self.behind(),
            *self.watches(),
        ]

    def hit(self, invariant, at, node=""):
        """Note that an invariant was checked on something that happened."""
        self.hits.append(Hit(invariant, at, node))

    def _stories(self):
        found = {}
        for note in self.run.notes:
            number = note.facts.get("operation")
            if note.what == "asked":
                facts = note.facts
                found[number] = Story(note.process, number, facts["way"], facts["key"], facts["delta"], note.at)
            elif note.what == "expects":
                found[number].expected = note.facts["version"]
            elif note.what == "holds":
                found[number].token = note.facts["token"]
            elif note.what == "written":
                found[number].written = note.facts["version"]
            elif note.what in ENDS and number is not None:
                found[number].outcome, found[number].end, found[number].facts = note.what, note.at, note.facts
        return found

    def _take(self, key, event, timed):
        before = self.writes[key][-1].value if self.writes[key] else None
        version = 0 if event.is_delete else event.kv.mod_revision
        value = None if event.is_delete else json.loads(event.kv.value)
        origin = timed.origin if "#" in timed.origin else ""
        self.writes[key].append(Write(timed.at, event.revision, version, value, before, origin))
        self.events.append((event.revision, key, version))

    # ── V2, V3, V4: every write once, and as told ───────────────────────────────────────────────

    def outcomes(self):
        """Check that what was acknowledged was applied once, what failed never, the rest at most once."""
        applied = self._applied()
        for story in self.stories.values():
            if story.way not in {"set", "swap", "fenced"}:
                continue
            writes = applied.get(story.number * PER_OPERATION, [])
            for invariant in ("V2", "V3", "V4"):
                self.hit(invariant, story.begin, story.node)
            version = story.facts.get("version") or story.written
            acknowledged = story.outcome == "done" and story.facts.get("swapped", True)
            if len(writes) > 1:
                yield Violation("V2", f"{story} was applied {len(writes)} times", story.begin)
            elif (acknowledged or story.written) and [version] != [write.version for write in writes]:
                yield Violation("V4", f"{story} was told {version}, and the history has {writes}", story.end)
            elif writes and self._denied(story, acknowledged):
                yield Violation("V4", f"{story} was told that nothing was written, but {writes}", story.end)
            if story.way == "swap" and acknowledged:
                yield from self._swapped(story, writes)

    @staticmethod
    def _denied(story, acknowledged):
        if acknowledged or story.written:
            return False
        # A lock that is lost cancels the write under it.
        return story.outcome in ({"refused"} if story.way == "fenced" else {"done", "refused", "failed"})

    def _swapped(self, story, writes):
        history = self.writes[story.key]
        index = next(index for index, write in enumerate(history) if write.version == writes[0].version)
        before = history[index - 1].version if index else 0
        if before != story.expected:
            yield Violation("V3", f"{story} replaced version {before}", writes[0].at)

    def _applied(self):
        found = defaultdict(list)
        for key, writes in self.writes.items():
            for write in writes:
                if write.origin and key != COUNT and write.value is not None:
                    found[write.value].append(write)
        return found

    # ── V1: reads ───────────────────────────────────────────────────────────────────────────────

    def reads(self):
        """Check that a linearizable read shows what was there meanwhile, a serializable one what once was."""
        for story in self.stories.values():
            if story.outcome != "done" or story.way not in {"get", "look"} or story.facts["version"] is None:
                continue
            history = self.writes[story.key]
            if story.way == "get" and self._stale(story):
                continue  # only `min_revision` helps against servers whose linearizable reads are stale
            if story.way == "get":
                begin = bisect_right(history, story.begin, key=lambda write: write.at)
                self.hit("V1", story.begin, story.node)
            else:
                begin = bisect_right(history, story.expected, key=lambda write: write.revision)
                self.hit("V5", story.begin, story.node)
            end = bisect_right(history, story.end, key=lambda write: write.at)
            possible = {(write.version, write.value) for write in history[max(begin - 1, 0) : end]}
            if not begin:
                possible.add((0, None))
            if (story.facts["version"], story.facts["value"]) not in possible:
                yield Violation("V1", f"{story} saw what was not there then: {sorted(possible)[:5]}", story.end)

    def _stale(self, story):
        return any(
            strike.kind is FaultKind.STALE_READ and strike.begin <= story.end and story.begin <= strike.end
            for strike in self.run.strikes
        )

    def deletions(self):
        """Check that a deletion that was acknowledged happened, and that nothing was there if it was not."""
        for story in self.stories.values():
            if story.way != "delete" or story.outcome != "done":
                continue
            self.hit("V4", story.begin, story.node)
            history = self.writes[story.key]
            begin = bisect_left(history, story.begin, key=lambda write: write.at)
            during = history[begin : bisect_right(history, story.end, key=lambda write: write.at)]
            absent = not begin or not history[begin - 1].version or any(not write.version for write in during)
            mine = any(not write.version and write.origin == story.process for write in during)
            if not (mine if story.facts["deleted"] else absent):
                yield Violation("V4", f"{story} is not in the history: {during}", story.end)

    # ── C1, C2 ──────────────────────────────────────────────────────────────────────────────────

    def counts(self):
        """Check that each add that was acknowledged is in one commit, once; and the others at most once."""
        adds = [story for story in self.stories.values() if story.way == "add"]
        commits = [write for write in self.writes[COUNT] if write.origin]
        taken = defaultdict(list)
        for story in adds:
            if story.outcome != "done":
                continue
            self.hit("C1", story.begin, story.node)
            self.hit("C2", story.begin, story.node)
            result = story.facts["result"]
            home = [
                write
                for write in commits
                if write.origin == story.process
                and story.begin <= write.at <= story.end
                and (write.before or 0) <= result - story.delta < result <= write.value
            ]
            if not home:
                yield Violation("C1", f"{story} is in no commit", story.end)
            else:
                taken[home[0]].append(story)
        yield from self._accounts(adds, commits, taken)

    def _accounts(self, adds, commits, taken):
        unaccounted = defaultdict(int)
        for write in commits:
            spans = sorted(
                (story.facts["result"] - story.delta, story.facts["result"]) for story in taken[write]
            )
            for (_, end), (begin, _) in pairwise(spans):
                if begin < end:
                    yield Violation("C2", f"results overlap in {write}: {spans}", write.at)
            told = sum(end - begin for begin, end in spans)
            rest = write.value - (write.before or 0) - told
            if rest < 0:
                yield Violation("C1", f"{write} adds less than was acknowledged: {spans}", write.at)
            unaccounted[write.origin] += rest
        possible = defaultdict(int)
        for story in adds:
            if story.outcome in {"unknown", "cancelled", "cut"}:
                possible[story.process] += story.delta
        for process, rest in unaccounted.items():
            if rest > possible[process]:
                yield Violation("C1", f"{process} added {rest} that nobody asked for", self.run.calm_at)

    # ── fences, write-behind, watches ───────────────────────────────────────────────────────────

    def fences(self):
        """Check that each fenced write came from the lock's owner."""
        tokens = {story.number * PER_OPERATION: story.token for story in self.stories.values() if story.token}

        # What a stranger puts back carries no fence.
        by_hand = {
            event.revision
            for timed in self.run.lineages[-1]
            if timed.origin == OPERATOR
            for event in timed.commit.events
        }

        def claim(event):
            if event.is_delete or event.key != KEYS.state(FENCED) or event.revision in by_hand:
                return None
            token = tokens.get(json.loads(event.kv.value))
            return None if token is None else Claim(KEYS.lock_line(LOCK), token)

        for story in self.stories.values():
            if story.token:
                self.hit("fence", story.begin, story.node)
        return check_fences([timed.commit for timed in self.run.lineages[-1]], KEYS.locks, claim)

    def behind(self):
        """Check that writes behind come in their order, each at most once, and the last one before the end."""
        applied = self._applied()
        for story in self.stories.values():
            if story.way != BEHIND:
                continue
            first = story.number * PER_OPERATION
            writes = [applied.get(first + number, []) for number in range(PER_OPERATION)]
            self.hit("behind", story.begin, story.node)
            order = [write.revision for found in writes for write in found]
            if any(len(found) > 1 for found in writes) or sorted(order) != order:
                yield Violation("behind", f"{story} was applied out of order, or twice: {writes}", story.begin)
            if story.outcome == "done" and not writes[story.expected - 1]:
                yield Violation("behind", f"{story} ended without its last write: {writes}", story.end)
        for note in self.run.notes:
            if note.what == "reads" and note.facts["value"] != (
                note.facts["operation"] * PER_OPERATION + note.facts["number"]
            ):
                yield Violation("behind", f"own write was not read: {note}", note.at)

    def watches(self):
        """Check that each watch told a snapshot that was true, and then every change, in order, once."""
        told = {}
        revisions = [revision for revision, _, _ in self.events]
        for note in self.run.notes:
            if note.what not in {"snapshot", "change"}:
                continue
            who = (note.process, note.facts["observer"])
            self.hit("V5", note.at, note.process.partition("#")[0])
            if note.what == "snapshot":
                revision = note.facts["revision"]
                index = bisect_right(revisions, revision)
                true = {key: version for _, key, version in self.events[:index] if version}
                for _, key, version in self.events[:index]:
                    if version:
                        true[key] = version
                    else:
                        true.pop(key, None)
                if true != note.facts["entries"]:
                    yield Violation("V5", f"{who}: the snapshot at {revision} is wrong: {note.facts}", note.at)
                if index < told.get(who, 0):
                    yield Violation("V5", f"{who} went back to {revision}", note.at)
                told[who] = index
                continue
            change = (note.facts["revision"], note.facts["key"], note.facts["version"])
            index = told[who]
            if index >= len(self.events) or self.events[index] != change:
                expected = self.events[index : index + 2]
                yield Violation("V5", f"{who} was told {change} instead of {expected}", note.at)
                return
            told[who] = index + 1

    # ── what was settled ────────────────────────────────────────────────────────────────────────

    def _count_settled(self):
        """Count the writes of state that were cut off after their commit, or applied late."""
        commits = {id(timed.request): timed for timed in self.run.lineages[-1] if timed.request is not None}
        for note in self.run.notes:
            if note.what != "unanswered":
                continue
            request, node = note.facts["request"], note.process.partition("#")[0]
            if not any(key.startswith(KEYS.states) for key in request.written_keys):
                continue
            timed = commits.get(id(request))
            if timed is not None:
                self.hit("cut after the commit" if timed.at <= note.at else "applied late", note.at, node)


def at_rest(simulation):
    """Check that no place in the lock's line is left."""
    return nothing_left(simulation)


STATE = Workload("state", shape_of, shape_from, StateProgram, StateChecks, at_rest, CELLS)
