"""Strict serialisability where revisions are known: the order in real time against the order of revisions."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from etcd_infra.testing.violation import Violation

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Timed:
    """
    One operation whose place in the store's history is known.

    Attributes:
        call, reply: When it was sent and answered, on one clock; a reply that never came: infinity.
        revision: For a write the revision that it made; for a read the one that it saw.
        writes: Which of both it is.
        name: For people.
    """

    call: float
    reply: float
    revision: int
    writes: bool = True
    name: str = ""


def check_real_time_order(operations: Sequence[Timed]) -> list[Violation]:
    """
    Check that what was called after a reply has a later revision.

    A write has a larger revision than everything that was answered before it was called; a read at least
    the same. No two writes share a revision. With revisions known nothing has to be searched: it takes n
    log n.
    """
    found: list[Violation] = []
    replied = sorted((each for each in operations if each.reply < inf), key=lambda each: each.reply)
    position, latest = 0, None
    for each in sorted(operations, key=lambda each: each.call):
        while position < len(replied) and replied[position].reply < each.call:
            if latest is None or replied[position].revision > latest.revision:
                latest = replied[position]
            position += 1
        if latest is not None and each.revision < latest.revision + each.writes:
            found.append(Violation("real-time order", f"{each} after {latest} was answered", each.call))
    return found + _shared(operations)


def _shared(operations: Sequence[Timed]) -> list[Violation]:
    by_revision: dict[int, Timed] = {}
    return [
        Violation("real-time order", f"one revision for two writes: {other}, {each}", each.call)
        for each in operations
        if each.writes and (other := by_revision.setdefault(each.revision, each)) is not each
    ]
