"""
What can go wrong, as a plan: a list of faults, each with its moment, its victim and its size.

A plan is drawn from a seed before anything runs, so it can be printed, stored, shortened and run again.
Each seed draws a random subset of all kinds first ("swarm testing"): a run with two kinds of faults reaches
states that a run with all of them never does.

Source: A. Groce et al., "Swarm testing", ISSTA 2012.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from random import Random


class FaultKind(StrEnum):
    """What a fault does. Durations are true seconds, at most those of `SIZES`."""

    KILL = "kill"
    """The process is gone, its requests are still in the network; a new one starts `seconds` later."""
    PAUSE = "pause"
    """The process does not run for `seconds`; its clocks go on."""
    BLOCK = "block"
    """The process's event loop hangs for a moment."""
    SUSPEND = "suspend"
    """The machine sleeps for `seconds`: its monotonic clock stands still, its boot-time clock does not."""
    CLOCK_RATE = "clock rate"
    """The machine's clocks run up to 8 % fast or slow."""
    PARTITION = "partition"
    """Nothing gets through, in either direction; requests that were held up arrive afterwards."""
    CUT_REQUESTS = "cut requests"
    """No request reaches etcd."""
    CUT_ANSWERS = "cut answers"
    """Requests reach etcd, but no answer and no event comes back."""
    RESET = "reset"
    """Every connection breaks: calls in flight have no answer, watches are made anew."""
    SLOW = "slow"
    """Messages take up to a second each."""
    LOST_REQUEST = "lost request"
    """The next write is lost on its way."""
    LOST_ANSWER = "lost answer"
    """The next write is applied; its answer is lost."""
    LATE = "late"
    """The next write gets no answer, and is applied `seconds` later."""
    DUPLICATE = "duplicate"
    """The next write is delivered twice, the second time `seconds` later."""
    DELAYED_ANSWER = "delayed answer"
    """The next call's answer, a renewal's for instance, takes `seconds`."""
    LEADER_CHANGE = "leader change"
    """Every lease gets its full time again, every watch breaks."""
    NO_QUORUM = "no quorum"
    """etcd applies nothing for `seconds`, and then all that has arrived meanwhile."""
    COMPACTION = "compaction"
    """History up to now is forgotten."""
    REVOKE = "revoke"
    """An operator revokes some lease."""
    FOREIGN_DELETE = "foreign delete"
    """Somebody deletes one of the keys under `prefix`."""
    FOREIGN_RECREATE = "foreign re-create"
    """
    Somebody deletes one of the keys under `prefix`, and puts the same value under the same lease there
    again.
    """
    RESTORE = "restore"
    """The store goes back to what it was at an earlier moment."""
    WIPE = "wipe"
    """The store is empty."""
    FULL = "full"
    """The quota is used up (NOSPACE) for `seconds`."""
    DENY = "deny"
    """A process's user may do nothing for `seconds`."""
    CANCEL = "cancel"
    """One of the scopes that a process opened by `interruptible` is cancelled."""
    DUPLICATE_EVENTS = "duplicate events"
    """Server bug: see `ServerBug`. So are all that follow, each for `seconds`."""
    PAST_EVENTS = "past events"
    EARLY_PROGRESS = "early progress"
    LOST_DELETE = "lost delete"
    CREATED_CANCELED = "created and canceled"
    SPURIOUS_REVOKE = "spurious revoke"
    RENEWED_THOUGH_REVOKED = "renewed though revoked"
    STALE_READ = "stale read"


@dataclass(frozen=True, slots=True)
class Fault:
    """
    One fault.

    Attributes:
        kind: What happens.
        at: True seconds after the beginning; a fault on a message strikes the first one sent afterwards.
        node: To whom; empty: to etcd, and so to all.
        seconds: How long, or how late.
        number: A draw in [0, 10**6), where something has to be chosen: a key, a lease, a rate.
    """

    kind: FaultKind
    at: float
    node: str = ""
    seconds: float = 0.0
    number: int = 0


@dataclass(frozen=True, slots=True)
class Size:
    """
    How often a kind strikes in a run that has it, and how hard.

    Attributes:
        most: Times, in 20 s.
        shortest, longest: Seconds.
        of_etcd: It concerns etcd as a whole rather than one node.
        weight: How likely it is that a run has this kind.
    """

    most: int
    shortest: float = 0.0
    longest: float = 0.0
    of_etcd: bool = False
    weight: float = 0.25


