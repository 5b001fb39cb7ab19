"""The simulated etcd: a store, the true time of each of its commits, and who caused it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from etcd_infra._backends.memory_bugs import BuggyStore, Misbehaviour, ServerBug

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from etcd_infra._backends.memory_history import Commit
    from etcd_infra._backends.memory_store import Backup
    from etcd_infra.testing.simulation.timeline import Event, Timeline

EXPIRY: Final = "expiry"
OPERATOR: Final = "operator"


@dataclass(frozen=True, slots=True)
class TimedCommit:
    """
    One commit of the simulated etcd.

    Attributes:
        at: True seconds.
        origin: The process whose request it was (``a#2``: the second life of node a), "expiry" or "operator".
        request: What it asked for; None for an expiry.
        commit: The revision and its events.
    """

    at: float
    origin: str
    request: object
    commit: Commit


class SimulatedServer:
    """
    One store, and the truth about it.

    Attributes:
        lineages: The commits of each lineage; a restore or a wipe begins a new one, with what it went back to.
        began_at: The true time at which each lineage began.
    """

    def __init__(self, timeline: Timeline, random: Random, *, min_ttl: int = 1) -> None:
        self.misbehaviour = Misbehaviour((), random)
        self.store = BuggyStore(self.misbehaviour, min_ttl=min_ttl, keep_history=True)
        self.lineages: list[list[TimedCommit]] = [[]]
        self.began_at = [0.0]
        self.halted = 0
        self.full = 0
        self.restarts: list[Callable[[], None]] = []
        self._timeline = timeline
        self._waiting: list[Callable[[], None]] = []
        self._expiry: Event | None = None
        self._expiry_at = 0.0

    @property
    def now(self) -> float:
        """True seconds."""
        return self._timeline.clock.now

    @property
    def commits(self) -> list[TimedCommit]:
        """The commits of the present lineage."""
        return self.lineages[-1]

    @property
    def lineage(self) -> int:
        """The number of the present lineage."""
        return len(self.lineages) - 1

    def when_in_order(self, action: Callable[[], None]) -> None:
        """Do something at once, or, without quorum, when it is back."""
        if self.halted:
            self._waiting.append(action)
        else:
            action()

    def perform(self, origin: str, request: object, action: Callable[[], None]) -> None:
        """Apply one request: leases that are due end first, and each commit is noted with its cause."""
        store = self.store
        before = store.revision
        store.advance(self.now)
        if store.revision != before:
            self._note(before, EXPIRY, None)
            before = store.revision
        action()
        if store.revision > before:
            self._note(before, origin, request)
        self._plan_expiry()

    def _note(self, before: int, origin: str, request: object) -> None:
        now = self.now
        commits = self.store.history.between(before + 1, self.store.revision)
        self.lineages[-1].extend(TimedCommit(now, origin, request, commit) for commit in commits)

    def _plan_expiry(self) -> None:
        due = self.store.next_deadline
        if due is None or (self._expiry is not None and self._expiry_at <= due):
            return
        if self._expiry is not None:
            self._expiry.call_off()
        self._expiry_at = due
        self._expiry = self._timeline.at(due, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        self.when_in_order(self.let_expire)

    # ── what happens to it as a whole ───────────────────────────────────────────────────────────

    def halt(self) -> None:
        """Lose the quorum."""
        self.halted += 1

    def go_on(self) -> None:
        """Have a quorum again: a new leader refreshes all leases, and applies what has arrived meanwhile."""
        self.halted -= 1
        if not self.halted:
            self.store.refresh_leases(self.now)
            waiting, self._waiting = self._waiting, []
            for action in waiting:
                action()
            self._plan_expiry()

    def set_full(self, *, more: int) -> None:
        """Begin (1) or end (-1) a time in which the quota is used up."""
        self.full += more
        self.store.full = self.full > 0

    def change_leader(self) -> None:
        """Give all leases their full time, and break all watches."""
        self.store.refresh_leases(self.now)
        self._restart()

    def misbehave(self, bug: ServerBug, *, begins: bool) -> None:
        """Switch a bug on or off."""
        bugs = self.misbehaviour.bugs
        self.misbehaviour.bugs = bugs | {bug} if begins else bugs - {bug}

    def let_expire(self) -> None:
        """End the leases that are due, before anybody looks at the store."""
        self.perform(EXPIRY, None, _do_nothing)

    def back_up(self) -> Backup:
        """Save everything."""
        self.let_expire()
        return self.store.back_up(self.now)

    def restore(self, backup: Backup | None) -> None:
        """Go back to a backup (None: to nothing)."""
        self.store.restore(backup, self.now)
        known = {id(timed.commit): timed for lineage in self.lineages for timed in lineage}
        self.lineages.append([known[id(commit)] for commit in self.store.history.commits])
        self.began_at.append(self.now)
        self._plan_expiry()
        self._restart()

    def _restart(self) -> None:
        for restart in tuple(self.restarts):
            restart()


def _do_nothing() -> None:
    pass
