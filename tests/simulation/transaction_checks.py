"""Transactions' invariants T1 to T8 and S1 to S7, checked on what really happened in a simulated run."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field

from etcd_infra import Isolation, TransactionStatus
from etcd_infra.testing import FaultKind, Hit, Violation
from etcd_infra.testing.simulation.server import OPERATOR
from tests.simulation.transactions import (
    ACCOUNT,
    ITEM,
    KEYS,
    MARK,
    MOST_ITEMS,
    ONE_MOMENT,
    PAIR,
    SIDES,
    TransactionProgram,
    shape_from,
    shape_of,
)
from tests.simulation.workload import Workload

STALE_BY = 6
EARLY = 0.9
SLACK_SECONDS = 0.6
MOST_PROMISE = 3
OURS = (KEYS.states, KEYS.intents, KEYS.transactions)
PREPARED = str(TransactionStatus.PREPARED)
COMMITTED = str(TransactionStatus.COMMITTED)
TIMEOUT = str(TransactionStatus.TIMEOUT)
# Faults at whose end every lease has its full time again.
REFRESHES = frozenset({FaultKind.LEADER_CHANGE, FaultKind.NO_QUORUM, FaultKind.RESTORE})

# Which invariants each fault threatens: each of these pairs must really meet, in enough runs.
CELLS = {
    FaultKind.KILL: ("T3", "T5", "T8", "S4"),
    FaultKind.PAUSE: ("T7", "S1"),
    FaultKind.BLOCK: ("T5", "S1"),
    FaultKind.SUSPEND: ("T7", "S1"),
    FaultKind.CLOCK_RATE: ("T5",),
    FaultKind.PARTITION: ("T5", "S5"),
    FaultKind.CUT_REQUESTS: ("T5", "S5"),
    FaultKind.CUT_ANSWERS: ("T5", "S5"),
    FaultKind.RESET: ("T1", "T3", "S5"),
    FaultKind.SLOW: ("T5", "T7", "S4"),
    FaultKind.LOST_REQUEST: ("T4", "T7", "S5"),
    FaultKind.LOST_ANSWER: ("T4", "T7", "S5"),
    FaultKind.LATE: ("T4", "T7", "S5"),
    FaultKind.DUPLICATE: ("T4", "T1"),
    FaultKind.DELAYED_ANSWER: ("T7",),
    FaultKind.LEADER_CHANGE: ("T3", "T7"),
    FaultKind.NO_QUORUM: ("T5", "S2"),
    FaultKind.COMPACTION: ("T5", "S7"),
    FaultKind.REVOKE: ("T5", "T7"),
    FaultKind.FOREIGN_DELETE: ("T4", "S1"),
    FaultKind.FOREIGN_RECREATE: ("T4", "S1"),
    FaultKind.RESTORE: ("T3", "S7"),
    FaultKind.WIPE: ("T3", "S7"),
    FaultKind.FULL: ("T5", "T8"),
    FaultKind.DENY: ("T5",),
    FaultKind.CANCEL: ("T3", "T8", "S4"),
    FaultKind.SPURIOUS_REVOKE: ("T7",),
    FaultKind.RENEWED_THOUGH_REVOKED: ("T7",),
    FaultKind.STALE_READ: ("T6", "S2", "S6"),
}


# ── what happened ───────────────────────────────────────────────────────────────────────────────


class Truth:
    """One lineage of the store: what each state key held at each revision, and which operations were applied."""

    def __init__(self, lineage, began_at):
        self.began_at = began_at
        self.commits = [timed for timed in lineage if timed.at >= began_at]
        self.marks = defaultdict(list)
        self._revisions = defaultdict(list)
        self._values = defaultdict(list)
        for timed in lineage:
            revision = timed.commit.revision
            for event in timed.commit.events:
                key = KEYS.parse_state(event.key)
                if key is None:
                    continue
                value = None if event.is_delete else json.loads(event.kv.value)
                self._revisions[key].append(revision)
                self._values[key].append(value)
                if key.startswith(MARK) and value is not None:
                    self.marks[value[0]].append((timed, value[1]))

    def at(self, key, revision):
        """Say what a key held; None: it was absent."""
        place = bisect_right(self._revisions[key], revision) if key in self._revisions else 0
        return self._values[key][place - 1] if place else None

    def under(self, prefix, revision):
        """Say what all keys with a prefix held."""
        keys = [key for key in self._revisions if key.startswith(prefix)]
        return {key: value for key in keys if (value := self.at(key, revision)) is not None}

    def is_changed(self, key, after, before):
        """Whether a key was written after one revision and before another."""
        return any(after < revision < before for revision in self._revisions.get(key, ()))

    def shows(self, reads, lists, revision):
        """Whether what was read is what there was."""
        return all(self.at(key, revision) == value for key, value in reads.items()) and all(
            self.under(prefix, revision) == found for prefix, found in lists.items()
        )


@dataclass
class Story:
    """One operation, from being asked for to what its caller was told; None: it was told nothing."""

    number: int
    way: str
    process: str
    asked: object
    told: object = None
    adds: dict = field(default_factory=dict)
    sets: dict = field(default_factory=dict)
    transaction: str = ""
    begun: object = None
    prepared: object = None
    status: str = ""
    applied: object = None
    looks: list = field(default_factory=list)
    began: dict = field(default_factory=dict)
    first: dict = field(default_factory=dict)
    runs: list = field(default_factory=list)

    @property
    def node(self):
        """Name the node."""
        return self.process.partition("#")[0]

    @property
    def outcome(self):
        """What the caller was told: committed, failed, unknown or cancelled; empty: nothing."""
        return self.told.facts["outcome"] if self.told else ""

    def __str__(self):
        error = self.told.facts["error"] if self.told else ""
        return f"operation {self.number} ({self.way}) of {self.process}, {self.outcome or 'cut off'} {error}"


def stories(run):
    """Put together what the programs told of each operation."""
    found = {}
    for note in run.notes:
        number = note.facts.get("operation")
        if note.what == "asked":
            found[number] = Story(number, note.facts["way"], note.process, note)
        if number is None:
            continue
        story = found[number]
        match note.what:
            case "adds":
                story.adds = note.facts["gains"]
            case "sets":
                story.sets = note.facts["values"]
            case "begun":
                story.transaction, story.begun = note.facts["transaction"], note
            case "left":
                story.status = note.facts["status"]
            case "prepared" | "applied" | "told":
                setattr(story, note.what, note)
            case "look" | "looked":
                story.looks.append(note)
            case "run":
                story.began[note.facts["run"]] = note
            case "first":
                story.first[note.facts["run"]] = note
            case "ran":
                story.runs.append(note)
    return found


# ── what must hold ──────────────────────────────────────────────────────────────────────────────


class TransactionChecks:
    """
    All checks of one run; `hits` counts for each invariant what was really checked, and when and where.

    After a restore or a wipe only what was asked for since is judged: a copy that was on its way from before may
    find its guards true again, by numbers that mean something else now.
    """

    def __init__(self, run):
        self.run = run
        self.stories = stories(run)
        self.truths = [Truth(lineage, began) for lineage, began in zip(run.lineages, run.began_at, strict=True)]
        self.hits = []

    def __call__(self):
        """Check everything."""
        self._count_settled()
        return [
            *self.effects(),
            *self.answers(),
            *self.all_runs(),
            *self.looks(),
            *self.records(),
            *self.promises(),
        ]

    def hit(self, invariant, at, node=""):
        """Note that an invariant was checked on something that happened."""
        self.hits.append(Hit(invariant, at, node))

    # ── T1, S4, and the total ───────────────────────────────────────────────────────────────────

    def effects(self):
        """Check that each commit has exactly the effects of whole operations, and keeps the total and the rules."""
        for number, truth in enumerate(self.truths):
            for timed in truth.commits:
                if timed.origin != OPERATOR:
                    yield from self._effect(number, truth, timed)

    def _effect(self, number, truth, timed):
        found = {KEYS.parse_state(event.key): event for event in timed.commit.events}
        found = {key: event for key, event in found.items() if key is not None}
        marks = [json.loads(event.kv.value) for key, event in found.items() if key.startswith(MARK)]
        revision, at = timed.commit.revision, timed.at
        if not found or any(self.stories[mark[0]].asked.lineage != number for mark in marks):
            return
        wanted = {}
        for operation, run in marks:
            story = self.stories[operation]
            wanted |= self._wanted(truth, story, run, revision)
            if run and (run != len(story.runs) or not story.runs[run - 1].facts["whole"]):
                yield Violation("S4", f"{story}: its run {run} was applied, though it was not the last", at)
            if len(wanted) > 1:
                self.hit("T1", at, story.node)
        done = {key: truth.at(key, revision) for key in found if not key.startswith(MARK)}
        # What is deleted without having been there makes no event.
        wanted = {key: value for key, value in wanted.items() if value is not None or key in done}
        if done != wanted:
            who = ", ".join(str(self.stories[mark[0]]) for mark in marks)
            yield Violation("T1", f"{who or timed.origin} wrote {done} instead of {wanted}", at)
        yield from self._rules(truth, revision, at, done)

    @staticmethod
    def _wanted(truth, story, run, revision):
        if run:
            return story.runs[run - 1].facts["writes"] if run <= len(story.runs) else {}
        return story.sets | {key: (truth.at(key, revision - 1) or 0) + gain for key, gain in story.adds.items()}

    def _rules(self, truth, revision, at, done):
        gain = sum(
            (value or 0) - (truth.at(key, revision - 1) or 0)
            for key, value in done.items()
            if key.startswith(ACCOUNT)
        )
        if gain:
            yield Violation("total", f"{gain} were made at revision {revision}: {done}", at)
        self.hit("total", at)
        if any(key.startswith(PAIR) for key in done):
            on = [truth.at(f"{PAIR}{side}", revision) for side in SIDES]
            if not any(value is None or value[0] for value in on):
                yield Violation("S3", f"both are off duty at revision {revision}", at)
            self.hit("S3", at)
        if any(key.startswith(ITEM) for key in done):
            before, items = truth.under(ITEM, revision - 1), truth.under(ITEM, revision)
            if len(items) > max(MOST_ITEMS, len(before)):
                yield Violation("S3", f"{len(items)} items at revision {revision}: {items}", at)
            self.hit("S3", at)

    # ── T2, S5: what callers were told ──────────────────────────────────────────────────────────

    def answers(self):
        """Check that acknowledged operations were applied once, refused ones never, and others at most once."""
        for story in self.stories.values():
            yield from self._answer(story)

    def _answer(self, story):
        number = story.asked.lineage
        if story.told and story.told.lineage != number:
            return
        applied = self.truths[number].marks.get(story.number, ())
        times = [f"{timed.commit.revision} ({timed.at:.3f} s)" for timed, _ in applied]
        if len(applied) > 1:
            yield Violation("T1", f"{story} was applied at {times}", applied[1][0].at)
        if story.outcome == "failed" and applied and not self._delivered_twice(story):
            yield Violation("S5", f"{story} was applied at {times}", story.told.at)
        if story.outcome == "committed" and self._writes(story):
            yield from self._acknowledged(story, applied)
        if story.status and story.prepared:
            committed = story.status == COMMITTED
            if (committed and not applied) or (
                applied and story.status in {"rolled-back", "failed", "timeout"}
            ):
                yield Violation(
                    "T4", f"{story} was left as {story.status}, and applied at {times}", story.asked.at
                )

    def _delivered_twice(self, story):
        # Refused for want of space, say, and then delivered again by something in between: a new request.
        return any(
            strike.kind is FaultKind.DUPLICATE
            and strike.node == story.node
            and story.asked.at <= strike.begin <= story.told.at
            for strike in self.run.strikes
        )

    @staticmethod
    def _writes(story):
        return story.adds or story.sets or (story.runs and story.runs[-1].facts["writes"])

    def _acknowledged(self, story, applied):
        told = story.told
        if not applied:
            yield Violation("S5", f"{story} was never applied", told.at)
            return
        revision = applied[0][0].commit.revision
        if not story.asked.revision < revision <= told.revision:
            yield Violation("T2", f"{story} was applied at {revision}, not while it was asked for", told.at)
        self.hit("T2", told.at, story.node)
        if story.applied is not None:
            truth, facts = self.truths[told.lineage], story.applied.facts
            values = {key: truth.at(key, revision) for key in facts["values"]}
            if (facts["revision"], facts["values"]) != (revision, values):
                yield Violation("T2", f"{story} was told {facts}, but it was {revision}, {values}", told.at)

    def _count_settled(self):
        """Count what was cut off after its commit or applied late, of operations whose callers were told."""
        commits = {
            id(timed.request): timed for truth in self.truths for timed in truth.commits if timed.request
        }
        struck = {
            (strike.node, round(strike.begin, 6))
            for strike in self.run.strikes
            if strike.kind is FaultKind.LATE
        }
        for note in self.run.notes:
            if note.what != "unanswered":
                continue
            request, node = note.facts["request"], note.process.partition("#")[0]
            if not any(key.startswith(OURS) for key in request.written_keys):
                continue
            self.hit("S5", note.at, node)
            timed = commits.get(id(request))
            late = (node, round(note.at - note.facts["sent"], 6)) in struck
            if timed is not None and timed.at <= note.at:
                self.hit("cut after the commit", note.at, node)
            elif timed is not None or late:
                self.hit("applied late", note.at, node)

    # ── S1, S2, S6, S7 ──────────────────────────────────────────────────────────────────────────

    def all_runs(self):
        """Check what each run of a body saw, and what it rested on when it was committed."""
        for story in self.stories.values():
            for ran in story.runs:
                began = story.began[ran.facts["run"]]
                if began.lineage == ran.lineage == story.asked.lineage:
                    yield from self._run(story, began, ran)

    def _run(self, story, began, ran):
        truth = self.truths[ran.lineage]
        yield from self._one_moment(story, truth, began, ran)
        last = ran is story.runs[-1]
        if ran.facts["whole"] and ran.facts["writes"] and last:
            for timed, run in truth.marks.get(story.number, ()):
                if run == ran.facts["run"]:
                    yield from self._committed(story, truth, ran, timed)
        elif ran.facts["writes"]:
            self.hit("S4", ran.at, story.node)
        if not ran.facts["whole"] and not last:
            self.hit("S7", ran.at, story.node)
        told = story.told
        if last and story.outcome == "committed" and not ran.facts["writes"] and told.lineage == ran.lineage:
            yield from self._read_only(story, truth, ran)

    def _one_moment(self, story, truth, began, ran):
        facts = ran.facts
        first = began.revision - (STALE_BY if self._stale(began.at, ran.at) else 0)
        revisions = range(first, ran.revision + 1)
        reads, lists = facts["reads"], facts["lists"]
        whole = any(truth.shows(reads, lists, revision) for revision in revisions)
        if len(reads) + len(lists) > 1 and facts["level"] in ONE_MOMENT:
            self.hit("S2", ran.at, story.node)
        if whole:
            return
        if facts["level"] in ONE_MOMENT:
            yield Violation("S2", f"{story}, run {facts['run']} saw no one moment: {reads} {lists}", ran.at)
            return
        self.hit(f"several moments at {facts['level']}", ran.at)
        parts = [({key: value}, {}) for key, value in reads.items()]
        parts += [({}, {prefix: found}) for prefix, found in lists.items()]
        for part in parts:
            if not any(truth.shows(*part, revision) for revision in revisions):
                yield Violation("S2", f"{story}, run {facts['run']} saw what never was: {part}", ran.at)

    def _committed(self, story, truth, ran, timed):
        facts, revision = ran.facts, timed.commit.revision
        level = facts["level"]
        holds = truth.shows(facts["reads"], facts["lists"], revision - 1)
        if level == Isolation.READ_COMMITTED:
            if not holds:
                self.hit("stale reads at read-committed", timed.at)
            return
        self.hit("S1", timed.at, story.node)
        if not holds:
            seen = f"{facts['reads']} {facts['lists']}"
            yield Violation("S1", f"{story} was applied at {revision}, when {seen} was over", timed.at)
        first = story.first[facts["run"]].revision
        for key in facts["writes"]:
            if key in facts["reads"] or not truth.is_changed(key, first, revision):
                continue
            if truth.at(key, revision - 1) is None:
                continue  # a key that was deleted has no revision that could be compared
            if any(key.startswith(prefix) for prefix in facts["lists"]):
                continue
            self.hit(f"blind write at {level}", timed.at)
            if level == Isolation.SERIALIZABLE_SNAPSHOT:
                yield Violation("S1", f"{story} overwrote {key}, changed since its first read", timed.at)

    def _read_only(self, story, truth, ran):
        facts = ran.facts
        if facts["level"] == Isolation.READ_COMMITTED:
            return
        self.hit("S6", ran.at, story.node)
        revisions = range(ran.revision, story.told.revision + 1)
        if not any(truth.shows(facts["reads"], facts["lists"], revision) for revision in revisions):
            seen = f"{facts['reads']} {facts['lists']}"
            yield Violation("S6", f"{story} returned {seen}, which was over when its body was", story.told.at)

    def _stale(self, begin, end):
        return any(
            strike.kind is FaultKind.STALE_READ and strike.begin <= end and strike.end >= begin
            for strike in self.run.strikes
        )

    # ── T6 ──────────────────────────────────────────────────────────────────────────────────────

    def looks(self):
        """Check that who reads several keys at once sees all of a transaction or nothing."""
        for story in self.stories.values():
            for before, after in zip(story.looks[::2], story.looks[1::2], strict=False):
                if before.lineage != after.lineage:
                    continue
                first = before.revision - (STALE_BY if self._stale(before.at, after.at) else 0)
                truth, values = self.truths[after.lineage], after.facts["values"]
                self.hit("T6", after.at, story.node)
                if not any(truth.shows(values, {}, at) for at in range(first, after.revision + 1)):
                    yield Violation("T6", f"{story} saw {values}, which never was", after.at)

    # ── T3, T4, T5, T7, T8 ──────────────────────────────────────────────────────────────────────

    def records(self):
        """Check that each record has one verdict, and that what was promised is applied by it alone."""
        by_transaction = {story.transaction: story for story in self.stories.values() if story.transaction}
        for number, truth in enumerate(self.truths):
            records = {}
            for timed in truth.commits:
                before, verdicts = dict(records), {}
                for event in timed.commit.events:
                    if event.key.startswith(KEYS.transactions):
                        name = event.key.removeprefix(KEYS.transactions).decode()
                        story = by_transaction[name]
                        if story.asked.lineage == number:
                            status = None if event.is_delete else json.loads(event.kv.value)["status"]
                            yield from self._record(story, records, timed, status)
                            verdicts[story.number] = status
                yield from self._applied(number, timed, before, verdicts)
            yield from self._timeouts(number, truth)

    def _record(self, story, records, timed, status):
        old = records.get(story.number)
        foreign = timed.origin == OPERATOR
        records[story.number] = (status or "ended", timed) if not foreign else (status or "foreign", timed)
        if foreign:
            return
        if status is None:
            if old and old[0] == PREPARED:
                self.hit("T5", timed.at)
            return
        if status == PREPARED:
            if old is not None:
                yield Violation("T4", f"{story} was {old[0]}, and is prepared again", timed.at)
            self.hit("T8", timed.at, story.node)
            return
        self.hit("T4", timed.at, story.node)
        if old is None or old[0] != PREPARED:
            yield Violation("T4", f"{story} was {old and old[0]}, and is given the verdict {status}", timed.at)
            return
        if status == TIMEOUT:
            since, who = (old[1], "others") if timed.origin != story.process else (story.begun, "its owner")
            self.hit("T5" if who == "others" else "T4", timed.at)
            if old[1].origin != OPERATOR and timed.at < since.at + EARLY * self._ttl(timed, story):
                yield Violation("T4", f"{story} was called too late by {who} after {since.at}", timed.at)
        elif timed.origin != story.process:
            yield Violation("T3", f"{story} was decided by {timed.origin}: {status}", timed.at)

    @staticmethod
    def _ttl(timed, story):
        key = KEYS.transaction(story.transaction)
        kv = next(event.kv for event in timed.commit.events if event.key == key)
        return json.loads(kv.value)["ttl"]

    def _applied(self, number, timed, before, verdicts):
        """What was promised is applied by the verdict that says so, with all its intents."""
        for event in timed.commit.events:
            key = KEYS.parse_state(event.key)
            if key is None or not key.startswith(MARK) or event.is_delete:
                continue
            story = self.stories[json.loads(event.kv.value)[0]]
            if story.way != "promise" or story.asked.lineage != number:
                continue
            self.hit("T3", timed.at, story.node)
            old = before.get(story.number, ("unknown", None))[0]
            if old != PREPARED:
                yield Violation("T7", f"{story} was applied although its record was {old}", timed.at)
            if verdicts.get(story.number) != COMMITTED:
                yield Violation("T3", f"{story} was applied by no verdict", timed.at)
        for operation, status in verdicts.items():
            story = self.stories[operation]
            marked = any(event.key == KEYS.state(f"{MARK}{operation}") for event in timed.commit.events)
            if status == COMMITTED and not marked and timed.origin != OPERATOR:
                yield Violation("T3", f"{story} is called committed, and nothing was applied", timed.at)

    def _timeouts(self, number, truth):
        """Whoever is told that its time was over finds that written, or its record gone."""
        ends = defaultdict(list)
        for timed in truth.commits:
            for event in timed.commit.events:
                if event.key.startswith(KEYS.transactions):
                    name = event.key.removeprefix(KEYS.transactions).decode()
                    over = event.is_delete or json.loads(event.kv.value)["status"] != PREPARED
                    ends[name].append((timed.at, over or timed.origin == OPERATOR))
        for story in self.stories.values():
            told = story.told
            if not (story.prepared and told) or not number == story.asked.lineage == told.lineage:
                continue
            if told.facts["error"] == "TransactionTimeoutError":
                self.hit("T7", told.at, story.node)
                if not any(over and at <= told.at for at, over in ends[story.transaction]):
                    yield Violation("T4", f"{story}: nobody had written so", told.at)

    def promises(self):
        """Check that nothing stays promised for longer than a lease lives, and nothing at all in the end."""
        for number, truth in enumerate(self.truths):
            since = {}
            for timed in self.run.lineages[number]:
                at = max(timed.at, truth.began_at)
                for event in timed.commit.events:
                    if not event.key.startswith((KEYS.intents, KEYS.transactions)):
                        continue
                    if not event.is_delete:
                        since.setdefault(event.key, at)
                    elif (begin := since.pop(event.key, None)) is not None:
                        yield from self._lived(event.key, begin, at)
            last = number == len(self.truths) - 1
            for key, begin in since.items() if last else ():
                yield Violation("T8", f"{key!r} of {begin} s is never taken back", self.run.calm_at)

    def _lived(self, key, begin, end):
        refreshed = [
            min(strike.end, max(strike.begin, self.run.calm_at))
            for strike in self.run.strikes
            if strike.kind in REFRESHES and strike.begin <= end and strike.end >= begin
        ]
        if end > max([begin, *refreshed]) + MOST_PROMISE + SLACK_SECONDS:
            yield Violation("T5", f"{key!r} was kept from {begin} until {end}", end)


def nothing_left(_simulation):
    """Leave it to the checks: what the dead had promised may still be there for a moment, and nothing else is."""
    return ()


TRANSACTIONS = Workload(
    "transactions", shape_of, shape_from, TransactionProgram, TransactionChecks, nothing_left, CELLS
)
