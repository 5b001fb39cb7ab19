"""Cancel an operation at each of its steps, one run per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class CancelAtStep(trio.abc.Instrument):
    """Cancels `scope` when its task is about to take its `step`-th step; `reached` tells whether it did."""

    def __init__(self, step: int) -> None:
        self.scope = trio.CancelScope()
        self.reached = False
        self._left = step
        self._task = trio.lowlevel.current_task()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count the steps of the one task."""
        if task is self._task and not self.reached:
            self._left -= 1
            if self._left == 0:
                self.reached = True
                self.scope.cancel()


async def cancelled_at(step: int, operation: Callable[[], Awaitable[object]]) -> bool:
    """Run `operation`, cancelled at `step`; return whether it had that many steps."""
    instrument = CancelAtStep(step)
    trio.lowlevel.add_instrument(instrument)
    try:
        with instrument.scope:
            await operation()
    finally:
        trio.lowlevel.remove_instrument(instrument)
    return instrument.reached
