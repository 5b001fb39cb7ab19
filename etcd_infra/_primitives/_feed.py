"""
A topic's messages as one process sees them: one watch for all its subscriptions, and what came last.

Algorithm
    1. One watch on the topic's messages, from now on. What it tells is kept in a ring of bounded size.
    2. A reader has nothing but a position. While the ring goes back to it, it reads there, and waits there.
    3. Else it lists the names that come after its position, and reads their values some at a time, until the
       ring goes back to where it is.
    4. Afterwards it reads how far the topic was trimmed: past its position means that messages are gone.

Guarantees
    Every message after the position, in order, each once; or a `MessagesLostError` in its place. It does not
    matter how slow a reader is, or whether etcd's history was compacted: what is in the store is read from
    there. Memory is bounded: by the ring, and by what one reader has listed. After a `MessagesLostError`
    whatever is still there comes.

Does not guarantee
    That a message that somebody deleted by hand is missed: only the trimmer leaves a mark.

Source
    The log of J. Kreps, N. Narkhede, J. Rao, "Kafka" (2011), whose consumers keep offsets; mapped onto
    revisions.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import asynccontextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._envelope import Position, Record, in_order
from etcd_infra.errors import (
    CompactedError,
    EtcdError,
    SessionLostError,
    StoreResetError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import TopicKeys
    from etcd_infra._etcd.model import WatchBatch

logger = logging.getLogger("etcd_infra.topic")

RING_MESSAGES: Final = 4096
RING_BYTES: Final = 4 * 1024 * 1024


class Feed:
    """
    The watch and the ring of one topic.

    Attributes:
        floor: The ring holds everything after it.
        resets: How often the store turned out to be another one.
        error: Why the topic can not be watched at the moment.
    """

    def __init__(self, backend: Backend, keys: TopicKeys, random: Random) -> None:
        self.backend = backend
        self.keys = keys
        self.random = random
        self.messages = KeyRange.prefix(keys.messages)
        self.floor = Position(0)
        self.resets = 0
        self.error: EtcdError | SessionLostError | None = None
        self._ring: deque[Record] = deque()
        self._is_reset = False
        self._newest = 0
        self._dropped = 0
        self._bytes = 0
        self._changed = trio.Event()

    def covers(self, position: Position) -> bool:
        """Whether the ring holds everything after `position`."""
        return position >= self.floor

    def number_after(self, position: Position) -> int:
        """Return the number of the first message after `position`; the ring must cover it."""
        low, high = 0, len(self._ring)
        while low < high:
            middle = (low + high) // 2
            if self._ring[middle].position <= position:
                low = middle + 1
            else:
                high = middle
        return self._dropped + low

    def is_before(self, number: int, position: Position) -> bool:
        """Whether the message of a number was dropped, or is not after `position`."""
        at = number - self._dropped
        return at < 0 or (at < len(self._ring) and self._ring[at].position <= position)

    def get(self, number: int) -> Record | None:
        """Return the message of a number that is in the ring; None: it has not come yet."""
        at = number - self._dropped
        return self._ring[at] if at < len(self._ring) else None

    async def wait_changed(self) -> None:
        """Wait until there is something new to see."""
        await self._changed.wait()

    # ── background ──────────────────────────────────────────────────────────────────────────────

    async def follow(self, task_status: trio.TaskStatus[None]) -> None:
        """Keep the watch open, until cancelled; started once it is open."""
        try:
            await self._follow(task_status)
        finally:
            self.error = SessionLostError("the coordinator was closed")
            self._tell()

    async def _follow(self, task_status: trio.TaskStatus[None]) -> None:
        failures = 0
        while True:
            try:
                async with self.backend.watch(self.messages, no_delete=True) as stream:
                    await self._look_for_reset(stream.created_revision)
                    self._begin_anew(stream.created_revision)
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                    failures = 0
                    async for batch in stream:
                        self._take(batch)
            except CompactedError as error:
                logger.info("%r fell behind etcd's history: %s", self.keys.root, error)
            except StoreResetError as error:
                logger.warning("%r is read from another store: %s", self.keys.root, error)
                self._is_reset = True
            except UnavailableError as error:
                logger.info("%r can not be watched at the moment: %s", self.keys.root, error)
            except EtcdError as error:
                if task_status is not trio.TASK_STATUS_IGNORED:
                    raise
                self.error = error
                self._tell()
            await trio.sleep(delay(failures, self.random.random()))
            failures += 1

    async def _look_for_reset(self, revision: int) -> None:
        """See whether the store went back while it was not watched; a member that lags behind is none."""
        if revision < self._newest:
            now = await self.backend.range(Range(KeyRange.one(self.keys.trimmed)))
            self._is_reset = self._is_reset or now.revision < self._newest

    def _begin_anew(self, revision: int) -> None:
        # Race: not before, or readers would go on in what is left of the other store.
        self.resets += self._is_reset
        self._is_reset = False
        self._dropped += len(self._ring)
        self._ring.clear()
        self._bytes = 0
        self.floor = Position(revision + 1)
        self._newest = revision
        self.error = None
        self._tell()

    def _take(self, batch: WatchBatch) -> None:
        created = (event.kv for event in batch.events if event.kv.version == 1)
        for _, kvs in groupby(created, key=lambda kv: kv.create_revision):
            for record in in_order(kvs):
                self._ring.append(record)
                self._bytes += len(record.value)
        while self._bytes > RING_BYTES or len(self._ring) > RING_MESSAGES:
            oldest = self._ring.popleft()
            self._dropped += 1
            self._bytes -= len(oldest.value)
            self.floor = oldest.position
        if batch.events:
            self._newest = batch.events[-1].revision
            self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


@asynccontextmanager
async def open_feed(backend: Backend, keys: TopicKeys, random: Random) -> AsyncGenerator[Feed]:
    """
    Open a topic's feed; entering waits until it is watched.

    Raises:
        EtcdError: etcd refuses.

    Round trips:
        One.
    """
    feed = Feed(backend, keys, random)
    async with open_background() as background:
        await background.start(feed.follow)
        yield feed
