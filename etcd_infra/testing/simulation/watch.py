"""A watch of a simulated process: answers come one by one, in order, each after its way through the network."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.backend import WatchStream
from etcd_infra.errors import EtcdError, StoreResetError, UnavailableError
from etcd_infra.testing.simulation.network import CALL_TIMEOUT

if TYPE_CHECKING:
    from etcd_infra._backends.memory_watch import Watcher
    from etcd_infra._backends.watch_cursor import WatchCursor
    from etcd_infra._etcd.model import WatchBatch, WatchRequest, WatchResponse
    from etcd_infra.testing.simulation.network import Network
    from etcd_infra.testing.simulation.process import SimulatedProcess

DEAD_CONNECTION_SECONDS: Final = 15.0
RECONNECT_SECONDS: Final = 0.1


class SimulatedWatch(WatchStream):
    """One watch; when its connection breaks it is made anew at its next revision."""

    def __init__(self, process: SimulatedProcess, network: Network, cursor: WatchCursor) -> None:
        self.created_revision = 0
        self._process = process
        self._network = network
        self._cursor = cursor
        self._stream: Stream | None = None
        self._answers: deque[WatchResponse] = deque()
        self._woken = trio.Event()
        self._failure: Exception | None = None
        self._patience = 0

    async def open(self) -> None:
        """Wait until the watch is created for the first time."""
        while not self._cursor.creations:
            await self.receive()

    async def receive(self) -> WatchBatch:
        """See `WatchStream`."""
        await trio.lowlevel.checkpoint()
        # Invariant: no checkpoint between taking a batch and returning it, so a cancellation loses nothing.
        while (batch := self._next()) is None:
            self._woken = trio.Event()
            await self._woken.wait()
        return batch

    def close(self) -> None:
        """End the watch for good: its block was left."""
        self._disconnect()
        self._failure = self._failure or trio.ClosedResourceError("this watch was left")
        self._woken.set()

    def broken(self, stream: Stream) -> None:
        """Hear that a connection broke."""
        if stream is self._stream:
            self._stream = None
            self._answers.clear()
            self._woken.set()

    def take(self, stream: Stream, response: WatchResponse) -> None:
        """Take in an answer, unless it came through a connection that was given up."""
        if stream is self._stream:
            self._answers.append(response)
            self._woken.set()

    def cut(self) -> None:
        """Break the present connection."""
        if self._stream is not None:
            self._stream.cut()

    def _disconnect(self) -> None:
        stream, self._stream = self._stream, None
        self._answers.clear()
        if stream is not None:
            stream.cut()

    def _next(self) -> WatchBatch | None:
        if self._failure is not None:
            raise self._failure
        if self._stream is None:
            self._stream = Stream(self, self._process, self._network, self._cursor.request())
        while self._answers:
            batch = self._feed(self._answers.popleft())
            if batch is not None:
                return batch
        return None

    def _feed(self, response: WatchResponse) -> WatchBatch | None:
        try:
            batch = self._cursor.feed(response)
        except UnavailableError:
            self._disconnect()
            self._network.timeline.after(RECONNECT_SECONDS, self._woken.set)
            return None
        except EtcdError as error:
            self._disconnect()
            self._failure = error
            raise
        if response.created:
            self.created_revision = response.revision
            assert self._stream is not None
            self._stream.created = True
            if self._cursor.may_be_reset:
                self._disconnect()
                self._failure = StoreResetError(f"the store went back to revision {response.revision}")
                raise self._failure
        return batch


class Stream:
    """One connection of a watch, from its being asked for to its break."""

    def __init__(
        self, client: SimulatedWatch, process: SimulatedProcess, network: Network, request: WatchRequest
    ) -> None:
        self.created = False
        self._client = client
        self._process = process
        self._network = network
        self._watcher: Watcher | None = None
        self._over = False
        self._last_arrival = 0.0
        self._will_pump = False
        timeline = network.timeline
        if process.dead:
            return
        way = RECONNECT_SECONDS / 2 + process.link.latency()
        ask = partial(network.server.when_in_order, partial(self._create, request))
        timeline.after(way, partial(process.link.request, ask))
        timeline.after(CALL_TIMEOUT, self._give_up_creating)
        network.server.restarts.append(self.cut)

    def cut(self) -> None:
        """Break it: the server forgets the watch, and the client makes it anew."""
        if not self._over:
            self._over = True
            if self.cut in self._network.server.restarts:
                self._network.server.restarts.remove(self.cut)
            if self._watcher is not None:
                self._watcher.close()
            self._network.timeline.after(RECONNECT_SECONDS, partial(self._client.broken, self))

    def _give_up_creating(self) -> None:
        if not self.created:
            self.cut()

    def notice_if_dead(self) -> None:
        """Break it if nothing can come through any more: pings are not answered."""
        if self._process.link.requests_cut or self._process.link.answers_cut:
            self.cut()

    def _create(self, request: WatchRequest) -> None:
        if self._over:
            return
        self._network.server.let_expire()
        self._watcher = self._network.server.store.watch(request, self._network.server.now)
        self._watcher.notify = self._pump_soon
        self._pump()

    def _pump_soon(self) -> None:
        # The store is in the midst of a commit: look when it is done.
        if not self._will_pump:
            self._will_pump = True
            self._network.timeline.after(0.0, self._pump)

    def _pump(self) -> None:
        self._will_pump = False
        if self._over or self._watcher is None:
            return
        now = self._network.server.now
        while (response := self._watcher.poll(now)) is not None:
            self._last_arrival = max(self._last_arrival, now + self._process.link.latency())
            deliver = partial(self._client.take, self, response)
            self._network.timeline.at(self._last_arrival, partial(self._process.link.answer, deliver))
            if response.canceled:
                self._watcher.close()
                self._watcher = None
                return
        self._await_progress()

    def _await_progress(self) -> None:
        progress = self._watcher.next_progress if self._watcher is not None else None
        if progress is not None:
            self._network.timeline.at(progress, self._pump)
