"""One subscription's way through a topic: from the ring while that goes back far enough, else from etcd."""

from __future__ import annotations

import logging
from collections import deque
from math import inf
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._etcd.model import KeyRange, Range, Txn
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._cas import found_in
from etcd_infra._primitives._envelope import Position, Record, numbered
from etcd_infra._primitives._message_names import list_positions
from etcd_infra._primitives._trim_mark import TrimMark
from etcd_infra.errors import MessagesLostError, UnavailableError

if TYPE_CHECKING:
    from etcd_infra._primitives._feed import Feed

logger = logging.getLogger("etcd_infra.topic")

LISTED_TOGETHER: Final = 10_000
"""So many names are remembered: more than one Txn can publish, so at least one whole revision."""
FETCHED_TOGETHER: Final = 32
BREATHE_EVERY: Final = 16
MAX_STALE_READS: Final = 4


def _gap(after: int, up_to: int) -> MessagesLostError:
    msg = f"messages after revision {after}, up to revision {up_to}, were trimmed unread"
    return MessagesLostError(msg, after, up_to)


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
