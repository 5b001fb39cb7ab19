"""A backend that counts what it is asked, and the events that its watches are told."""

from __future__ import annotations

from contextlib import asynccontextmanager

from etcd_infra._etcd.backend import WatchStream
from etcd_infra.testing import RecordingBackend


class CountingBackend(RecordingBackend):
    """Wraps a backend; `events` lists every event that a watch has delivered."""

    def __init__(self, inner):
        super().__init__(inner)
        self.events = []

    def begin(self):
        """Forget everything so far."""
        self.calls.clear()
        self.events.clear()

    @asynccontextmanager
    async def watch(self, *arguments, **options):
        """See `Backend`."""
        async with super().watch(*arguments, **options) as stream:
            yield _Counted(stream, self.events)


class _Counted(WatchStream):
    def __init__(self, stream, events):
        self._stream = stream
        self._events = events

    @property
    def created_revision(self):
        return self._stream.created_revision

    async def receive(self):
        batch = await self._stream.receive()
        self._events += batch.events
        return batch
