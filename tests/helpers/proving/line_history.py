"""What must be true of what the processes logged, and of the history that the members showed."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from etcd_infra.testing.fences import (
    Claim,
    Grant,
    check_fences,
    check_grants,
    everybody,
    first_in_line,
    readers_or_writer,
    turns,
)
from tests.helpers.semaphore_history import Semaphores, misgiven

if TYPE_CHECKING:
    from etcd_infra._backends.memory_history import Commit

NEVER = 2**62
# What follows the namespace in the keys of each kind, and who owns a line of it.
RULES = {
    "lock": first_in_line,
    "election": first_in_line,
    "rwlock": readers_or_writer,
    "semaphore": everybody,
}


@dataclass
class Ledger:
    """The history by what it says of places, and of writes."""

    commits: list[Commit]
    created: dict[bytes, int] = field(default_factory=dict)
    deleted: dict[bytes, int] = field(default_factory=dict)
    node: dict[bytes, str] = field(default_factory=dict)
    came_back: list[bytes] = field(default_factory=list)
    writes: dict[tuple, int] = field(default_factory=dict)
    doubled: list[tuple] = field(default_factory=list)

    def __post_init__(self) -> None:
        for commit in self.commits:
            for event in commit.events:
                if is_place(event.key):
                    self._place(event)
                elif b"/register/" in event.key and not event.is_delete:
                    self._write(event)

    def _place(self, event):
        if event.is_delete:
            self.deleted[event.key] = event.revision
            return
        if event.kv.mod_revision > event.kv.create_revision:
            return  # another proposal
        if event.key in self.created:
            self.came_back.append(event.key)
        self.created[event.key] = event.kv.create_revision
        self.node[event.key] = json.loads(event.kv.value)["node"]

    def _write(self, event):
        said = json.loads(event.kv.value)
        name = (said["worker"], said["op"], said["which"])
        # Under several locks one write has as many registers, at one revision.
        if self.writes.setdefault(name, event.revision) != event.revision:
            self.doubled.append(name)


def is_place(key: bytes) -> bool:
    """Whether a key is a place in a line."""
    return key.split(b"/")[1].decode() in RULES and not key.endswith(b"/permits")


def claim_of(lines: str):
    """Say how a register's value tells under which token it was written, if it is one of these lines'."""

    def claim(event):
        if b"/register/" not in event.key:
            return None
        said = json.loads(event.kv.value)
        return Claim(said["line"].encode(), said["token"]) if said["line"].startswith(lines) else None

    return claim


def grants_in(logs: dict[str, list[dict]], lines: str) -> list[Grant]:
    """Gather every acquisition of every process in these lines, with the revisions that enclose it."""
    found = []
    for name, steps in logs.items():
        called = 0
        for number, step in enumerate(steps):
            if step["event"] == "call":
                called = step["revision"]
            elif step["event"] == "granted":
                # A write's answer came after the grant: so the grant was told before that revision.
                told = next((later["revision"] for later in steps[number:] if "revision" in later), NEVER)
                found += [
                    Grant(line.encode(), step["token"], called, told, f"{name}, operation {step['op']}")
                    for line in step["lines"]
                    if line.startswith(lines)
                ]
    return found


def turns_of(commits: list[Commit], namespace: str):
    """Say who owned each line, of whatever kind, when."""
    found = {}
    for kind, rule in RULES.items():
        found |= turns(commits, f"{namespace}/{kind}/".encode(), rule=rule)
    # Who stands in a semaphore's queue owns nothing.
    return {line: history for line, history in found.items() if not line.endswith(b"/queue/")}


def check(commits: list[Commit], logs: dict[str, list[dict]], namespace: str, quiet) -> list[str]:
    """
    Hold the processes' logs against the history; return everything that is wrong.

    `quiet(begin, end)` says whether nothing was broken from one moment to another.
    """
    wrong = []
    for kind, rule in RULES.items():
        lines = f"{namespace}/{kind}/"
        wrong += map(str, check_fences(commits, lines.encode(), claim_of(lines), rule=rule))
        wrong += map(str, check_grants(commits, lines.encode(), grants_in(logs, lines), rule=rule))
    wrong += over_given(commits, namespace)
    wrong += never_whole(commits, logs, namespace)
    ledger = Ledger(commits)
    wrong += [f"L8: the place {key!r} came back" for key in ledger.came_back]
    wrong += [f"a write was applied twice: {name}" for name in ledger.doubled]
    wrong += interleaved(commits)
    for name, steps in logs.items():
        wrong += misreported(name, steps, ledger)
        wrong += keys_left_behind(name, steps, ledger, quiet)
    return wrong


def over_given(commits: list[Commit], namespace: str) -> list[str]:
    """List the commits that gave more permits than there are, or out of the queue's order."""
    semaphores = Semaphores(f"{namespace}/semaphore/".encode())
    return [
        f"{invariant} at {commit.revision}: {what}"
        for commit in commits
        for _, before, after in semaphores.apply(commit)
        for invariant, what in misgiven(before, after)
    ]


