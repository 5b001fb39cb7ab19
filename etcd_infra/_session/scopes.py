"""The one place where background tasks meet a body: its exception leaves bare, never in a group of ours."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@asynccontextmanager
async def open_background() -> AsyncGenerator[trio.Nursery]:
    """
    Open a nursery for tasks that serve the body and end with it.

    The body's exception leaves as it is. If a task fails, the body is cancelled and the task's exception
    leaves instead (bare, too, if it is the only one).
    """
    body_error: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:  # noqa: BLE001 - raised again below, outside the nursery
                body_error = error
            nursery.cancel_scope.cancel()
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
