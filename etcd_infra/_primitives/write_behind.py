"""
Writes that return at once and reach etcd in the background, in order.

Keys
    ``{ns}state/{key}``  as state has them.

Algorithm
    1. Writes gather in a batch; a key that is written again replaces its value there.
    2. One batch at a time is one Txn: `[slot, fence, no intents] → [put and delete all, put slot]`. What is
       written meanwhile gathers in the next.
    3. When too many batches wait, the next write waits for room.

Guarantees
    Own writes can be read at once. Every batch is applied once, as a whole, and in order: what is in etcd is
    at every revision what these writes had led to at some moment. A crash loses the newest of them only.

Does not guarantee
    That a write is in etcd before `flush` or the end of the block returned. After an error nothing more is
    written: the calls that follow raise it, and so does leaving.

Source
    Group commit, as databases have it; the prefix guarantee is that of a log.
"""

from __future__ import annotations

import copy
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import DeleteRange, KeyRange, KeyValue, Op, Put, Range
from etcd_infra._primitives._cas import Change, check_fence, commit
from etcd_infra._primitives.entry import Entry
from etcd_infra._session.keepalive import clean_up_deadline
from etcd_infra.errors import OutcomeUnknownError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.fence import Fence

U = TypeVar("U")

MAX_KEYS: Final = 32
MAX_BYTES: Final = 512 * 1024
MAX_BATCHES: Final = 32


@dataclass(slots=True)
class _Batch:
    """Writes that become one Txn; None deletes."""

    number: int
    values: dict[bytes, bytes | None] = field(default_factory=dict)
    size: int = 0
    closed: bool = False

    def take(self, key: bytes, value: bytes | None) -> bool:
        """Take a write in, if there is room for it."""
        before = self.values.get(key)
        size = self.size + len(value or b"") - len(before or b"") + (len(key) if key not in self.values else 0)
        if self.closed or (self.values and (size > MAX_BYTES or len(self.values | {key: None}) > MAX_KEYS)):
            return False
        self.values[key] = value
        self.size = size
        return True

    def ops(self) -> tuple[Op, ...]:
        return tuple(
            [
                DeleteRange(KeyRange.one(key)) if value is None else Put(key, value)
                for key, value in self.values.items()
            ]
        )


class WriteBehind:
    """
    Writes state behind the caller's back; made by `Coordinator.open_write_behind`.

    Raises (every operation):
        TypeError, ValueError: an argument is no good.
        FencedError, OutcomeUnknownError, SessionLostError, EtcdError: an earlier write failed so; it and all
            that were made after it are lost, or unknown.
        trio.ClosedResourceError: the block was left.
    """

    def __init__(self, space: Space, fence: Fence | None) -> None:
        self._space = space
        self._fence = fence
        self._batches: deque[_Batch] = deque()
        self._numbers = 0
        self._error: Exception | None = None
        self._closed = False
        self._news = trio.Event()

    async def set(self, key: str, value: object) -> None:
        """
        Write a key soon; later changes of the object `value` do not count.

        Waits only while 32 batches (of 32 keys, or 512 KiB) are on their way.

        Cancellation:
            Nothing will be written.
        """
        await self._write(self._space.keys.state(key), self._space.encode(value))

    async def delete(self, key: str) -> None:
        """Delete a key soon. See `set`."""
        await self._write(self._space.keys.state(key), None)

    @overload
    async def get(self, key: str) -> Entry[Any] | None: ...
    @overload
    async def get(self, key: str, *, type: type[U]) -> Entry[U] | None: ...
    async def get(self, key: str, *, type: Any = Any) -> Entry[Any] | None:  # noqa: A002
        """
        Read a key as this process's writes have left it; version 0: that write is not known to be in etcd yet.

        Round trips:
            None for a key whose write is on its way, else one.
        """
        full = self._space.keys.state(key)
        self._check()
        self._space.tally.state_operations += 1
        for batch in reversed(self._batches):
            if full in batch.values:
                await trio.lowlevel.checkpoint()
                value = batch.values[full]
                if value is None:
                    return None
                return Entry(key, self._space.decode(KeyValue(full, value), type), 0)
        found = await self._space.read(Range(KeyRange.one(full)))
        return self._space.entry(found.kvs[0], type) if found.kvs else None

    async def flush(self) -> None:
        """Wait until everything that was written so far is in etcd."""
        await trio.lowlevel.checkpoint()
        self._check()
        await self._written(self._numbers)
        self._check()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _check(self) -> None:
        if self._error is not None:
            raise copy.copy(self._error) from self._error
        if self._closed:
            msg = "this write-behind was left"
            raise trio.ClosedResourceError(msg)

    async def _write(self, key: bytes, value: bytes | None) -> None:
        self._space.tally.state_operations += 1
        await trio.lowlevel.checkpoint()
        self._check()
        while not self._take(key, value):
            await self._news.wait()
            self._check()
        self._tell()

    def _take(self, key: bytes, value: bytes | None) -> bool:
        if self._batches and self._batches[-1].take(key, value):
            return True
        if len(self._batches) == MAX_BATCHES:
            return False
        self._numbers += 1
        self._batches.append(_Batch(self._numbers))
        return self._batches[-1].take(key, value)

    async def _written(self, number: int) -> None:
        while self._error is None and self._batches and self._batches[0].number <= number:
            await self._news.wait()

    def _tell(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()

    async def run(self) -> None:
        """Write batch after batch, until cancelled or one fails."""
        try:
            while True:
                while not self._batches:
                    await self._news.wait()
                batch = self._batches[0]
                batch.closed = True
                change = Change(batch.ops(), tuple(batch.values), fence=self._fence)
                await commit(self._space.sessions, self._space.keys, change)
                self._batches.popleft()
                self._tell()
        except Exception as error:  # noqa: BLE001 - the next call raises it
            error.add_note(f"{self._pending()}; nothing more is written")
            self._error = error
            self._tell()

    async def finish(self) -> Exception | None:
        """Write what is left, in two seconds at most, shielded; return what went wrong."""
        self._closed = True
        self._tell()
        with trio.move_on_at(clean_up_deadline(), shield=True):
            await self._written(self._numbers)
        if self._error is None and self._batches:
            keys = tuple(dict.fromkeys(key for batch in self._batches for key in batch.values))
            self._error = OutcomeUnknownError("writes that were not finished when their block was left", keys)
            self._error.add_note(self._pending())
        return self._error

    def _pending(self) -> str:
        writes = sum(len(batch.values) for batch in self._batches)
        return f"{writes} writes are lost, or unknown"


@asynccontextmanager
async def open_write_behind(space: Space, fence: Fence | None = None) -> AsyncGenerator[WriteBehind]:
    """
    Open a write-behind; leaving writes what is left, in two seconds at most.

    Raises:
        FencedError, OutcomeUnknownError, SessionLostError, EtcdError: a write failed, and no call has raised
            that yet. The body's own exception wins, and carries it as a note.
    """
    check_fence(fence)
    behind = WriteBehind(space, fence)
    async with open_background() as background:
        background.start_soon(behind.run)
        try:
            yield behind
        except BaseException as error:
            failure = await behind.finish()
            if failure is not None and error.__cause__ is not failure:
                error.add_note(f"and writes were lost: {failure}")
            raise
        failure = await behind.finish()
        if failure is not None:
            raise failure
