"""The one place where background tasks meet a body: they serve it to its end, and its exception leaves bare."""

from __future__ import annotations

from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable


class Background:
    """
    Starts tasks that go on until the body that they serve has left.

    A cancellation from outside reaches the body first: while its clean-up runs, leases are still kept alive
    and watches still open; only then are these tasks cancelled. (Otherwise the lease would be gone, and the
    next owner at work, before the last one has stopped.)
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._shields: dict[trio.CancelScope, None] = {}
        self._dismissed = False

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Start a task."""
        self._nursery.start_soon(self._serve, function, *args)

    async def start(self, function: Callable[..., Awaitable[object]]) -> None:
        """Start a task that says when it has `started`; until then it can be cancelled from outside."""
        await self._nursery.start(self._serve_once_started, function)

    def dismiss(self) -> None:
        """End all tasks: the body has left."""
        self._dismissed = True
        for shield in self._shields:
            shield.shield = False
        self._nursery.cancel_scope.cancel()

    async def _serve(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        with trio.CancelScope(shield=not self._dismissed) as shield:
            self._shields[shield] = None
            try:
                await function(*args)
            finally:
                del self._shields[shield]

    async def _serve_once_started(
        self, function: Callable[..., Awaitable[object]], *, task_status: trio.TaskStatus[Any]
    ) -> None:
        with trio.CancelScope() as shield:
            self._shields[shield] = None
            try:
                await function(task_status=_ShieldWhenStarted(self, shield, task_status))
            finally:
                del self._shields[shield]

    @property
    def dismissed(self) -> bool:
        """Whether the body has left."""
        return self._dismissed


class _ShieldWhenStarted:
    def __init__(
        self, background: Background, shield: trio.CancelScope, task_status: trio.TaskStatus[Any]
    ) -> None:
        self._background = background
        self._shield = shield
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        # Race: a task that is cancelled while it starts stays in the hands of who starts it, and must end.
        is_cancelled = trio.current_effective_deadline() == -inf
        self._task_status.started(value)
        self._shield.shield = not (self._background.dismissed or is_cancelled)


@asynccontextmanager
async def open_background() -> AsyncGenerator[Background]:
    """
    Open a place for tasks that serve the body and end after it.

    The body's exception leaves as it is. If a task fails, the body is cancelled and the task's exception
    leaves instead (bare, too, if it is the only one).
    """
    body_error: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            background = Background(nursery)
            try:
                yield background
            except BaseException as error:  # noqa: BLE001 - raised again below, outside the nursery
                body_error = error
            background.dismiss()
    except BaseExceptionGroup as group:
        failures = group.split(trio.Cancelled)[1]
        if failures is not None:
            raise _only(failures) from None
        if body_error is None:
            raise
    if body_error is not None:
        raise body_error


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    if len(group.exceptions) > 1:
        return group
    return _only(first) if isinstance(first, BaseExceptionGroup) else first  # pyright: ignore[reportUnknownArgumentType]
