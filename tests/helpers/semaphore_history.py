"""Semaphores while a history is replayed: who waits, who has a permit, and what a commit may not do to them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class Standing:
    """A key of a semaphore: its create revision, its name, who put it and when, if that is known."""

    created: int
    key: bytes
    origin: str = ""
    at: float = 0.0


@dataclass
class Semaphore:
    """One semaphore at one revision; `permits` is what is stored, 0 if nothing is."""

    queue: dict[bytes, Standing] = field(default_factory=dict)
    holders: dict[bytes, Standing] = field(default_factory=dict)
    permits: int = 0

    def copy(self):
        """Return what it is now."""
        return Semaphore({**self.queue}, {**self.holders}, self.permits)

    def apply(self, event, origin="", at=0.0):
        """Take in one event."""
        part = event.key.split(b"/")[3]
        if part == b"permits":
            self.permits = 0 if event.is_delete else int(event.kv.value)
            return
        places = self.queue if part == b"queue" else self.holders
        if event.is_delete:
            places.pop(event.key, None)
        else:
            places[event.key] = Standing(event.kv.create_revision, event.key, origin, at)

    @property
    def head(self):
        """Return who is first in the queue."""
        return min(self.queue.values(), default=None)

    @property
    def awaited(self):
        """Return who should take a permit that is left; None: nobody waits, or none is."""
        return self.head if len(self.holders) < self.permits else None


class Semaphores:
    """All semaphores below a prefix."""

    def __init__(self, prefix):
        self._prefix = prefix
        self._by_name = defaultdict(Semaphore)

    def apply(self, commit, origin="", at=0.0):
        """Take in a commit; list each semaphore that it concerns: its name, before and after it."""
        mine = defaultdict(list)
        for event in commit.events:
            if event.key.startswith(self._prefix):
                mine[event.key.split(b"/")[2]].append(event)
        found = []
        for name, events in mine.items():
            semaphore = self._by_name[name]
            before = semaphore.copy()
            for event in events:
                semaphore.apply(event, origin, at)
            found.append((name, before, semaphore))
        return found


def misgiven(before, after, *, counts=lambda _: True):
    """
    List what a commit did that it may not do: which invariant, and what.

    `counts` says whether a holder counts: what strangers put in vain takes permits away, and gives none.
    """
    wrong = []
    if before.permits not in {0, after.permits} and before.holders:
        wrong.append(("permits", f"{before} is in use, and has {after.permits} permits now"))
    came = after.holders.keys() - before.holders.keys()
    if not came:
        return wrong
    if sum(map(counts, after.holders.values())) > after.permits or len(came) > 1:
        wrong.append(("permits", f"there are too many holders: {after}"))
    left = before.queue.keys() - after.queue.keys()
    if before.head is not None and left != {before.head.key}:
        wrong.append(("queue", f"{left} left the queue for {came}, and the first was {before.head}"))
    return wrong
