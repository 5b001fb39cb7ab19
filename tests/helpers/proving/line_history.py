"""What must be true of what the processes logged, and of the history that the members showed."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from etcd_infra.testing.fences import Claim, Grant, check_fences, check_grants, turns

if TYPE_CHECKING:
    from etcd_infra._backends.memory_history import Commit

NEVER = 2**62


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
        if name in self.writes:
            self.doubled.append(name)
        self.writes[name] = event.revision


def is_place(key: bytes) -> bool:
    """Whether a key is a place in a line."""
    return b"/lock/" in key or b"/election/" in key


def claim_of(lines: str):
    """Say how a register's value tells under which token it was written."""

    def claim(event):
        if b"/register/" not in event.key:
            return None
        said = json.loads(event.kv.value)
        return Claim(f"{lines}{said['lock']}/".encode(), said["token"])

    return claim


def grants_in(logs: dict[str, list[dict]], lines: str) -> list[Grant]:
    """Gather every acquisition of every process, with the revisions that enclose it."""
    found = []
    for name, steps in logs.items():
        called = 0
        for number, step in enumerate(steps):
            if step["event"] == "call":
                called = step["revision"]
            elif step["event"] == "granted":
                # A write's answer came after the grant: so the grant was told before that revision.
                told = next((later["revision"] for later in steps[number:] if "revision" in later), NEVER)
                line = f"{lines}{step['lock']}/".encode()
                found.append(Grant(line, step["token"], called, told, f"{name}, operation {step['op']}"))
    return found


def check(commits: list[Commit], logs: dict[str, list[dict]], lines: str, quiet) -> list[str]:
    """
    Hold the processes' logs against the history; return everything that is wrong.

    `lines` is the prefix of all lines; `quiet(begin, end)` says whether nothing was broken from one moment to another.
    """
    wrong = [str(one) for one in check_fences(commits, lines.encode(), claim_of(lines))]
    wrong += [str(one) for one in check_grants(commits, lines.encode(), grants_in(logs, lines))]
    ledger = Ledger(commits)
    wrong += [f"L8: the place {key!r} came back" for key in ledger.came_back]
    wrong += [f"a write was applied twice: {name}" for name in ledger.doubled]
    wrong += interleaved(commits)
    for name, steps in logs.items():
        wrong += misreported(name, steps, ledger)
        wrong += keys_left_behind(name, steps, ledger, quiet)
    return wrong


def interleaved(commits: list[Commit]) -> list[str]:
    """List the writes that came after another holder's, under an older token."""
    wrong, last = [], defaultdict(int)
    for commit in commits:
        for event in commit.events:
            if b"/register/" in event.key and not event.is_delete:
                token = json.loads(event.kv.value)["token"]
                if token < last[event.key]:
                    wrong.append(f"{event.key!r}: token {token} wrote after {last[event.key]}")
                last[event.key] = token
    return wrong


def misreported(name: str, steps: list[dict], ledger: Ledger) -> list[str]:
    """List the writes of which a process believes what is not so."""
    wrong = []
    tokens = {created: key for key, created in ledger.created.items()}
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
        gone_at = ledger.deleted.get(tokens.get(step["token"], b""), NEVER)
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


def hand_overs(commits: list[Commit], lines: str) -> list[tuple[bytes, int, int]]:
    """List each change of owner: the line, the new token, and the revision."""
    found = []
    for line, history in turns(commits, lines.encode()).items():
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


def waits(commits, logs, times, lines, quiet) -> list[float]:
    """Measure, in quiet times, how long after its turn had come each waiting process was told so."""
    begun = {turn.token: turn.begin for line in turns(commits, lines.encode()).values() for turn in line}
    told = [
        (times[begun[step["token"]]], step["at"])
        for steps in logs.values()
        for step in steps
        if step["event"] == "granted" and begun.get(step["token"], step["token"]) > step["token"]
    ]
    return sorted(at - turn_at for turn_at, at in told if quiet(turn_at, at))
