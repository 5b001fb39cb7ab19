"""Watches that break, are refused, or deliver nothing, on demand."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.backend import WatchStream
from etcd_infra._etcd.wrapping import Wrapping
from etcd_infra.errors import StoreResetError, UnavailableError

if TYPE_CHECKING:
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.model import WatchBatch


class FaultyWatches(Wrapping):
    """
    Wraps a backend and spoils its watches.

    Attributes:
        refused: New watches raise `UnavailableError`.
        deaf: Open watches deliver nothing.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.refused = False
        self.deaf = False
        self._streams: set[_Stream] = set()

    def break_all(self) -> None:
        """End every open watch with a `StoreResetError`."""
        for stream in self._streams:
            stream.broken = True
            stream.receiving.cancel()

    @asynccontextmanager
    async def watch(self, watched, /, **options):
        """See `Backend`."""
        if self.refused:
            await trio.lowlevel.checkpoint()
            raise UnavailableError("watching is refused on demand")
        async with super().watch(watched, **options) as inner:
            stream = _Stream(self, inner)
            self._streams.add(stream)
            try:
                yield stream
            finally:
                self._streams.discard(stream)


class _Stream(WatchStream):
    def __init__(self, watches: FaultyWatches, inner: WatchStream) -> None:
        self.created_revision = inner.created_revision
        self.broken = False
        self.receiving = trio.CancelScope()
        self._watches = watches
        self._inner = inner

    async def receive(self) -> WatchBatch:
        if not self.broken:
            self.receiving = trio.CancelScope()
            with self.receiving:
                batch = await self._inner.receive()
                if self._watches.deaf:
                    await trio.sleep_forever()
                return batch
        raise StoreResetError("the watch was broken on demand")
