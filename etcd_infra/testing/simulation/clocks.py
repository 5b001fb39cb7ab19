"""
Time in a simulation: one true time, and for each node the clocks that its program reads.

A program's `trio.current_time()`, its deadlines and its sleeps are on its node's monotonic clock, which may
run fast or slow and stands still while the machine is suspended; its boot-time clock goes on. All else (the
network, the server, checkers) lives in true time.
"""

from __future__ import annotations

from contextvars import ContextVar
from math import inf, nextafter
from typing import TYPE_CHECKING, Final, Protocol

import trio

from etcd_infra.testing.simulation.trio_internals import somebody_waits_for_idle, something_runs

if TYPE_CHECKING:
    from contextvars import Token

PATIENCE: Final = 10


class NodeClock:
    """
    The clocks of one machine.

    Args:
        origin: Seconds that the clocks show at true time 0: two machines' clocks have nothing in common.
        rate: Seconds that they go on per true second.
    """

    __slots__ = ("_rate", "_shown", "_since", "_suspended", "_suspended_since")

    def __init__(self, *, origin: float = 0.0, rate: float = 1.0) -> None:
        self._shown = origin
        self._since = 0.0
        self._rate = rate
        self._suspended = 0.0
        self._suspended_since: float | None = None

    def monotonic(self, true: float) -> float:
        """Say what the monotonic clock shows at a true time."""
        return (
            self._shown
            if self._suspended_since is not None
            else self._shown + (true - self._since) * self._rate
        )

    def boot(self, true: float) -> float:
        """Say what the boot-time clock shows: suspended time counts."""
        asleep = 0.0 if self._suspended_since is None else (true - self._suspended_since) * self._rate
        return self.monotonic(true) + self._suspended + asleep

    def to_true(self, shown: float) -> float:
        """Say at which true time the monotonic clock shows `shown`; never while suspended."""
        if self._suspended_since is not None:
            return inf
        if shown == inf:
            return inf
        true = self._since + (shown - self._shown) / self._rate
        # Invariant: at the true time of a deadline the clock shows the deadline or more, whatever the rounding;
        # else whoever sleeps until then would wake up too early for ever.
        while self.monotonic(true) < shown:
            true = nextafter(true, inf)
        return true

    def set_rate(self, rate: float, true: float) -> None:
        """Let the clocks run faster or slower from now on."""
        self._shown, self._since = self.monotonic(true), true
        self._rate = rate

    def suspend(self, true: float) -> None:
        """Let the monotonic clock stand still."""
        if self._suspended_since is None:
            self._shown, self._since = self.monotonic(true), true
            self._suspended_since = true

    def resume(self, true: float) -> None:
        """Let the monotonic clock go on; the boot-time clock shows what was missed."""
        if self._suspended_since is not None:
            self._suspended += (true - self._suspended_since) * self._rate
            self._suspended_since = None
            self._since = true


class Clocked(Protocol):
    """Whatever has clocks of its own."""

    @property
    def clock(self) -> NodeClock:
        """Its clocks."""
        ...


_running: ContextVar[Clocked | None] = ContextVar("simulated_process", default=None)


def running_process() -> Clocked | None:
    """Return whose program runs at this moment; None: the simulation itself."""
    return _running.get()


def run_as(process: Clocked | None) -> Token[Clocked | None]:
    """From now on this task, and every task it starts, is of that process's program."""
    return _running.set(process)


def process_of(task: trio.lowlevel.Task) -> Clocked | None:
    """Return whose program a task belongs to."""
    return task.context.get(_running)


class Happenings(Protocol):
    """What happens by time alone."""

    def next_deadline(self) -> float:
        """Say when something happens next."""
        ...

    def expire(self, now: float) -> bool:
        """Let happen what is due."""
        ...


class SimulationClock(trio.abc.Clock):
    """
    True time for the simulation, node time for its programs; it jumps as soon as nobody has anything to do.

    Trio's `MockClock` with an autojump threshold of 0 does the same with a single clock for all.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.happenings: Happenings | None = None
        self._standstills = 0

    def start_clock(self) -> None:
        """See `trio.abc.Clock`."""

    def current_time(self) -> float:
        """See `trio.abc.Clock`."""
        process = _running.get()
        return self.now if process is None else process.clock.monotonic(self.now)

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Jump to the next deadline; Trio asks for it when there is nothing else to do."""
        if somebody_waits_for_idle():
            return inf
        if deadline == inf:
            # Trio's own clean-up at the end waits for a byte in a pipe; anything else would wait for ever.
            self._standstills += 1
            if self._standstills > PATIENCE:
                raise RuntimeError("the simulation stands still: every task waits, and no deadline is left")
            return 1.0
        self.now = max(self.now, deadline)
        # Most messages wake nobody; going through Trio's whole loop for each of them would cost a third of
        # all time.
        while self.happenings is not None and not something_runs():
            self.happenings.expire(self.now)
            deadline = self.happenings.next_deadline()
            if something_runs() or deadline == inf:
                break
            self.now = deadline
        return 0.0
