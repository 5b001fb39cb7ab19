"""Time as a session sees it: two clocks for the lease, one for the people who read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment on Trio's clock and on the boot-time clock, in seconds."""

    monotonic: float
    boot: float


class Clock:
    """
    Trio's clock and the boot-time clock.

    The monotonic clock stands still while the machine is suspended, the lease does not: so elapsed time is
    the larger of the two.

    Args:
        boot: Seconds since some fixed moment, suspended time included. In a test `trio.current_time`; then
            the wall clock is this one, too, so that nothing depends on real time.
    """

    __slots__ = ("_boot", "_wall")

    def __init__(self, boot: Callable[[], float] | None = None) -> None:
        self._boot = boot or _boot_time
        self._wall = boot or time.time

    def now(self) -> Instant:
        """Read both clocks."""
        return Instant(trio.current_time(), self._boot())

    def since(self, then: Instant) -> float:
        """Seconds that have passed for sure since `then`, suspended time included."""
        return max(trio.current_time() - then.monotonic, self._boot() - then.boot)

    def wall(self) -> float:
        """Unix seconds by this machine's clock; for people, never for decisions."""
        return self._wall()


def _boot_time() -> float:
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
