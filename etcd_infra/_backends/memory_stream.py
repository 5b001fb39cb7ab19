"""A watch on the in-memory etcd, as a node has it: it waits on Trio's clock, and goes on after a partition."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.backend import WatchStream
from etcd_infra.errors import EtcdError, StoreResetError

if TYPE_CHECKING:
    from etcd_infra._backends.memory import MemoryNode
    from etcd_infra._backends.memory_watch import Watcher
    from etcd_infra._backends.watch_cursor import WatchCursor
    from etcd_infra._etcd.model import WatchBatch, WatchResponse


class MemoryWatch(WatchStream):
    """One watch of one node; it pulls from the store's history, so a slow consumer costs no memory."""

    def __init__(self, node: MemoryNode, cursor: WatchCursor) -> None:
        self.created_revision = 0
        self._node = node
        self._cursor = cursor
        self._watcher: Watcher | None = None
        self._woken = trio.Event()
        self._failure: Exception | None = None

    async def open(self) -> None:
        """Wait until the watch is created for the first time."""
        await trio.lowlevel.checkpoint()
        while self._poll() is None:
            await self._sleep()
        await trio.lowlevel.checkpoint()

    async def receive(self) -> WatchBatch:
        await trio.lowlevel.checkpoint()
        # Invariant: no checkpoint between taking a batch and returning it, so a cancellation loses nothing.
        while (batch := self._poll()) is None:
            await self._sleep()
        return batch

    def cut(self) -> None:
        """Break the watch; the next poll that gets through makes it anew."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    def close(self) -> None:
        """End the watch for good: its block was left."""
        self.cut()
        self._failure = self._failure or trio.ClosedResourceError("this watch was left")
        self.wake()

    def wake(self) -> None:
        """Let a sleeping `receive` look again."""
        self._woken.set()

    def _poll(self) -> WatchBatch | None:
        if self._failure is not None:
            raise self._failure
        if not self._node.hears:
            return None
        self._node.advance()
        if self._watcher is None:
            if not self._node.is_up:
                return None
            self._watcher = self._node.start_watcher(self._cursor.request())
            self._watcher.notify = self.wake
        while (response := self._watcher.poll(trio.current_time())) is not None:
            batch = self._feed(response)
            if batch is not None:
                return batch
        return None

    def _feed(self, response: WatchResponse) -> WatchBatch | None:
        try:
            batch = self._cursor.feed(response)
            if response.created and self._cursor.may_be_reset:
                # There is one member only, so none that lags.
                raise StoreResetError(f"the store went back to revision {response.revision}")
        except EtcdError as error:
            self.cut()
            self._failure = error
            raise
        if response.created:
            self.created_revision = response.revision
        return batch

    async def _sleep(self) -> None:
        if self._woken.is_set():
            self._woken = trio.Event()
        with trio.move_on_at(self._next_reason()):
            await self._woken.wait()

    def _next_reason(self) -> float:
        """Say when something happens by time alone."""
        if not self._node.hears or self._watcher is None:
            return inf
        progress = self._watcher.next_progress
        return min(self._node.next_deadline, inf if progress is None else progress)