SIZES: Final[Mapping[FaultKind, Size]] = {
    FaultKind.KILL: Size(2, 0.5, 10),
    FaultKind.PAUSE: Size(3, 1, 15),
    FaultKind.BLOCK: Size(4, 0.3, 3),
    FaultKind.SUSPEND: Size(2, 1, 20),
    FaultKind.CLOCK_RATE: Size(2),
    FaultKind.PARTITION: Size(3, 0.5, 12),
    FaultKind.CUT_REQUESTS: Size(2, 0.5, 10),
    FaultKind.CUT_ANSWERS: Size(2, 0.5, 10),
    FaultKind.RESET: Size(4),
    FaultKind.SLOW: Size(2, 1, 8),
    FaultKind.LOST_REQUEST: Size(6),
    FaultKind.LOST_ANSWER: Size(8),
    FaultKind.LATE: Size(8, 0.1, 30),
    FaultKind.DUPLICATE: Size(8, 0.01, 15),
    FaultKind.DELAYED_ANSWER: Size(6, 0.5, 6),
    FaultKind.LEADER_CHANGE: Size(2, of_etcd=True),
    FaultKind.NO_QUORUM: Size(2, 0.5, 8, of_etcd=True, weight=0.2),
    FaultKind.COMPACTION: Size(5, of_etcd=True),
    FaultKind.REVOKE: Size(2, of_etcd=True),
    FaultKind.FOREIGN_DELETE: Size(4, of_etcd=True),
    FaultKind.FOREIGN_RECREATE: Size(4, of_etcd=True),
    FaultKind.RESTORE: Size(1, 1, 10, of_etcd=True, weight=0.08),
    FaultKind.WIPE: Size(1, of_etcd=True, weight=0.05),
    FaultKind.FULL: Size(2, 0.5, 6, of_etcd=True, weight=0.15),
    FaultKind.DENY: Size(2, 0.5, 5, weight=0.15),
    FaultKind.CANCEL: Size(10, weight=0.4),
    FaultKind.DUPLICATE_EVENTS: Size(1, 5, 20, of_etcd=True, weight=0.1),
    FaultKind.PAST_EVENTS: Size(1, 5, 20, of_etcd=True, weight=0.1),
    FaultKind.EARLY_PROGRESS: Size(1, 5, 20, of_etcd=True, weight=0.1),
    FaultKind.LOST_DELETE: Size(1, 5, 20, of_etcd=True, weight=0.1),
    FaultKind.CREATED_CANCELED: Size(1, 5, 20, of_etcd=True, weight=0.1),
    FaultKind.SPURIOUS_REVOKE: Size(1, 5, 20, of_etcd=True, weight=0.1),
    FaultKind.RENEWED_THOUGH_REVOKED: Size(1, 5, 20, of_etcd=True, weight=0.15),
    FaultKind.STALE_READ: Size(1, 5, 20, of_etcd=True, weight=0.15),
}


def draw_plan(
    random: Random,
    nodes: Sequence[str],
    seconds: float,
    *,
    kinds: Sequence[FaultKind] = tuple(FaultKind),
) -> tuple[Fault, ...]:
    """
    Draw a plan: a random subset of `kinds`, and for each of them a few faults.

    Args:
        random: Source of all draws.
        nodes: Who may be struck.
        seconds: How long the faulty time lasts.
        kinds: What may strike.
    """
    faults: list[Fault] = []
    for kind in kinds:
        size = SIZES[kind]
        if random.random() >= size.weight:
            continue
        for _ in range(random.randint(1, max(1, round(size.most * seconds / 20)))):
            faults.append(  # noqa: PERF401
                Fault(
                    kind,
                    at=round(random.uniform(0, seconds), 3),
                    node="" if size.of_etcd else random.choice(nodes),
                    seconds=round(random.uniform(size.shortest, size.longest), 3),
                    number=random.randrange(10**6),
                )
            )
    return tuple(sorted(faults, key=lambda fault: (fault.at, fault.kind, fault.node, fault.number)))
