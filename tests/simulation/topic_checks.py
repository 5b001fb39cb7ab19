"""Invariants of topics (P1 to P6), checked on what really happened in a simulated run, at every revision."""

from __future__ import annotations

import json
from bisect import bisect_right, insort
from collections import defaultdict
from dataclasses import dataclass, field

import msgspec

from etcd_infra._etcd.keys import last_segment, place_lease
from etcd_infra._primitives._claim import Progress
from etcd_infra._primitives._envelope import Head, Position
from etcd_infra._primitives._group import Cursor, Death
from etcd_infra.testing import FaultKind, Hit, Violation
from tests.simulation.lock_checks import RESETS, STRAY_COPIES
from tests.simulation.topics import (
    ECHO,
    EFFECT,
    GROUPS,
    KEYS,
    NEWS,
    ORDERED,
    SHARED,
    TopicProgram,
    shape_from,
    shape_of,
)
from tests.simulation.workload import Workload

AT_MOST_ONCE = "at-most-once"
BEGINNING = Position(0)
ECHOES = KEYS.topic(ECHO)

# Which invariants each fault threatens: each of these pairs must really meet, in enough runs.
CELLS = {
    FaultKind.KILL: ("P2", "P3"),
    FaultKind.PAUSE: ("P3", "attempts"),
    FaultKind.BLOCK: ("P3",),
    FaultKind.SUSPEND: ("P3",),
    FaultKind.PARTITION: ("P2", "P6"),
    FaultKind.CUT_REQUESTS: ("P2", "P6"),
    FaultKind.CUT_ANSWERS: ("P2", "P5", "P6"),
    FaultKind.RESET: ("P1", "P2", "P5", "P6"),
    FaultKind.SLOW: ("P2", "P4"),
    FaultKind.LOST_REQUEST: ("P2", "P5"),
    FaultKind.LOST_ANSWER: ("P1", "P3", "P5"),
    FaultKind.LATE: ("P1", "P3", "P5"),
    FaultKind.DUPLICATE: ("P1", "P3", "P5"),
    FaultKind.LEADER_CHANGE: ("P2", "P6"),
    FaultKind.NO_QUORUM: ("P2", "P6"),
    FaultKind.COMPACTION: ("P2", "P6"),
    FaultKind.REVOKE: ("P2", "P3"),
    FaultKind.FOREIGN_DELETE: ("P2", "P3"),
    FaultKind.FOREIGN_RECREATE: ("P2", "P3"),
    FaultKind.FULL: ("P2", "P5"),
    FaultKind.DENY: ("P2", "P6"),
    FaultKind.CANCEL: ("P2", "P3", "P5"),
    FaultKind.DUPLICATE_EVENTS: ("P1", "P4", "P6"),
    FaultKind.PAST_EVENTS: ("P1", "P4", "P6"),
    FaultKind.EARLY_PROGRESS: ("P2", "P6"),
    FaultKind.LOST_DELETE: ("P2",),
    FaultKind.CREATED_CANCELED: ("P2", "P6"),
    FaultKind.SPURIOUS_REVOKE: ("P2", "P3"),
    FaultKind.RENEWED_THOUGH_REVOKED: ("P2", "P3"),
    FaultKind.STALE_READ: ("P2", "P6"),
}


@dataclass
class Stored:
    """A message as the store had it; `deleted` is the revision of its deletion, 0 if it is there."""

    position: Position
    operation: int
    head: Head
    at: float
    index: int = 0
    deleted: int = 0

    @property
    def name(self):
        """Name it as its key does."""
        return self.position.name

    @property
    def letter(self):
        """Name the dead letter that it is, or would be."""
        return self.head.dead or self.name

    def is_for(self, group):
        """Whether a group is to get it."""
        return self.head.group in {"", group}


@dataclass
class Delivery:
    """One message handed to one handler, as its program told it; moments are true seconds."""

    number: int
    process: str
    at: float
    revision: int
    facts: dict
    begun: float | None = None
    begun_revision: int = 0
    ended: float = float("inf")
    asked: float | None = None
    effect: bool = False
    outcome: str = ""
    told: float = float("inf")

    @property
    def group(self):
        """Name the group."""
        return self.facts["group"]

    @property
    def name(self):
        """Name the message."""
        return self.facts["name"]

    @property
    def node(self):
        """Name the node."""
        return self.process.partition("#")[0]


