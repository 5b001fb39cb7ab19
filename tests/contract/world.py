"""What a fact of the contract is told against: one backend, and a part of its key space for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.model import (
    DeleteRange,
    Event,
    KeyRange,
    KeyValue,
    Put,
    Range,
    Txn,
    TxnResult,
    WatchBatch,
)

if TYPE_CHECKING:
    from etcd_infra._backends.memory_store import Store
    from etcd_infra._etcd.backend import Backend, WatchStream
    from etcd_infra._etcd.model import Op

PATIENCE = 10.0


@dataclass(frozen=True)
class World:
    """
    One backend and one test's part of its key space.

    `store` is the in-memory etcd's (None on a real server); `version` is the server's, (0,) in memory.
    """

    backend: Backend
    prefix: bytes
    version: tuple[int, ...] = (0,)
    store: Store | None = None

    def key(self, name: bytes | str) -> bytes:
        """Return a key of this test."""
        return self.prefix + (name.encode() if isinstance(name, str) else name)

    def one(self, name: bytes | str) -> KeyRange:
        """Return a range of one key of this test."""
        return KeyRange.one(self.key(name))

    def span(self, first: bytes | str, end: bytes | str) -> KeyRange:
        """Return a range of this test's keys."""
        return KeyRange(self.key(first), self.key(end))

    @property
    def all(self) -> KeyRange:
        """Return the range of all keys of this test."""
        return KeyRange.prefix(self.prefix)

    async def apply(self, *ops: Op) -> TxnResult:
        """Apply operations in one Txn."""
        return await self.backend.txn(Txn(success=ops))

    async def put(self, name: bytes | str, value: bytes = b"v", **options: object) -> int:
        """Write one key; return the revision."""
        return (await self.apply(self.putting(name, value, **options))).revision

    def putting(self, name: bytes | str, value: bytes = b"v", **options: object) -> Put:
        """Return a put of one of this test's keys."""
        return Put(self.key(name), value, **options)  # type: ignore[arg-type]

    def deleting(self, name: bytes | str) -> DeleteRange:
        """Return a delete of one of this test's keys."""
        return DeleteRange(self.one(name))

    async def get(self, name: bytes | str, **options: object) -> KeyValue | None:
        """Read one key."""
        return await self.backend.get(self.key(name), **options)  # type: ignore[arg-type]

    async def names(self, **options: object) -> list[bytes]:
        """List this test's keys, without their common prefix."""
        found = await self.backend.range(Range(self.all, **options))  # type: ignore[arg-type]
        return [kv.key.removeprefix(self.prefix) for kv in found.kvs]

    async def revision(self) -> int:
        """Return the store's revision."""
        return (await self.backend.range(Range(KeyRange.one(b"\0"), count_only=True))).revision

    async def grant(self, ttl: int = 60) -> int:
        """Grant a lease; return its id."""
        return (await self.backend.lease_grant(ttl)).lease

    def bare(self, event: Event) -> bytes:
        """Return the name of an event's key."""
        return event.key.removeprefix(self.prefix)


async def receive(stream: WatchStream, patience: float = PATIENCE) -> WatchBatch:
    """Wait for one batch, but not for ever."""
    with trio.fail_after(patience):
        return await stream.receive()


async def receive_events(stream: WatchStream, count: int) -> list[Event]:
    """Collect batches until there are `count` events."""
    events: list[Event] = []
    while len(events) < count:
        events += (await receive(stream)).events
    return events


async def stays_silent(stream: WatchStream, seconds: float = 0.3) -> bool:
    """Whether nothing is delivered for a while."""
    with trio.move_on_after(seconds):
        await stream.receive()
        return False
    return True