def never_whole(commits: list[Commit], logs: dict[str, list[dict]], namespace: str) -> list[str]:
    """List those that were told that they have several locks, and never had all of them at one revision."""
    owned = {
        (line, turn.token): turn for line, history in turns_of(commits, namespace).items() for turn in history
    }
    wrong = []
    for name, steps in logs.items():
        for step in steps:
            if step["event"] == "granted" and len(step["lines"]) > 1:
                mine = [owned.get((line.encode(), step["token"])) for line in step["lines"]]
                if None in mine or max(one.begin for one in mine) >= min(one.end or NEVER for one in mine):
                    wrong.append(f"whole: operation {step['op']} of {name}: {mine}")
    return wrong


def interleaved(commits: list[Commit]) -> list[str]:
    """List the writes that came after another holder's, under an older token."""
    wrong, last = [], defaultdict(int)
    for commit in commits:
        for event in commit.events:
            if b"/register/" in event.key and not event.is_delete:
                said = json.loads(event.kv.value)
                token, kind = said["token"], said["line"].split("/")[1]
                # Where several own a line, the check of fences must do.
                if RULES[kind] is first_in_line and token < last[event.key]:
                    wrong.append(f"{event.key!r}: token {token} wrote after {last[event.key]}")
                last[event.key] = token
    return wrong


def misreported(name: str, steps: list[dict], ledger: Ledger) -> list[str]:
    """List the writes of which a process believes what is not so."""
    wrong = []
    keys = defaultdict(list)
    for key, created in ledger.created.items():
        keys[created].append(key)
    for step in steps:
        if step["event"] not in {"written", "refused", "failed"}:
            continue
        write = (name, step["op"], step["which"])
        applied_at = ledger.writes.get(write)
        if step["event"] == "written":
            if applied_at != step["revision"]:
                wrong.append(f"{write} was answered at {step['revision']}, the history has it at {applied_at}")
            continue
        if applied_at is not None:
            wrong.append(f"{write} was reported as {step['event']}, and applied at {applied_at}")
        gone_at = min((ledger.deleted.get(key, NEVER) for key in keys[step["token"]]), default=NEVER)
        if step["event"] == "refused" and gone_at > step["revision"]:
            wrong.append(f"{write} was refused at {step['revision']}; its key went at {gone_at}")
    return wrong


def keys_left_behind(name: str, steps: list[dict], ledger: Ledger, quiet) -> list[str]:
    """
    List the places of a process that outlived their operation, though nothing kept it from leaving.

    Where something was broken, the janitor or the lease's end removes them: `late_leavers` counts those.
    """
    return [
        f"L6: {key!r} of {name} was left behind by an operation that said {outcome!r}"
        for key, outcome, begin, end in _outliving(name, steps, ledger)
        if quiet(begin, end)
    ]


def late_leavers(logs: dict[str, list[dict]], ledger: Ledger) -> list[bytes]:
    """List the places that were still there when their process had gone on to its next operation."""
    return [found[0] for name, steps in logs.items() for found in _outliving(name, steps, ledger)]


def _outliving(name, steps, ledger):
    calls = [step for step in steps if step["event"] in {"call", "done"}]
    outcomes = {step["op"]: step["outcome"] for step in steps if step["event"] == "return"}
    mine = sorted((ledger.created[key], key) for key, node in ledger.node.items() if node == name)
    for this, following in pairwise(calls):
        for created, key in mine:
            gone_at = ledger.deleted.get(key, NEVER)
            if this["revision"] < created <= following["revision"] < gone_at:
                yield key, outcomes.get(this["op"], "nothing"), this["at"], following["at"]


def hand_overs(commits: list[Commit], namespace: str) -> list[tuple[bytes, int, int]]:
    """List each change of owner: the line, the new token, and the revision."""
    found = []
    for line, history in turns_of(commits, namespace).items():
        found += [(line, turn.token, turn.begin) for turn in history[1:]]
    return found


def under_fault(handed, times, diary) -> Counter:
    """Count the hand-overs that happened while something was broken, by what it was."""
    found: Counter = Counter()
    for _, _, revision in handed:
        kinds = {entry["kind"] for entry in diary if entry["begin"] <= times[revision] <= entry["end"] + 0.2}
        found.update(kinds - {"compaction"})
        found["any"] += bool(kinds - {"compaction"})
    return found


def waits(commits, logs, times, namespace, quiet) -> list[float]:
    """Measure, in quiet times, how long after its turn had come each waiting process was told so."""
    begun = defaultdict(int)
    for history in turns_of(commits, namespace).values():
        for turn in history:
            begun[turn.token] = max(begun[turn.token], turn.begin)
    told = [
        (times[begun[step["token"]]], step["at"])
        for steps in logs.values()
        for step in steps
        if step["event"] == "granted" and begun.get(step["token"], step["token"]) > step["token"]
    ]
    return sorted(at - turn_at for turn_at, at in told if quiet(turn_at, at))