@dataclass
class Group:
    """One group as the store has it."""

    name: str
    created: int = 0
    cursor: Cursor | None = None
    position: Position = BEGINNING
    line: dict = field(default_factory=dict)
    progress: dict = field(default_factory=dict)
    claims: dict = field(default_factory=dict)
    letters: dict = field(default_factory=dict)
    copies: dict = field(default_factory=dict)
    passed: dict = field(default_factory=dict)  # message name -> (true seconds, revision, how, origin)
    touched: dict = field(
        default_factory=dict
    )  # message name -> when its progress was put, or its claim went, last
    moved: float = 0.0
    begun: dict = field(default_factory=dict)  # (message name, attempt) -> origins

    def is_done(self, stored):
        """Whether a message needs to be delivered no more."""
        if self.cursor is not None and stored.position <= self.position:
            return True
        progress = self.progress.get(stored.name)
        return progress is not None and progress.done


class Changed:
    """What one commit changed of the topic, by kind."""

    def __init__(self, timed):
        self.timed = timed
        self.revision = timed.commit.revision
        self.at = timed.at
        self.origin = timed.origin
        self.kinds = defaultdict(list)
        for event in timed.commit.events:
            if (kind := _kind(event.key)) is not None:
                self.kinds[kind].append(event)

    def puts(self, kind):
        """List what was put."""
        return [event for event in self.kinds.get(kind, ()) if not event.is_delete]

    def deletes(self, kind):
        """List what was deleted."""
        return [event for event in self.kinds.get(kind, ()) if event.is_delete]


_PREFIXES = (
    (NEWS.messages, ("message", "")),
    (NEWS.markers, ("marker", "")),
    (NEWS.trimmed, ("trimmed", "")),
    *[
        (prefix, (kind, group))
        for group in GROUPS
        for prefix, kind in (
            (NEWS.cursor(group), "cursor"),
            (NEWS.consumers(group), "consumer"),
            (NEWS.claims(group), "claim"),
            (NEWS.progress(group, ""), "progress"),
            (NEWS.dead_letters(group), "dead"),
            (KEYS.state(f"{EFFECT}{group}/"), "effect"),
        )
    ],
    (ECHOES.messages, ("echo", "")),
)


def _kind(key):
    return next((kind for prefix, kind in _PREFIXES if key.startswith(prefix)), None)


