"""What happens when: the deadlines of all cancel scopes, and the messages on their way, in true time."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import inf
from typing import TYPE_CHECKING

from etcd_infra.testing.simulation.clocks import Clocked, SimulationClock, running_process
from etcd_infra.testing.simulation.trio_internals import registered_deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio


class Event:
    """Something that will happen unless it is called off."""

    __slots__ = ("called_off", "happen")

    def __init__(self, happen: Callable[[], None]) -> None:
        self.happen = happen
        self.called_off = False

    def call_off(self) -> None:
        """Let it not happen."""
        self.called_off = True


class Timeline:
    """
    A heap of events and of scopes' deadlines; it stands in for Trio's own list of deadlines.

    So a message costs no task of its own: Trio's loop delivers it as it would expire a deadline. Ties are
    broken by the order of being added (Trio breaks them by address).
    """

    def __init__(self, clock: SimulationClock) -> None:
        self.clock = clock
        self._added = 0
        self._events: list[tuple[float, int, Event]] = []
        self._scopes: list[tuple[float, int, trio.CancelScope, float, Clocked | None]] = []

    def at(self, when: float, happen: Callable[[], None]) -> Event:
        """Let `happen()` be called at a true time, outside of every task."""
        event = Event(happen)
        self._added += 1
        heappush(self._events, (when, self._added, event))
        return event

    def after(self, seconds: float, happen: Callable[[], None]) -> Event:
        """Let `happen()` be called so many true seconds from now."""
        return self.at(self.clock.now + seconds, happen)

    def reconsider(self, process: Clocked) -> None:
        """Place the deadlines of one process anew: its clock has changed its pace."""
        self._scopes = [
            (process.clock.to_true(deadline), added, scope, deadline, owner)
            if owner is process
            else (when, added, scope, deadline, owner)
            for when, added, scope, deadline, owner in self._scopes
            if registered_deadline(scope) == deadline
        ]
        heapify(self._scopes)

    # ── as Trio's list of deadlines ─────────────────────────────────────────────────────────────

    def add(self, deadline: float, cancel_scope: trio.CancelScope) -> None:
        """Note a deadline, on the clock of whoever runs."""
        process = running_process()
        when = deadline if process is None else process.clock.to_true(deadline)
        self._added += 1
        heappush(self._scopes, (when, self._added, cancel_scope, deadline, process))

    def remove(self, deadline: float, cancel_scope: trio.CancelScope) -> None:
        """Forget a deadline: its entry is seen to be stale when its time comes."""

    def next_deadline(self) -> float:
        """Say when something happens next."""
        events, scopes = self._events, self._scopes
        while events and events[0][2].called_off:
            heappop(events)
        while scopes and registered_deadline(scopes[0][2]) != scopes[0][3]:
            heappop(scopes)
        return min(events[0][0] if events else inf, scopes[0][0] if scopes else inf)

    def expire(self, now: float) -> bool:
        """Let happen what is due."""
        happened = False
        while (when := self.next_deadline()) <= now:
            happened = True
            if self._events and self._events[0][0] == when:
                heappop(self._events)[2].happen()
            else:
                heappop(self._scopes)[2].cancel()
        return happened
