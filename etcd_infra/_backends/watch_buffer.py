"""The consumer's end of a watch: what was read ahead for it, within bounds."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.backend import WatchStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from etcd_infra._backends.watch_cursor import WatchCursor
    from etcd_infra._etcd.model import Event, KeyValue, WatchBatch

MAX_EVENTS: Final = 4096
MAX_BYTES: Final = 16 * 1024 * 1024


class BufferedWatch(WatchStream):
    """
    One watch: its cursor, filled by whoever reads the stream, and its buffer, emptied by the consumer.

    It never waits for room, since a stream is shared: when it `is_full`, it is taken off the stream, and
    `on_drained` asks for its re-creation at the cursor once the consumer has taken everything.

    Attributes:
        cursor: The resume point, after the last batch in the buffer.
        seen_revision: The highest revision that a server has shown to this watch.
        suspended: It was taken off the stream because it was full.
        stream_id: Its id on the present stream, once that is known.
        is_denied: The server denied access, which is not believed yet.
    """

    def __init__(self, cursor: WatchCursor, on_drained: Callable[[BufferedWatch], None]) -> None:
        self.cursor = cursor
        self.created_revision = 0
        self.seen_revision = 0
        self.suspended = False
        self.stream_id: int | None = None
        self.is_denied = False
        self._on_drained = on_drained
        self._batches: deque[WatchBatch] = deque()
        self._events = 0
        self._bytes = 0
        self._error: Exception | None = None
        self._news = trio.Event()

    async def wait_created(self) -> None:
        """
        Wait for the first creation.

        Raises:
            EtcdError: the server refused it.
        """
        await trio.lowlevel.checkpoint()
        while not self.created_revision:
            if self._error is not None:
                raise self._error
            await self._news.wait()

    async def receive(self) -> WatchBatch:
        """Implement `WatchStream.receive`."""
        await trio.lowlevel.checkpoint()
        while not self._batches:
            if self._error is not None:
                raise self._error
            if self.suspended:
                self.suspended = False
                self._on_drained(self)
            await self._news.wait()
        batch = self._batches.popleft()
        self._count(batch, -1)
        if batch.created:
            self.created_revision = batch.revision
        return batch

    @property
    def is_full(self) -> bool:
        """Whether no more should be read ahead for this consumer."""
        return self._events >= MAX_EVENTS or self._bytes >= MAX_BYTES

    def deliver(self, batch: WatchBatch) -> None:
        """Append a batch; the first creation is told by `created_revision` instead."""
        self.seen_revision = max(self.seen_revision, batch.revision)
        if batch.created and self.cursor.creations == 1:
            self.created_revision = batch.revision
        else:
            # A watch that flaps while nobody looks must not fill the memory with "created".
            if batch.created and self._batches and self._batches[-1].created:
                self._count(self._batches.pop(), -1)
            self._batches.append(batch)
            self._count(batch, 1)
        self._notify()

    def fail(self, error: Exception) -> None:
        """End the watch: after what is in the buffer, the consumer gets `error`, and nothing else ever."""
        self.suspended = False
        self._error = error
        self._notify()

    def _count(self, batch: WatchBatch, sign: int) -> None:
        self._events += sign * max(1, len(batch.events))
        self._bytes += sign * sum(map(_size, batch.events))

    def _notify(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()


def _size(event: Event) -> int:
    return _kv_size(event.kv) + (_kv_size(event.prev_kv) if event.prev_kv else 0)


def _kv_size(kv: KeyValue) -> int:
    return len(kv.key) + len(kv.value)