class TopicChecks:
    """All checks of one run; a run whose store was restored or wiped is only asked whether all got through."""

    def __init__(self, run):
        self.run = run
        self.hits = []
        # A reader takes a server whose reads are stale again and again for a restored one, and says so.
        self.stale = any(strike.kind is FaultKind.STALE_READ for strike in run.strikes)
        self.shape = shape_of(run.seed)
        self.stored = {}
        self.order = []
        self.by_operation = defaultdict(list)
        self.markers = {}
        self.marked = []  # (revision, id, name or "") in order
        self.trimmed = Position(0)
        self.groups = {name: Group(name) for name in GROUPS}
        self.effects = {}
        self.deliveries = self._deliveries()
        self.asks = defaultdict(list)
        for delivery in self.deliveries.values():
            if delivery.asked is not None:
                self.asks[delivery.group, delivery.name, delivery.process].append(delivery)
        self.losses = defaultdict(list)
        for note in run.notes:
            if note.what == "lost":
                self.losses[note.facts["group"]].append(note)

    def __call__(self):
        """Check everything."""
        if any(strike.kind in RESETS for strike in self.run.strikes):
            return []
        found = []
        for timed in self.run.lineages[-1]:
            found.extend(self._commit(Changed(timed)))
        for check in (
            self.publishers,
            self.named,
            self.handed,
            self.handled,
            self.overlaps,
            self.listeners,
            self.receipts,
            self.all_settled,
        ):
            found.extend(check())
        return found

    def hit(self, invariant, at, node=""):
        """Note that an invariant was checked on something that happened."""
        self.hits.append(Hit(invariant, at, node.partition("#")[0]))

    def _deliveries(self):
        found = {}
        for note in self.run.notes:
            number = note.facts.get("delivery")
            if number is None:
                continue
            if note.what == "handed":
                found[number] = Delivery(number, note.process, note.at, note.revision, note.facts)
                continue
            delivery = found[number]
            if note.what == "begins":
                delivery.begun, delivery.begun_revision = note.at, note.revision
            elif note.what == "ends":
                delivery.ended = note.at
            elif note.what == "asks":
                delivery.asked, delivery.effect = note.at, note.facts["effect"]
            elif note.what == "handled":
                delivery.outcome, delivery.told = note.facts["outcome"], note.at
        return found

    # ── at every revision ───────────────────────────────────────────────────────────────────────

    def _commit(self, changed):
        yield from self._published(changed)
        for group in self.groups.values():
            yield from self._claimed(group, changed)
            done = yield from self._moved(group, changed)
            yield from self._effects(group, changed, done)
            yield from self._buried(group, changed, done)
        yield from self._trimmed(changed)

    def _published(self, changed):
        """Check that a message is put once, in order, with its marker; that an id names one message at a time."""
        markers = {last_segment(event.key): event.kv for event in changed.puts(("marker", ""))}
        index = 0
        for event in sorted(changed.puts(("message", "")), key=lambda event: last_segment(event.key)):
            name = last_segment(event.key)
            head, _, payload = event.kv.value.partition(b"\n")
            position = Position(event.kv.create_revision, name)
            stored = Stored(
                position, json.loads(payload)["op"], msgspec.json.decode(head, type=Head), changed.at, index
            )
            index += 1
            self.hit("P5", changed.at, changed.origin)
            if event.kv.version != 1 or name in self.stored:
                yield Violation("P5", f"{stored} was put again at {changed.revision}", changed.at)
                continue
            if not stored.head.dead and self.by_operation[stored.operation]:
                yield Violation("P5", f"{stored} was published before: {self.by_operation}", changed.at)
            if stored.head.id and not stored.head.dead:
                if stored.head.id in self.markers:
                    before = self.markers[stored.head.id]
                    yield Violation("P5", f"{stored} has the id of {before}", changed.at)
                if stored.head.id not in markers:
                    yield Violation("P5", f"{stored} has no marker", changed.at)
            if not stored.head.dead:
                self.by_operation[stored.operation].append(stored)
            self.stored[name] = stored
            insort(self.order, (position, name))
        for event in changed.kinds.get(("marker", ""), ()):
            message_id = last_segment(event.key)
            if event.is_delete:
                self.markers.pop(message_id, None)
                self.marked.append((changed.revision, message_id, ""))
            else:
                self.markers[message_id] = event.kv.value.decode()
                self.marked.append((changed.revision, message_id, event.kv.value.decode()))

    def _trimmed(self, changed):
        """Check that whole revisions go, the oldest by their publishers' clocks, with a mark, and nothing needed."""
        gone = sorted(
            self.stored[last_segment(event.key)].position for event in changed.deletes(("message", ""))
        )
        marks = changed.puts(("trimmed", ""))
        if not gone and not marks:
            return
        self.hit("trim", changed.at, changed.origin)
        mark = Position(**json.loads(marks[0].kv.value)) if marks else BEGINNING
        self.trimmed = max(self.trimmed, *gone)
        if mark != self.trimmed:
            yield Violation("trim", f"{gone} were trimmed, and the mark is {mark}", changed.at)
        for position in gone:
            self.stored[position.name].deleted = changed.revision
        left = [self.stored[name] for _, name in self.order if not self.stored[name].deleted]
        revisions = {position.revision for position in gone}
        if any(stored.position.revision in revisions for stored in left):
            yield Violation("trim", f"half of a revision was trimmed: {gone}", changed.at)
        if len(left) < self.shape.count:
            yield Violation("trim", f"{len(left)} of {self.shape.count} are left", changed.at)
        if self.shape.unacknowledged:
            return
        for group in self.groups.values():
            # A group that was made while the trimmer looked begins after what is trimmed.
            needed = [one for one in gone if group.cursor and self._is_needed(group, one)]
            if needed:
                yield Violation("trim", f"{group.name} at {group.position} still needs {needed}", changed.at)

    def _is_needed(self, group, position):
        return position > group.position and position.revision > group.created

    # ── the groups, at every revision ───────────────────────────────────────────────────────────

    def _claimed(self, group, changed):
        """Check who may handle a message: first in line, or the one claim; and that what is done is not begun."""
        for event in changed.kinds.get(("consumer", group.name), ()):
            if event.is_delete:
                group.line.pop(event.key, None)
            elif event.key not in group.line:
                group.line[event.key] = event.kv.create_revision
        for event in changed.kinds.get(("claim", group.name), ()):
            name = last_segment(event.key)
            if event.is_delete:
                group.claims.pop(name, None)
                group.touched[name] = changed.at
                continue
            stored = self.stored[name]
            self.hit("claim", changed.at, changed.origin)
            if event.kv.version != 1:
                yield Violation("claim", f"{group.name}: {stored} was claimed over a claim", changed.at)
            group.claims[name] = event.kv.create_revision
            if "#" in changed.origin and group.is_done(stored):
                yield Violation("P2", f"{group.name}: {stored} was claimed though it was done", changed.at)
        for event in changed.puts(("cursor", group.name)):
            if event.kv.version == 1 or group.name == SHARED:
                continue
            self.hit("fence", changed.at, changed.origin)
            first = min(group.line, key=group.line.__getitem__, default=None)
            owner = None if first is None else self.run.leases.get(place_lease(first))
            if owner != changed.origin:
                yield Violation("fence", f"{changed.origin} moved the cursor, {owner} is first", changed.at)

    def _moved(self, group, changed):
        """Check how far the group came; return the messages that it is done with now."""
        done = []
        for event in changed.puts(("progress", group.name)):
            name, progress = last_segment(event.key), msgspec.json.decode(event.kv.value, type=Progress)
            before, stored = group.progress.get(name, Progress()), self.stored[name]
            if (before.done or stored.position <= group.position) and not stored.deleted:
                yield Violation(
                    "P2", f"{group.name}: {stored} has progress {progress} after its end", changed.at
                )
            if progress.done:
                done.append(stored)
            else:
                yield from self._begun(group, changed, stored, progress.attempts, before.attempts)
            group.progress[name] = progress
            group.touched[name] = changed.at
        for event in changed.puts(("cursor", group.name)):
            yield from self._cursor(group, changed, event, done)
        for event in changed.deletes(("progress", group.name)):
            name = last_segment(event.key)
            group.progress.pop(name, None)
            if self.stored[name].position > group.position and not self.stored[name].deleted:
                yield Violation("P2", f"{group.name}: the progress of {name} went before its end", changed.at)
        if changed.kinds.get(("cursor", group.name)):
            left = [
                name
                for name in group.progress
                if self.stored[name].position <= group.position and not self.stored[name].deleted
            ]
            if left:
                yield Violation(
                    "left over", f"{group.name}: progress of {left} at {group.position}", changed.at
                )
        for stored in done:
            how = self._how(group, changed, stored)
            if how is None:
                yield Violation("P2", f"{group.name} is done with {stored}, which nobody handled", changed.at)
            self.hit("P2", changed.at, changed.origin)
            group.passed[stored.name] = (changed.at, changed.revision, how, changed.origin)
        return done

    def _begun(self, group, changed, stored, attempts, before):
        self.hit("attempts", changed.at, changed.origin)
        group.begun.setdefault((stored.name, attempts), []).append(changed.origin)
        if attempts not in {before + 1, before - 1}:
            yield Violation("attempts", f"{group.name}: {stored} from {before} to {attempts}", changed.at)
        if attempts > self.shape.max_retries + 1:
            yield Violation("attempts", f"{group.name}: {stored} was begun {attempts} times", changed.at)

    def _cursor(self, group, changed, event, done):
        cursor = Cursor.parse(event.kv)
        position = cursor.position(event.kv)
        if group.cursor is None:
            group.created, group.cursor, group.position = changed.revision, cursor, position
            return
        old, before = group.position, group.cursor
        if position < old:
            yield Violation("P4", f"{group.name} went back from {old} to {position}", changed.at)
        if position != old and position.name not in self.stored:
            yield Violation("P4", f"{group.name} stands at no message: {position}", changed.at)
        between = self._between(group, old, position)
        for stored in between:
            yield from self._passed(group, changed, stored, done, last=stored.position == position)
        group.cursor, group.position, group.moved = cursor, position, changed.at
        if not cursor.head:
            return
        stored = self.stored[cursor.head]
        self.hit("P4", changed.at, changed.origin)
        left_out = [one for one in self._between(group, position, stored.position)[:-1] if not one.deleted]
        if (left_out and not self.stale) or stored.position <= position:
            yield Violation("P4", f"{group.name} begins {stored} before {left_out}", changed.at)
        tried = before.attempts if before.head == cursor.head else 0
        if (tried, before.head) != (cursor.attempts, cursor.head):
            yield from self._begun(group, changed, stored, cursor.attempts, tried)

    def _between(self, group, after, up_to):
        """List a group's messages after a position, up to another one, in order."""
        first, last = (bisect_right(self.order, (one, one.name)) for one in (after, up_to))
        found = [self.stored[name] for _, name in self.order[first:last]]
        return [stored for stored in found if stored.is_for(group.name)]

    def _passed(self, group, changed, stored, done, *, last):
        """Check that a cursor passes only what is done, what is handled in this commit, and what was reported."""
        if group.name == SHARED and stored.name in group.passed:
            return
        if group.name == ORDERED and last:
            done.append(stored)
            return
        if self._is_superseded(group, stored):
            return
        if not stored.deleted and not self.stale:
            yield Violation("P2", f"{group.name} passed {stored} without handling it", changed.at)
            return
        revision = stored.position.revision
        if revision <= group.created:
            return  # a group that begins with the oldest there is begins after what was trimmed meanwhile
        self.hit("P6", changed.at, changed.origin)
        if not any(
            note.facts["after"] <= revision <= note.facts["up_to"] and note.at <= changed.at
            for note in self.losses[group.name]
        ):
            yield Violation("P6", f"{group.name} passed {stored}, which was lost, in silence", changed.at)

    def _how(self, group, changed, stored):
        """Say in which way a group came to be done with a message; None: in no way that is right."""
        letters = [last_segment(event.key) for event in changed.puts(("dead", group.name))]
        if stored.letter in letters:
            return "buried"
        if stored.head.mode == AT_MOST_ONCE:
            return "before"
        if self._is_superseded(group, stored):
            return "superseded"
        asks = [one for one in self._asked(group, changed, stored) if one.asked <= changed.at]
        return "acknowledged" if asks else None

    @staticmethod
    def _is_superseded(group, stored):
        """Whether it is a copy of a dead letter that has another copy by now, or is none any more."""
        dead = stored.head.dead
        return bool(dead) and (group.copies.get(dead) is not stored or dead not in group.letters)

    def _asked(self, group, changed, stored):
        return self.asks[group.name, stored.name, changed.origin]

    def _effects(self, group, changed, done):
        """Check that effects come with the acknowledgement of their message, once."""
        put = {}
        for event in changed.puts(("effect", group.name)):
            operation = int(event.key.rpartition(b"/")[2])
            put[operation] = json.loads(event.kv.value)
            self.hit("P3", changed.at, changed.origin)
            if put[operation] != 1 or (group.name, operation) in self.effects:
                yield Violation("P3", f"{group.name}: the effect of {operation} took place again", changed.at)
            self.effects[group.name, operation] = changed.revision
            if operation not in {stored.operation for stored in done}:
                yield Violation("P3", f"{group.name}: the effect of {operation} without its end", changed.at)
        echoes = [json.loads(event.kv.value.partition(b"\n")[2]) for event in changed.puts(("echo", ""))]
        told = sorted(echo["op"] for echo in echoes if echo["group"] == group.name)
        if told != sorted(put):
            yield Violation("P3", f"{group.name}: effects {sorted(put)}, and messages of {told}", changed.at)
        for stored in done:
            asks = {one.effect for one in self._asked(group, changed, stored) if one.asked <= changed.at}
            if group.passed[stored.name][2] != "acknowledged" or len(asks) != 1:
                continue
            if asks != {stored.operation in put}:
                yield Violation("P3", f"{group.name}: {stored} ended with effects {put}", changed.at)

    def _buried(self, group, changed, done):
        """Check that dead letters come with the end of their message, and go with an acknowledgement."""
        ends = {stored.letter: stored for stored in done}
        for event in changed.puts(("message", "")):
            copy = self.stored[last_segment(event.key)]
            if not copy.head.dead or copy.head.group != group.name:
                continue
            earlier = group.copies.get(copy.head.dead)
            if copy.head.dead not in group.letters or (
                earlier and not earlier.deleted and earlier.name not in group.passed
            ):
                yield Violation("dead letter", f"{group.name}: {copy.head.dead} was replayed twice", changed.at)
            group.copies[copy.head.dead] = copy
        for event in changed.puts(("dead", group.name)):
            letter = last_segment(event.key)
            death = msgspec.json.decode(event.kv.value.partition(b"\n")[0], type=Death)
            self.hit("dead letter", changed.at, changed.origin)
            if letter not in ends:
                yield Violation("dead letter", f"{group.name}: {letter} died without its end", changed.at)
            elif death.attempts != self.shape.max_retries + 1:
                yield Violation(
                    "dead letter", f"{group.name}: {letter} died after {death.attempts}", changed.at
                )
            group.letters[letter] = death
        for event in changed.deletes(("dead", group.name)):
            letter = last_segment(event.key)
            group.letters.pop(letter, None)
            discarded = any(
                note.what == "discards" and note.facts["group"] == group.name and note.facts["name"] == letter
                for note in self.run.notes
            )
            if letter not in ends and not discarded:
                yield Violation("dead letter", f"{group.name}: {letter} is gone", changed.at)
        for stored in done:
            acknowledged = group.passed[stored.name][2] == "acknowledged"
            if acknowledged and stored.head.dead and stored.head.dead in group.letters:
                yield Violation("dead letter", f"{group.name}: {stored} lives, and is dead", changed.at)

    # ── P5: publishers ──────────────────────────────────────────────────────────────────────────

    def publishers(self):
        """Check what publishers were told: confirmed is there, at that revision; what failed is not there."""
        outcomes = {
            note.facts["operation"]: note.facts["outcome"] for note in self.run.notes if note.what == "told"
        }
        receipts = {note.facts["operation"]: note for note in self.run.notes if note.what == "receipt"}
        executed = {note.facts["operation"]: note.facts for note in self.run.notes if note.what == "executed"}
        order = defaultdict(list)
        for note in self.run.notes:
            if note.what != "message":
                continue
            operation, number, message_id = (note.facts[name] for name in ("operation", "number", "id"))
            at = len(order[operation])
            order[operation].append(number)
            found = self.by_operation[number]
            outcome = outcomes.get(operation, "cut")
            self.hit("P5", note.at, note.process)
            if outcome == "failed" and operation not in receipts and found:
                yield Violation("P5", f"{number} was told to have failed: {found}", note.at)
            if operation in receipts:
                yield from self._confirmed(receipts[operation], number, found)
            elif operation in executed:
                facts = executed[operation]
                revisions = [stored.position.revision for stored in found]
                success = facts["success"][at]
                expected = {True: [[facts["revision"]]], False: [[]], None: [[], [facts["revision"]]]}[success]
                if revisions not in expected:
                    yield Violation("P5", f"{number}: told {facts}, found {found}", note.at)
            elif outcome == "done" and not message_id and not found:
                yield Violation("P5", f"{number} was confirmed, and is not there", note.at)
        for numbers in order.values():
            found = [stored for number in numbers for stored in self.by_operation[number]]
            if sorted(found, key=lambda stored: stored.position) != found:
                yield Violation("P4", f"published together, in the wrong order: {found}")
            if len({stored.position.revision for stored in found}) > 1:
                yield Violation("P5", f"published together, and not at once: {found}")

    def _confirmed(self, note, number, found):
        told = note.facts["revision"]
        if not note.facts["duplicate"]:
            if [told] != [stored.position.revision for stored in found]:
                yield Violation("P5", f"{number} was told revision {told}, found {found}", note.at)
            return
        if found:
            yield Violation("P5", f"{number} was told to be a duplicate of {told}: {found}", note.at)
        named = [
            stored
            for stored in self.stored.values()
            if stored.head.id == note.facts["id"]
            and stored.position.revision == told
            and stored.operation != number
        ]
        self.hit("duplicate", note.at, note.process)
        if not named:
            yield Violation("P5", f"{number} was told to be a duplicate of {told}, where nothing is", note.at)

    def named(self):
        """Check that an id is dropped only while a message has it."""
        outcomes = {
            note.facts["operation"]: note.facts["outcome"] for note in self.run.notes if note.what == "told"
        }
        for note in self.run.notes:
            if (
                note.what != "message"
                or not note.facts["id"]
                or outcomes.get(note.facts["operation"]) != "done"
            ):
                continue
            if not self.by_operation[note.facts["number"]]:
                others = [stored for stored in self.stored.values() if stored.head.id == note.facts["id"]]
                if not others:
                    yield Violation("P5", f"{note} was dropped, and nobody has its id", note.at)

    # ── P1, P3: deliveries ──────────────────────────────────────────────────────────────────────

    def handed(self):
        """Check that what is handed over was begun by whom it was handed to, and each attempt once."""
        attempts = defaultdict(list)
        for delivery in self.deliveries.values():
            facts, group = delivery.facts, self.groups[delivery.group]
            stored = self.stored.get(delivery.name)
            self.hit("P1", delivery.at, delivery.process)
            if stored is None or (stored.position.revision, stored.index) != facts["place"]:
                yield Violation("P4", f"{delivery} is not {stored}", delivery.at)
                continue
            if not stored.is_for(delivery.group):
                yield Violation("P4", f"{delivery} is for another group", delivery.at)
            before = attempts[delivery.group, delivery.name]
            if facts["mode"] == AT_MOST_ONCE:
                self.hit("P1 once", delivery.at, delivery.process)
                if before:
                    yield Violation("P1", f"{delivery} was handed over before: {before}", delivery.at)
                if delivery.name not in group.passed or group.passed[delivery.name][1] > delivery.revision:
                    yield Violation("P1", f"{delivery} was handed over before its end", delivery.at)
            else:
                if delivery.process not in group.begun.get((delivery.name, facts["attempt"]), ()):
                    yield Violation("attempts", f"{delivery} was never begun", delivery.at)
                same = [one for one in before if one.facts["attempt"] == facts["attempt"]]
                # A conflict is no attempt, whatever was told about it.
                # Nor is a message counted that was trimmed: who has it in memory begins with what is before it.
                trimmed = self._was_trimmed(delivery) or any(
                    self._was_trimmed(other) and before[-1].at < other.at < delivery.at
                    for other in self.deliveries.values()
                    if before and other.group == delivery.group
                )
                if not trimmed and any(one.outcome not in {"conflict", "cancelled", ""} for one in same):
                    yield Violation("attempts", f"{delivery} has the number of {same}", delivery.at)
            before.append(delivery)

    def _was_trimmed(self, delivery):
        stored = self.stored.get(delivery.name)
        return bool(stored and stored.deleted and stored.deleted <= delivery.revision)

    def handled(self):
        """Check what handlers were told: done means acknowledged, and refused means that nothing was written."""
        for delivery in self.deliveries.values():
            group = self.groups[delivery.group]
            passed = group.passed.get(delivery.name)
            asks = self.asks[delivery.group, delivery.name, delivery.process]
            if delivery.outcome == "done" and delivery.asked is not None:
                self.hit("P3", delivery.told, delivery.process)
                if passed is None or passed[0] > delivery.told:
                    yield Violation(
                        "P2", f"{delivery} was told that it is acknowledged: {passed}", delivery.told
                    )
                elif delivery.effect and (delivery.group, delivery.facts["operation"]) not in self.effects:
                    yield Violation("P3", f"{delivery} was told that its effect took place", delivery.told)
            refused = delivery.outcome in {"conflict", "raised"} and asks == [delivery]
            if refused and passed is not None and passed[2:] == ("acknowledged", delivery.process):
                yield Violation("P3", f"{delivery} was told that nothing was written", delivery.told)

    def overlaps(self):
        """Check that a handler runs alone, unless the other one's right was gone from the store when it began."""
        running = defaultdict(list)
        for delivery in sorted(self.deliveries.values(), key=lambda one: one.begun or 0):
            if delivery.begun is None or delivery.facts["mode"] == AT_MOST_ONCE:
                continue
            what = delivery.group if delivery.group == ORDERED else delivery.name
            for other in running[what]:
                if other.ended <= delivery.begun:
                    continue
                self.hit("overlap", delivery.begun, delivery.process)
                # One that lost its right a moment ago is still to hear of it.
                if all(self._had_right(one, delivery.begun_revision) for one in (other, delivery)):
                    yield Violation("P3", f"{delivery} began while {other} was running", delivery.begun)
            running[what].append(delivery)

    def _had_right(self, delivery, revision):
        """Whether a delivery's place in line, or claim, was in the store at a revision."""
        kind = "consumer" if delivery.group == ORDERED else "claim"
        token = delivery.facts["token"]
        there, key = False, None
        for timed in self.run.lineages[-1]:
            if timed.commit.revision > revision:
                break
            for event in timed.commit.events:
                if _kind(event.key) != (kind, delivery.group):
                    continue
                if not event.is_delete and event.kv.create_revision == token:
                    there, key = True, event.key
                elif event.is_delete and event.key == key:
                    there = False
        return there

    # ── P2, P4, P6: listeners ───────────────────────────────────────────────────────────────────

    def listeners(self):
        """Check that a listener hears all, in order, once, from where it began; what it misses is told and gone."""
        public = [stored for _, name in self.order if not (stored := self.stored[name]).head.group]
        places = [(stored.position.revision, stored.index) for stored in public]
        began, entered, at, looks = {}, {}, {}, {}
        gaps = defaultdict(list)
        for note in self.run.notes:
            number = note.facts.get("subscription")
            if note.what == "listens":
                began[number] = note
            elif note.what == "listening":
                entered[number] = note.revision
            elif note.what == "missed":
                self.hit("gap", note.at, note.process)
                gaps[number].append(note)
            elif note.what == "hears":
                self.hit("P6", note.at, note.process)
                self.hit("P4", note.at, note.process)
                place = note.facts["place"]
                index = bisect_right(places, place) - 1
                if index < 0 or places[index] != place or public[index].operation != note.facts["number"]:
                    yield Violation("P4", f"{note} heard what is not there", note.at)
                    continue
                if number in at and index <= at[number]:
                    yield Violation("P4", f"{note} heard again, or out of order", note.at)
                least, first = self._first(began[number], entered[number], places)
                if number not in at and index < least and not self.stale:
                    yield Violation("P4", f"{note} heard what came before it began", note.at)
                hole = public[at[number] + 1 if number in at else first : index]
                # Who begins with the oldest there is misses nothing that was trimmed before it looked.
                looked = looks.setdefault(number, note.revision if began[number].facts["start"] == 0 else 0)
                yield from self._hole(note, hole, gaps[number], looked)
                at[number] = index

    @staticmethod
    def _first(note, entered, places):
        """Say from which index on a listener may hear messages, and from which on it must."""
        start = note.facts["start"]
        if start is not None:
            index = bisect_right(places, (start, -1))
            return index, index
        return bisect_right(places, (note.revision, 1 << 30)), bisect_right(places, (entered, 1 << 30))

    def _hole(self, note, hole, gaps, looked):
        for stored in hole:
            revision = stored.position.revision
            told = any(gap.facts["after"] <= revision <= gap.facts["up_to"] for gap in gaps)
            gone = self.stale or (stored.deleted and stored.deleted <= note.revision)
            if not (gone and (told or (stored.deleted and stored.deleted <= looked))):
                yield Violation("P6", f"{note} did not hear {stored}; told: {gaps}", note.at)

    # ── receipts, and the end ───────────────────────────────────────────────────────────────────

    def receipts(self):
        """Check that a publisher is told the truth about who has acknowledged."""
        for note in self.run.notes:
            if note.what != "acknowledged" or note.facts.get("duplicate"):
                continue
            for stored in self.by_operation[note.facts["number"]]:
                for name in note.facts["by"]:
                    self.hit("receipt", note.at, note.process)
                    group = self.groups[name]
                    if not group.is_done(stored) or group.created >= stored.position.revision:
                        yield Violation("P2", f"{note} of {stored}: {group}", note.at)

    def all_settled(self):
        """Check that in the end every group is done with everything, and no claim is left."""
        for group in self.groups.values():
            if group.cursor is None:
                yield Violation("P2", f"{group.name} was never made", self.run.calm_at)
                continue
            left = [
                stored
                for stored in self.stored.values()
                if stored.is_for(group.name) and not stored.deleted and not group.is_done(stored)
                if self._is_needed(group, stored.position)
            ]
            stale = [
                name
                for name, at in group.touched.items()
                if name in group.progress
                and at + 1.0 < group.moved
                and self.stored[name].position <= group.position
            ]
            # A floor that moves once in 64 messages forgets what was trimmed more slowly than a run is long.
            if stale and self.shape.buffers != "large":
                yield Violation("left over", f"{group.name}: progress of {stale}", self.run.calm_at)
            if left:
                yield Violation(
                    "P2", f"{group.name} at {group.position} never got {left[:3]}", self.run.calm_at
                )


def at_rest(simulation):
    """Check that at rest nobody holds a claim, and that each session has one place in each line at most."""
    run, store = simulation.run, simulation.server.store
    kinds = {strike.kind for strike in run.strikes}
    if kinds & (STRAY_COPIES | RESETS):
        return
    places = defaultdict(list)
    for kv in store.snapshot().kvs:
        if kv.key.startswith(NEWS.claims(SHARED)):
            yield Violation("left over", f"{kv} is left although everything is done", simulation.now)
        for line in (NEWS.consumers(ORDERED), NEWS.trimmers):
            if kv.key.startswith(line):
                places[line, kv.lease].append(kv)
    for keys in places.values():
        if len(keys) > 1:
            yield Violation("left over", f"more than one place in line: {keys}", simulation.now)


TOPICS = Workload("topics", shape_of, shape_from, TopicProgram, TopicChecks, at_rest, CELLS)
