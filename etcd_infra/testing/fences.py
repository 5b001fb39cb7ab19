"""
Oracles of locks, on the true history of a store: who was first in line at each revision, and who wrote.

They need nothing of a lock's implementation but its layout: a *line* is a prefix that ends in a slash, and the
owner of a line is its key with the smallest create revision; that create revision is the owner's token. Where a
line may have several owners at a time, a `Rule` says who they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from etcd_infra._etcd.keys import WRITER
from etcd_infra.testing.violation import Violation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from etcd_infra._backends.memory_history import Commit
    from etcd_infra._etcd.model import Event

Rule = Callable[[Mapping[bytes, int]], Collection[int]]


def first_in_line(places: Mapping[bytes, int]) -> Collection[int]:
    """Who is first owns a lock, or leads: of keys with their create revisions, the smallest of these."""
    return (min(places.values()),) if places else ()


def everybody(places: Mapping[bytes, int]) -> Collection[int]:
    """Whoever is among a semaphore's holders has a permit."""
    return places.values()


def readers_or_writer(places: Mapping[bytes, int]) -> Collection[int]:
    """Readers own a read-write lock up to the first writer; a writer does if nobody is ahead of it."""
    writers = [token for key, token in places.items() if key[key.rfind(b"/") + 1 :].startswith(WRITER)]
    first_writer = min(writers, default=0)
    if not first_writer or min(places.values()) == first_writer:
        return (first_writer,) if first_writer else places.values()
    return tuple(token for token in places.values() if token < first_writer)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a fenced write says of itself: which line it is guarded by, and under which token it was sent."""

    line: bytes
    token: int


@dataclass(frozen=True, slots=True)
class Grant:
    """
    One acquisition, as its caller saw it.

    Attributes:
        line: The prefix of the line.
        token: The create revision that the caller was told.
        called_revision: The store's revision when the caller asked.
        granted_revision: The store's revision when the caller was told.
        who: For people.
    """

    line: bytes
    token: int
    called_revision: int
    granted_revision: int
    who: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """Who owned a line, from one revision up to, not including, another (0: still)."""

    token: int
    begin: int
    end: int = 0


class Lines:
    """The lines of all locks while a history is replayed."""

    def __init__(self, locks: bytes, rule: Rule = first_in_line) -> None:
        self._locks = locks
        self._rule = rule
        self._members: dict[bytes, dict[bytes, int]] = {}

    def owners(self, line: bytes) -> Collection[int]:
        """Return the tokens of those that own a line."""
        return self._rule(self._members.get(line, {}))

    def places(self, line: bytes) -> Mapping[bytes, int]:
        """Return the keys in a line, with their create revisions."""
        return self._members.get(line, {})

    def apply(self, event: Event) -> bytes | None:
        """Take in one event; return the line that it concerns."""
        key = event.key
        if not key.startswith(self._locks):
            return None
        line = key[: key.rfind(b"/") + 1]
        members = self._members.setdefault(line, {})
        if event.is_delete:
            members.pop(key, None)
        else:
            members[key] = event.kv.create_revision
        return line


def check_fences(
    commits: Iterable[Commit],
    locks: bytes,
    claim_of: Callable[[Event], Claim | None],
    *,
    rule: Rule = first_in_line,
) -> list[Violation]:
    """
    Check that every fenced write was sent by who owned the lock at that revision (L1).

    Args:
        commits: The whole history, from the first revision on.
        locks: The prefix of all lines.
        claim_of: Says under which token an event's write was sent; None: it is no fenced write.
        rule: Says who owns a line.
    """
    found: list[Violation] = []
    lines = Lines(locks, rule)
    for commit in commits:
        # etcd: a Txn's compares see the state before it.
        claims = dict.fromkeys(
            claim for event in commit.events if not event.is_delete and (claim := claim_of(event)) is not None
        )
        for claim in claims:
            if claim.token not in (owners := lines.owners(claim.line)):
                what = f"a write under token {claim.token} of {claim.line!r} was applied; it is {[*owners]}'s"
                found.append(Violation("L1", what, commit.revision))
        for event in commit.events:
            lines.apply(event)
    return found


def turns(commits: Iterable[Commit], locks: bytes, *, rule: Rule = first_in_line) -> dict[bytes, list[Turn]]:
    """Say who owned each line, when; in the order in which their turns began."""
    found: dict[bytes, list[Turn]] = {}
    under_way: dict[bytes, dict[int, int]] = {}
    lines = Lines(locks, rule)
    for commit in commits:
        concerned = {line: None for event in commit.events if (line := lines.apply(event)) is not None}
        for line in concerned:
            history, open_turns = found.setdefault(line, []), under_way.setdefault(line, {})
            owners = set(lines.owners(line))
            for token in open_turns.keys() - owners:
                place = open_turns.pop(token)
                history[place] = Turn(token, history[place].begin, commit.revision)
            for token in sorted(owners - open_turns.keys()):
                open_turns[token] = len(history)
                history.append(Turn(token, commit.revision))
    return found


def check_grants(
    commits: Iterable[Commit], locks: bytes, grants: Sequence[Grant], *, rule: Rule = first_in_line
) -> list[Violation]:
    """
    Check what callers were told about owning locks (L2, L3, L5).

    Each grant's key must have owned its line at some revision between call and return; so, where one owns it
    at a time, grants come in the order of the create revisions. No token is granted twice; and of two grants
    the one that was asked for after the other had been told has the larger token.

    Args:
        commits: The whole history, from the first revision on.
        locks: The prefix of all lines.
        grants: In any order.
        rule: Says who owns a line.
    """
    found: list[Violation] = []
    history = turns(commits, locks, rule=rule)
    for grant in grants:
        owned = any(
            turn.token == grant.token
            and turn.begin <= grant.granted_revision
            and (not turn.end or turn.end > grant.called_revision)
            for turn in history.get(grant.line, ())
        )
        if not owned:
            found.append(
                Violation("L3", f"{grant} never owned the line while it was asked for", grant.granted_revision)
            )
    return found + _token_order(grants)


def _token_order(grants: Sequence[Grant]) -> list[Violation]:
    found: list[Violation] = []
    by_line: dict[bytes, list[Grant]] = {}
    for grant in grants:
        by_line.setdefault(grant.line, []).append(grant)
    for of_line in by_line.values():
        by_token: dict[int, Grant] = {}
        for grant in of_line:
            if (other := by_token.setdefault(grant.token, grant)) is not grant:
                found.append(Violation("L2", f"one token for two: {other}, {grant}", grant.granted_revision))  # noqa: PERF401
        found += _out_of_order(of_line)
    return found


def _out_of_order(grants: Sequence[Grant]) -> list[Violation]:
    found: list[Violation] = []
    told = sorted(grants, key=lambda grant: grant.granted_revision)
    highest: Grant | None = None
    position = 0
    for asked in sorted(grants, key=lambda grant: grant.called_revision):
        while position < len(told) and told[position].granted_revision < asked.called_revision:
            if highest is None or told[position].token > highest.token:
                highest = told[position]
            position += 1
        if highest is not None and asked.token <= highest.token:
            what = f"{asked} was asked for after {highest} was told, and its token is not larger"
            found.append(Violation("L2", what, asked.granted_revision))
    return found
