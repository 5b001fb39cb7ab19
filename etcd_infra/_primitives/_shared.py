"""A context that is entered for its first user and left after its last one."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import trio

from etcd_infra.errors import SessionLostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._etcd.background import Background

T = TypeVar("T")

_CLOSED: Final = "the coordinator was closed"


class Shared(Generic[T]):
    """
    What `opening` opens, kept open in the background while somebody uses it.

    Args:
        opening: Opens it; leaving it must be bounded in time.
    """

    def __init__(self, background: Background, opening: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._background = background
        self._opening = opening
        self._open: _Open[T] | None = None

    @asynccontextmanager
    async def use(self) -> AsyncGenerator[T]:
        """
        Use it for the length of a body; entering waits until it is open.

        Raises:
            SessionLostError: the coordinator was closed.
            Exception: what opening it raised, for all that waited.

        Cancellation:
            The last one to leave waits, shielded, until it is closed.
        """
        if self._background.dismissed:
            raise SessionLostError(_CLOSED)
        if self._open is None:
            self._open = _Open(self._opening)
            self._background.start_soon(self._open.run)
        opened = self._open
        opened.users += 1
        try:
            yield await opened.value()
        finally:
            opened.users -= 1
            if not opened.users:
                if self._open is opened:
                    self._open = None
                with trio.CancelScope(shield=True):
                    await opened.close()


class _Open(Generic[T]):
    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self.users = 0
        self._opening = opening
        self._scope = trio.CancelScope()
        self._settled = trio.Event()
        self._closed = trio.Event()
        self._values: list[T] = []
        self._error: Exception | None = None

    async def run(self) -> None:
        try:
            with self._scope:
                async with self._opening() as value:
                    self._values.append(value)
                    self._settled.set()
                    await trio.sleep_forever()
        except Exception as error:  # noqa: BLE001 - the users' to raise
            self._error = error
        finally:
            self._settled.set()
            self._closed.set()

    async def value(self) -> T:
        await self._settled.wait()
        if self._error is not None:
            raise self._error
        if not self._values:
            raise SessionLostError(_CLOSED)
        return self._values[0]

    async def close(self) -> None:
        self._scope.cancel()
        await self._closed.wait()
