"""The lock's invariants L1 to L8, checked on what really happened in a simulated run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

from etcd_infra._etcd.keys import place_lease
from etcd_infra._etcd.model import Txn
from etcd_infra.testing import Claim, FaultKind, Grant, Hit, Violation, check_fences, check_grants
from etcd_infra.testing.fences import first_in_line, turns
from tests.simulation.locks import DATA, KEYS, LockProgram, shape_from, shape_of
from tests.simulation.workload import Workload

SIGNAL_SECONDS = 1.0
HAND_OVER_SECONDS = 1.0
STALE_SECONDS = 6.0
SUSPEND_SECONDS = 1.2
STOPS = frozenset({FaultKind.PAUSE, FaultKind.BLOCK, FaultKind.SUSPEND})
STRAY_COPIES = frozenset({FaultKind.DUPLICATE, FaultKind.FOREIGN_RECREATE})
# Faults after which no lease is left, not even until it runs out.
CLEAN = frozenset(
    {
        FaultKind.CANCEL,
        FaultKind.COMPACTION,
        FaultKind.FOREIGN_DELETE,
        FaultKind.LEADER_CHANGE,
        FaultKind.CLOCK_RATE,
        FaultKind.DUPLICATE_EVENTS,
        FaultKind.PAST_EVENTS,
        FaultKind.LOST_DELETE,
        FaultKind.EARLY_PROGRESS,
    }
)
RESETS = frozenset({FaultKind.RESTORE, FaultKind.WIPE})

# For how long after a fault a node may still be slow to notice things (seconds; those not named: not at all).
UNSETTLED = {
    FaultKind.KILL: 0.0,
    FaultKind.PAUSE: 2.0,
    FaultKind.BLOCK: 2.0,
    FaultKind.SUSPEND: 2.0,
    FaultKind.CLOCK_RATE: 0.0,
    FaultKind.PARTITION: 8.0,
    FaultKind.CUT_REQUESTS: 8.0,
    FaultKind.CUT_ANSWERS: 8.0,
    FaultKind.RESET: 2.0,
    FaultKind.SLOW: 3.0,
    FaultKind.LOST_REQUEST: 7.0,
    FaultKind.LOST_ANSWER: 7.0,
    FaultKind.LATE: 7.0,
    FaultKind.DUPLICATE: 0.0,
    FaultKind.DELAYED_ANSWER: 3.0,
    FaultKind.LEADER_CHANGE: 2.0,
    FaultKind.NO_QUORUM: 8.0,
    FaultKind.FULL: 3.0,
    FaultKind.DENY: 3.0,
    FaultKind.RESTORE: 1000.0,
    FaultKind.WIPE: 1000.0,
    FaultKind.CREATED_CANCELED: 3.0,
}

# Which invariants each fault threatens: each of these pairs must really meet, in enough runs.
CELLS = {
    FaultKind.KILL: ("L4", "L6"),
    FaultKind.PAUSE: ("L1", "L7"),
    FaultKind.BLOCK: ("L1", "L7"),
    FaultKind.SUSPEND: ("L1", "L7"),
    FaultKind.CLOCK_RATE: ("L7",),
    FaultKind.PARTITION: ("L1", "L7"),
    FaultKind.CUT_REQUESTS: ("L7",),
    FaultKind.CUT_ANSWERS: ("L6", "L7"),
    FaultKind.RESET: ("L3", "L6"),
    FaultKind.SLOW: ("L4", "L7"),
    FaultKind.LOST_REQUEST: ("L3", "L6"),
    FaultKind.LOST_ANSWER: ("L3", "L6"),
    FaultKind.LATE: ("L1", "L3", "L6"),
    FaultKind.DUPLICATE: ("L3", "L8"),
    FaultKind.DELAYED_ANSWER: ("L7",),
    FaultKind.LEADER_CHANGE: ("L4", "L7"),
    FaultKind.NO_QUORUM: ("L3", "L7"),
    FaultKind.COMPACTION: ("L4",),
    FaultKind.REVOKE: ("L1", "L7"),
    FaultKind.FOREIGN_DELETE: ("L7", "L8"),
    FaultKind.FOREIGN_RECREATE: ("L7", "L8"),
    FaultKind.RESTORE: ("L2",),
    FaultKind.WIPE: ("L2",),
    FaultKind.FULL: ("L6", "L8"),
    FaultKind.DENY: ("L3", "L6"),
    FaultKind.CANCEL: ("L6", "L8"),
    FaultKind.DUPLICATE_EVENTS: ("L4",),
    FaultKind.PAST_EVENTS: ("L4",),
    FaultKind.EARLY_PROGRESS: ("L4",),
    FaultKind.LOST_DELETE: ("L4",),
    FaultKind.CREATED_CANCELED: ("L3",),
    FaultKind.SPURIOUS_REVOKE: ("L1", "L7"),
    FaultKind.RENEWED_THOUGH_REVOKED: ("L1", "L7"),
    FaultKind.STALE_READ: ("L3", "L4"),
}


@dataclass
class Story:
    """One acquisition from being asked for to its end; moments are true seconds, None if not reached."""

    process: str
    operation: int
    lock: str
    way: str
    asked: float
    asked_revision: int
    lineage: int
    granted: float | None = None
    granted_revision: int = 0
    granted_lineage: int = -1
    token: int = 0
    key: bytes = b""
    others: tuple[bytes, ...] = ()
    leaving: float | None = None
    leaving_status: str = ""
    end: str = ""
    ended: float | None = None

    @property
    def node(self):
        """Name the node."""
        return self.process.partition("#")[0]

    @property
    def keys(self):
        """List the keys that were granted."""
        return (self.key, *self.others)


def stories(run):
    """Put together what the programs told of each acquisition."""
    found = {}
    for note in run.notes:
        operation = note.facts.get("operation")
        if note.what == "asked":
            found[operation] = Story(
                note.process,
                operation,
                note.facts["lock"],
                note.facts["way"],
                note.at,
                note.revision,
                note.lineage,
            )
        elif note.what == "granted":
            story = found[operation]
            story.granted, story.granted_revision, story.granted_lineage = note.at, note.revision, note.lineage
            story.token, story.key = note.facts["token"], note.facts["key"]
            story.others = note.facts.get("others", ())
        elif note.what == "leaving" and found[operation].leaving is None:
            found[operation].leaving, found[operation].leaving_status = note.at, note.facts["status"]
        elif note.what in {"done", "failed", "cancelled"} and not found[operation].end:
            found[operation].end, found[operation].ended = note.what, note.at
    return found


class LockChecks:
    """
    All checks of one run; `hits` counts for each invariant what was really checked, and when and where.

    `prefix` is that of all lines, `rule` says who owns one, `registers` which lines decide of a lock.
    """

    prefix = KEYS.locks
    rule = staticmethod(first_in_line)
    registers = staticmethod(LockProgram.registers)

    def __init__(self, run):
        self.run = run
        self.stories = list(stories(run).values())
        self.hits = []
        self._resets = [strike.begin for strike in run.strikes if strike.kind in RESETS]

    def __call__(self):
        """Check everything."""
        return [
            *self.fences(),
            *self.grants(),
            *self.losses(),
            *self.hand_overs(),
            *self.foreign_releases(),
            *self.failures(),
        ]

    def told_in(self, number):
        """List those that asked for and were granted something within one lineage of the store."""
        return [story for story in self.stories if story.granted_lineage == number == story.lineage]

    def hit(self, invariant, at, node=""):
        """Note that an invariant was checked on something that happened."""
        self.hits.append(Hit(invariant, at, node))

    # ── L1 ──────────────────────────────────────────────────────────────────────────────────────

    def fences(self):
        """Check that each fenced write came from the owner."""
        for number, lineage in enumerate(self.run.lineages):
            began = self.run.began_at[number]
            # After a restore an owner of before may still have its key, and another one's is there again.
            mine = {story.token for story in self.told_in(number)}
            claim = partial(self._claim_among, mine)
            yield from check_fences([timed.commit for timed in lineage], self.prefix, claim, rule=self.rule)
            for timed in lineage:
                if timed.at >= began and any(self._claim_of(event) for event in timed.commit.events):
                    self.hit("L1", timed.at, timed.origin.partition("#")[0])

    # ── L2, L3, L5 ──────────────────────────────────────────────────────────────────────────────

    def grants(self):
        """Check what callers were told against who was first in line."""
        for number, lineage in enumerate(self.run.lineages):
            told = self.told_in(number)
            grants = [
                Grant(line, story.token, story.asked_revision, story.granted_revision, story.process)
                for story in told
                for line in self.registers(story.lock).values()
            ]
            yield from check_grants([timed.commit for timed in lineage], self.prefix, grants, rule=self.rule)
            for story in told:
                for invariant in ("L2", "L3", "L5"):
                    self.hit(invariant, story.granted, story.node)

    # ── L7 ──────────────────────────────────────────────────────────────────────────────────────

    def losses(self):
        """Check that a body ended before its lease could, and soon after its key was deleted."""
        deleted = self._deletions()
        for story in self.stories:
            if story.granted is None:
                continue
            ends = [deleted.get((story.granted_lineage, key, story.token)) for key in story.keys]
            gone = min(filter(None, ends), key=lambda timed: timed.at, default=None)
            if gone is None or (gone.origin.partition("#")[0] == story.node and isinstance(gone.request, Txn)):
                continue
            left = story.leaving
            if left is None and self._died(story):
                continue
            left = self.run.calm_at + 10**6 if left is None else left
            if gone.origin == "expiry":
                yield from self._expired(story, gone, left)
            else:
                yield from self._deleted(story, gone, left)

    def _expired(self, story, gone, left):
        allowed = self._runs_again(story.node, gone.at)
        self.hit("L7", gone.at, story.node)
        # Nothing cancels who holds by hand; `status` must tell the truth when it is asked.
        if left > allowed and story.way != "by hand":
            yield Violation("L7", f"{story} went on after its lease had ended at {gone.at}", left)
        elif story.leaving_status == "acquired" and left > gone.at:
            yield Violation("L7", f"{story} called itself held after its lease had ended at {gone.at}", left)

    def _deleted(self, story, gone, left):
        if left < gone.at:
            return
        self.hit("L7", gone.at, story.node)
        late = self._undisturbed(story.node, gone.at, left) and left > gone.at + SIGNAL_SECONDS
        if late and (story.way != "by hand" or story.leaving_status == "acquired"):
            yield Violation("L7", f"{story} was told late of the deletion at {gone.at}", left)

    def _deletions(self):
        found = {}
        for number, lineage in enumerate(self.run.lineages):
            for timed in lineage:
                for event in timed.commit.events:
                    if event.is_delete and event.prev_kv is not None and event.key.startswith(self.prefix):
                        incarnation = (number, event.key, event.prev_kv.create_revision)
                        found.setdefault(incarnation, timed)
        return found

    def _died(self, story):
        return any(
            strike.kind is FaultKind.KILL and strike.node == story.node and strike.begin >= story.granted
            for strike in self.run.strikes
        )

    def _runs_again(self, node, at):
        """Say until when a node may be late: a process that is stopped sees nothing."""
        until = at
        for strike in sorted(self.run.strikes, key=lambda strike: strike.begin):
            if (
                strike.kind in STOPS
                and strike.node == node
                and strike.begin <= until <= strike.end + SUSPEND_SECONDS
            ):
                until = max(until, min(strike.end, max(self.run.calm_at, until)) + SUSPEND_SECONDS)
        return until

    def _undisturbed(self, node, begin, end):
        return not any(
            strike.kind in UNSETTLED
            and strike.node in {"", node}
            and strike.begin <= end
            and strike.end + UNSETTLED[strike.kind] >= begin
            for strike in self.run.strikes
        )

    # ── L4 ──────────────────────────────────────────────────────────────────────────────────────

    def hand_overs(self):
        """Check that an undisturbed waiter is granted its turn at once when it comes."""
        for story in self.stories:
            if story.granted is None or story.way in {"attempt", "manual", "quorum"}:
                continue
            turn = self._turn_began(story)
            if turn is None or turn <= story.asked:
                continue
            if self._undisturbed(story.node, turn, story.granted):
                self.hit("L4", turn, "")
                if story.granted > turn + self._hand_over_seconds(turn, story.granted):
                    yield Violation("L4", f"{story} waited on although its turn came at {turn}", story.granted)

    def _hand_over_seconds(self, begin, end):
        # Three looks in ten are stale then, and each is made again a little later.
        stale = any(
            strike.kind is FaultKind.STALE_READ and strike.begin <= end and strike.end >= begin
            for strike in self.run.strikes
        )
        return STALE_SECONDS if stale else HAND_OVER_SECONDS

    def _turn_began(self, story):
        if story.lineage != story.granted_lineage:
            return None
        turns = self._turns(story.granted_lineage)
        begun = [turns.get((line, story.token)) for line in self.registers(story.lock).values()]
        return None if None in begun else max(begun)

    def _turns(self, number):
        if not hasattr(self, "_all_turns"):
            self._all_turns = {}
        if number not in self._all_turns:
            lineage = self.run.lineages[number]
            at = {timed.commit.revision: timed.at for timed in lineage}
            history = turns([timed.commit for timed in lineage], self.prefix, rule=self.rule)
            self._all_turns[number] = {
                (line, turn.token): at[turn.begin]
                for line, found in history.items()
                for turn in reversed(found)
            }
        return self._all_turns[number]

    # ── L6 ──────────────────────────────────────────────────────────────────────────────────────

    def failures(self):
        """Count the acquisitions that came to nothing: what `nothing_left` has looked for."""
        for story in self.stories:
            if story.granted is None and story.end in {"failed", "cancelled"}:
                self.hit("L6", story.ended, story.node)
        return ()

    # ── L8 ──────────────────────────────────────────────────────────────────────────────────────

    def foreign_releases(self):
        """Check that each process deletes only its own incarnations, and none that it still holds."""
        held = {
            (story.granted_lineage, key, story.token): story
            for story in self.stories
            if story.token
            for key in story.keys
        }
        owner = self._lease_owners()
        for number, lineage in enumerate(self.run.lineages):
            for timed in lineage:
                if (
                    timed.at < self.run.began_at[number]
                    or not isinstance(timed.request, Txn)
                    or "#" not in timed.origin
                ):
                    continue
                yield from self._own_deletions(timed, number, held, owner)

    def _own_deletions(self, timed, number, held, owner):
        for event in timed.commit.events:
            if not event.is_delete or not event.key.startswith(self.prefix):
                continue
            self.hit("L8", timed.at, timed.origin.partition("#")[0])
            theirs = owner.get(place_lease(event.key))
            if theirs is not None and theirs != timed.origin:
                yield Violation("L8", f"{timed.origin} deleted {event.key!r} of {theirs}", timed.at)
            story = held.get((number, event.key, event.prev_kv.create_revision))
            if (
                story is not None
                and (story.leaving is None or story.leaving > timed.at)
                and not self._died(story)
            ):
                yield Violation("L8", f"{timed.origin} deleted what it held: {story}", timed.at)

    def _lease_owners(self):
        return self.run.leases

    def _claim_among(self, tokens, event):
        claim = self._claim_of(event)
        return claim if claim is not None and claim.token in tokens else None

    def _claim_of(self, event):
        """Read under which token a fenced write was sent."""
        if not event.key.startswith(DATA) or event.is_delete:
            return None
        name, token, _, _ = json.loads(event.kv.value)
        return Claim(self.registers(name)[event.key], token)


def nothing_left(simulation, prefixes=(KEYS.locks,)):
    """
    Check, while every session is open, that nothing of any acquisition is left (L6).

    What hangs on a session that was lost ends with its lease; here only living sessions count.
    """
    run = simulation.run
    store = simulation.server.store
    living = {machine.process.id for machine in simulation.machines.values()}
    sessions = {note.facts["lease"] for note in run.notes if note.what == "resting" and note.process in living}
    kinds = {strike.kind for strike in run.strikes}
    # A copy made by a middle layer, or a key that a stranger puts back, comes after leaving: the patrol's business.
    if not kinds & STRAY_COPIES:
        for kv in store.snapshot().kvs:
            if kv.key.startswith(prefixes) and kv.lease in sessions:
                yield Violation("L6", f"{kv} is left although every acquisition has ended", simulation.now)
    if kinds <= CLEAN:
        for lease, _, keys in store.snapshot().leases:
            if lease not in sessions:
                yield Violation("L6", f"lease {lease} with {keys} is left of an acquisition", simulation.now)


LOCKS = Workload("locks", shape_of, shape_from, LockProgram, LockChecks, nothing_left, CELLS)
