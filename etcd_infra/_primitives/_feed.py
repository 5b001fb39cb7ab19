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
from math import inf
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import KeyRange, Range, Txn
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._cas import found_in
from etcd_infra._primitives._envelope import Position, Record, in_order, numbered
from etcd_infra._primitives._message_names import list_positions
from etcd_infra._primitives._trim_mark import TrimMark
from etcd_infra.errors import (
    CompactedError,
    EtcdError,
    MessagesLostError,
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
LISTED_TOGETHER: Final = 10_000
"""So many names are remembered: more than one Txn can publish, so at least one whole revision."""

FETCHED_TOGETHER: Final = 32
BREATHE_EVERY: Final = 16
MAX_STALE_READS: Final = 4


def _gap(after: int, up_to: int) -> MessagesLostError:
    msg = f"messages after revision {after}, up to revision {up_to}, were trimmed unread"
    return MessagesLostError(msg, after, up_to)


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


class Reader:
    """
    One subscription's place in a topic.

    Attributes:
        position: What comes after it has not been returned yet.
        since: Who begins with the oldest message there is misses what was published after this revision; what
            was trimmed before is none of its business.
    """

    def __init__(self, feed: Feed, position: Position) -> None:
        self.position = position
        self.since = inf
        self._feed = feed
        self._resets = feed.resets
        self._number: int | None = None
        self._listed: deque[tuple[Position, int]] = deque()
        self._fetched: deque[Record] = deque()
        self._listed_at = 0
        self._told_trimmed = Position(0)
        self._stale_reads = 0
        self._served = 0

    @property
    def resets(self) -> int:
        """How often it went on in another store."""
        return self._resets

    def move(self, position: Position) -> None:
        """Go on from another place."""
        self.position = position
        self._number = None
        self._listed.clear()
        self._fetched.clear()

    def peek(self) -> Record | None:
        """Return the next message if it is at hand; local and free."""
        if self._fetched:
            return self._fetched[0]
        if self._listed or self._resets != self._feed.resets or not self._feed.covers(self.position):
            return None
        return self._feed.get(self._number_of_next())

    async def next(self) -> Record:
        """
        Wait for the next message.

        Raises:
            MessagesLostError: some are gone; call again for those after them.
            SessionLostError: the coordinator was closed.
            EtcdError: etcd does not let the topic be read.

        Cancellation:
            Nothing is lost; call again.
        """
        failures = 0
        await self._breathe()
        while True:
            self._check_reset()
            if self._fetched:
                return self._advance(self._fetched.popleft())
            try:
                if self._listed:
                    await self._fetch()
                    continue
                if self._feed.error is not None:
                    raise self._feed.error
                if not self._feed.covers(self.position):
                    await self._list()
                    continue
            except UnavailableError as error:
                logger.info("%r can not be read at the moment: %s", self._feed.keys.root, error)
                await trio.sleep(delay(failures, self._feed.random.random()))
                failures += 1
                continue
            if record := self._feed.get(self._number_of_next()):
                return self._advance(record)
            await self._feed.wait_changed()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    async def _breathe(self) -> None:
        """Let other tasks run now and then: a full checkpoint costs more than the message."""
        self._served += 1
        if self._served % BREATHE_EVERY:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()

    def _number_of_next(self) -> int:
        # Race: a list may be newer than the ring, which then still gets what was listed.
        if self._number is None or self._feed.is_before(self._number, self.position):
            self._number = self._feed.number_after(self.position)
        return self._number

    def _advance(self, record: Record) -> Record:
        self.position = record.position
        self._number = None if self._number is None else self._number + 1
        return record

    def _check_reset(self) -> None:
        if self._resets != self._feed.resets:
            self._resets = self._feed.resets
            self._start_over()

    def _start_over(self) -> None:
        before = self.position.revision
        self.move(self._feed.floor)
        self._told_trimmed = Position(0)
        now = self.position.revision - (not self.position.name)
        raise MessagesLostError(
            f"the store was restored or wiped: it was at {before} and is at {now}",
            min(before, now),
            max(before, now),
        )

    def _check_fresh(self, revision: int, least: int) -> None:
        # etcd: some servers answer linearizable reads with an older revision now and then (#20418).
        if revision >= least:
            self._stale_reads = 0
            return
        self._stale_reads += 1
        if self._stale_reads > MAX_STALE_READS:
            self._start_over()
        raise UnavailableError(f"a stale read: at {revision}, not {least}")

    async def _list(self) -> None:
        """List what comes after the position; what came before a trimmer's mark is missing."""
        start, backend = self.position, self._feed.backend
        self._number = None
        # Race: the floor as it is now; while page after page is read it moves on.
        least = max(self._feed.floor.revision, start.revision) - 1
        positions, revision, read_at = await list_positions(
            backend, self._feed.messages, start.revision, most=LISTED_TOGETHER + 1
        )
        self._check_fresh(revision, least)
        mark = await backend.range(Range(KeyRange.one(self._feed.keys.trimmed)))
        self._check_fresh(mark.revision, read_at)
        self._listed_at = revision
        if len(positions) > LISTED_TOGETHER:
            # Whole revisions only: the next list begins with what is cut off here.
            cut = positions[LISTED_TOGETHER].revision
            positions = [position for position in positions[:LISTED_TOGETHER] if position.revision < cut]
        indexed = [(record.position, record.index) for record in numbered(positions)]
        self._listed.extend(one for one in indexed if one[0] > start)
        if not self._listed:
            self.position = max(start, Position(revision + 1))
        trimmed = TrimMark.position_in(mark.kvs)
        concerns_us = start > Position(0) or trimmed.revision > self.since
        if concerns_us and trimmed > max(start, self._told_trimmed):
            self._told_trimmed = trimmed
            raise _gap(start.revision, trimmed.revision)

    async def _fetch(self) -> None:
        """Read the values of some that were listed."""
        some = [self._listed[at] for at in range(min(FETCHED_TOGETHER, len(self._listed)))]
        keys = [self._feed.keys.message(position.name) for position, _ in some]
        reads = tuple(Range(KeyRange.one(key)) for key in keys)
        answer = await self._feed.backend.txn(Txn(success=reads))
        self._check_fresh(answer.revision, self._listed_at)
        found = [next(iter(found_in(result)), None) for result in answer.results]
        for (position, index), kv in zip(some, found, strict=True):
            if kv is None or kv.create_revision != position.revision:
                if self._fetched:
                    return
                before, self.position = self.position, position
                self._listed.clear()
                raise _gap(before.revision, position.revision)
            self._listed.popleft()
            self._fetched.append(Record(position, index, kv.value))
