"""
A group that gets its messages in order: one of its consumers is active, the others wait for its place.

Keys
    ``{ns}topic/{topic}/group/{group}/consumer/{lease}-{n}``  a place in line (see `_waitqueue`).
    ``{ns}topic/{topic}/cursor/{group}``                      see `_group`; written by the active consumer only.

Algorithm
    1. Stand in line; the first is active, and reads the cursor.
    2. Begin a message: ``[slot, created(consumer)==token, mod(cursor)==seen] → [cursor: it is begun, once
       more]``. The acknowledgement of the message before does this in passing if the next one is at hand.
    3. Acknowledge: ``[the same, mod of what was read, no intent] → [effects, cursor: past it]``.
    4. Failed: begin it again; after `max_retries` of that ``[the same] → [dead letter, cursor: past it]``.

Guarantees
    The order of the topic. A message is past the cursor only if it was acknowledged, is a dead letter, or was
    published at most once; all effects of `GroupMessage.transaction` took place with that, once. A consumer
    that was replaced can neither acknowledge nor write effects. How often a message was begun survives its
    consumers.

Does not guarantee
    That a handler's deeds outside etcd happen once.

Source
    The cursor beside its effects: P. Helland, "Life beyond Distributed Transactions" (2007).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import msgspec
import trio

from etcd_infra._etcd.model import Compare, KeyRange, Put, Range, Txn, TxnResult
from etcd_infra._primitives._budget import fit
from etcd_infra._primitives._cas import Change, Committed, commit, found_in
from etcd_infra._primitives._envelope import Position
from etcd_infra._primitives._foremost import become_foremost
from etcd_infra._primitives._group import Cursor, Group
from etcd_infra._primitives._handling import Effects, Ending, Handling
from etcd_infra._primitives._one_at_a_time import OneAtATime
from etcd_infra._session.keepalive import clean_up_deadline
from etcd_infra.errors import EtcdInfraError, FencedError, NotHeldError

if TYPE_CHECKING:
    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._primitives._envelope import Record
    from etcd_infra._primitives._hold import Hold
    from etcd_infra._primitives._reader import Reader
    from etcd_infra._primitives.message import GroupMessage

T = TypeVar("T")

logger = logging.getLogger("etcd_infra.topic")

NO_EFFECTS: Final = Effects()


class _SupersededError(Exception):
    """A message is a copy of a dead letter that has another copy by now, or is none any more."""


class OrderedMessages(Generic[T]):
    """
    One consumer's end of an ordered group, to be iterated over; see `Topic.subscribe`.

    It waits until this consumer is the active one, and then for each message until the one before it is
    settled.
    """

    def __init__(self, group: Group[T], reader: Reader, *, ack_after: float, max_retries: int) -> None:
        self._group = group
        self._space = group.space
        self._reader = reader
        self._ack_after = ack_after
        self._max_retries = max_retries
        self._hold: Hold | None = None
        self._cursor = Cursor(0)
        self._seen: int | None = None  # the cursor's mod revision; None: not known
        self._head: Record | None = None
        self._current: Handling | None = None
        self._counted = ""  # the name of a message whose next attempt is counted already
        self._delayed = ("", 0.0)
        self._resets = reader.resets
        self._one_at_a_time = OneAtATime()

    @property
    def is_active(self) -> bool:
        """Whether this consumer is the group's active one, by what this process knows."""
        return self._hold is not None and self._hold.is_held()

    def __aiter__(self) -> OrderedMessages[T]:
        return self

    async def __anext__(self) -> GroupMessage[T]:
        """
        Wait for the next message.

        A message that was neither acknowledged nor given back counts as failed after `ack_after` seconds.

        Raises:
            MessagesLostError: some were trimmed unread; iteration may go on after them.
            CodecError: a message does not decode; it is delivered again, and in the end a dead letter.
            ConflictError: the group was deleted; told with the next message.
            SessionLostError: the coordinator was closed.
            EtcdError: etcd refuses.
            trio.BusyResourceError: another task waits here already.

        Cancellation:
            Nothing is lost; call again. (But a message that was published at most once may be: it is
            acknowledged before it is returned.) While it waits to be the active one: at the end of the line
            then.

        Round trips:
            One; none while messages are at hand. To become the active one: three.
        """
        with self._one_at_a_time:
            while True:
                hold = await self._active()
                try:
                    with hold.tied():
                        await self._wait_settled()
                        return await self._hand_over(hold)
                except FencedError as error:
                    logger.warning("%s: %s", self._group.name, error)
                # The session, or the place in line, was lost: wait for another one.
                await self._let_go()

    async def close(self) -> None:
        """Let the next consumer begin, within two seconds."""
        if self._current is not None:
            self._current.close()
        await self._let_go()

    # ── the active consumer ─────────────────────────────────────────────────────────────────────

    async def _active(self) -> Hold:
        while self._hold is None or not self._hold.is_held():
            await self._let_go()
            self._hold = await self._wait_turn()
            self._seen = None
        if self._seen is None:
            await self._read_cursor()
        return self._hold

    async def _wait_turn(self) -> Hold | None:
        line = self._group.keys.consumers(self._group.name)
        return await become_foremost(self._space.sessions, line, f"{self._group.topic}/{self._group.name}")

    async def _let_go(self) -> None:
        hold, self._hold = self._hold, None
        if hold is None:
            return
        current, self._current = self._current, None
        if current is not None:
            current.end(Ending.LOST)
            with trio.move_on_at(clean_up_deadline(), shield=True):
                await current.wait_left()
        if hold.is_held() and self._counted and self._seen is not None:
            await self._take_back_count(hold)
        self._counted = ""
        if (loss := await hold.finish()) is not None:
            logger.warning("a consumer of %r was replaced: %s", self._group.name, loss)

    async def _take_back_count(self, hold: Hold) -> None:
        """Un-count the attempt that was counted in advance and never begun."""
        uncounted = msgspec.structs.replace(self._cursor, attempts=self._cursor.attempts - 1)
        try:
            with trio.move_on_at(trio.current_time() + min(1.0, hold.remaining()), shield=True):
                await self._write(hold, uncounted)
        except EtcdInfraError as error:
            logger.info("an attempt of %r that was not begun is counted: %s", self._group.name, error)

    # ── handing over ────────────────────────────────────────────────────────────────────────────

    async def _wait_settled(self) -> None:
        if (current := self._current) is not None:
            await current.wait_settled()
            if self._current is current:
                self._current = None

    async def _hand_over(self, hold: Hold) -> GroupMessage[T]:
        while True:
            if self._seen is None or self._resets != self._reader.resets:
                # What the cursor of a restored store has not passed comes, whatever was told before.
                self._resets = self._reader.resets
                await self._read_cursor()
            if self._head is None:
                self._head = await self._reader.next()
            record = self._head
            if self._is_past(record) or not self._group.is_for_us(record):
                self._head = None
                continue
            if record.name == self._delayed[0]:
                await trio.sleep_until(self._delayed[1])
                self._delayed = ("", 0.0)
            try:
                attempt = await self._begin(hold, record)
            except _SupersededError:
                await self._pass_over(hold, record)
                continue
            if attempt:
                return self._handed(hold, record, attempt)

    def _handed(self, hold: Hold, record: Record, attempt: int) -> GroupMessage[T]:
        until = trio.current_time() + self._ack_after
        handling = Handling(self, self._space, hold, record, attempt=attempt, until=until)
        if self._group.settles_before(record):
            handling.end(Ending.ACKNOWLEDGED)
            self._head = None
        message = self._group.message(record, handling)
        self._current = handling
        return message

    async def _begin(self, hold: Hold, record: Record) -> int:
        """Count an attempt; return which it is, 0 if there is nothing to attempt."""
        tried = self._cursor.attempts if self._cursor.head == record.name else 0
        if self._counted == record.name:
            self._counted = ""
            return tried
        if tried > self._max_retries:
            await self._bury(hold, record, tried, "")
            return 0
        if self._group.settles_before(record):
            cursor = Cursor(*record.position)
        else:
            cursor = msgspec.structs.replace(self._cursor, head=record.name, attempts=tried + 1)
        self._counted = ""
        if await self._write(hold, cursor, of=record):
            return tried + 1
        self._catch_up(record)
        return 0

    async def _bury(self, hold: Hold, record: Record, attempts: int, reason: str) -> None:
        logger.warning("%r of %r is a dead letter now", record.name, self._group.name)
        burial = self._group.burial(record, attempts, reason)
        # Race: an acknowledgement whose answer nobody waited for may have moved the cursor.
        while self._seen is None or not self._is_past(record):
            if await self._write(hold, Cursor(*record.position), Effects(burial), of=record):
                break
        self._head = None

    async def _pass_over(self, hold: Hold, record: Record) -> None:
        """Move on from a copy of a dead letter that was replayed again since, or is no dead letter any more."""
        while self._seen is None or not self._is_past(record):
            if await self._write(hold, Cursor(*record.position)):
                break
        self._head = None

    def _is_past(self, record: Record) -> bool:
        return Position(self._cursor.revision, self._cursor.name) >= record.position

    def _catch_up(self, record: Record) -> None:
        """Take in that the cursor was moved by a copy of an earlier write of ours."""
        if self._is_past(record):
            self._head = None
            self._reader.move(Position(self._cursor.revision, self._cursor.name))

    # ── what comes of a message ─────────────────────────────────────────────────────────────────

    async def acknowledge(self, handling: Handling, effects: Effects) -> bool:
        """See `Desk`."""
        hold, record = self._hold, handling.record
        if hold is not handling.custody or hold is None:
            raise handling.custody.loss()
        cursor = Cursor(*record.position)
        if following := self._following():
            cursor = Cursor(*record.position, head=following.name, attempts=1)
        had_effects = bool(effects.ops)
        effects = Effects((*effects.ops, *self._group.resurrection(record)), effects.keys, effects.conditions)
        while self._seen is None or not self._is_past(record):
            seen = self._seen
            try:
                applied = await self._write(hold, cursor, effects, of=record)
            except _SupersededError:
                handling.end(Ending.GIVEN_BACK)
                msg = f"message {record.name!r}, a dead letter, was trimmed and replayed again, or discarded"
                raise NotHeldError(msg) from None
            if applied:
                self._counted = cursor.head
                self._head = None
                return True
            if self._seen == seen:
                return False
        self._head = None
        if had_effects:
            msg = f"message {record.name!r} was acknowledged before, without these effects"
            raise NotHeldError(msg)
        return True

    def _following(self) -> Record | None:
        """Return the next message, if it is at hand and its first attempt may be counted in advance."""
        if not self._max_retries:
            return None  # counted and never begun, it would be buried
        following = self._reader.peek()
        if following is None or not self._group.is_for_us(following) or self._group.settles_before(following):
            return None
        return following

    async def give_back(self, handling: Handling, delay: float, reason: str, *, counts: bool) -> None:
        """See `Desk`."""
        hold, record = self._hold, handling.record
        if hold is not handling.custody or hold is None:
            return
        if not counts:
            self._counted = record.name
        elif handling.attempt > self._max_retries:
            with suppress(_SupersededError):
                await self._bury(hold, record, handling.attempt, reason)
        else:
            self._delayed = (record.name, trio.current_time() + delay)

    async def abandon(self, handling: Handling) -> None:
        """See `Desk`: nothing to do, the attempt is counted and the cursor stands before it."""

    def lost(self, handling: Handling) -> None:
        """See `Desk`: nothing to do, the place in line is lost, too."""

    # ── the cursor ──────────────────────────────────────────────────────────────────────────────

    async def _read_cursor(self) -> None:
        found = await self._group.known_cursor()
        self._adopt(found)
        self._counted = ""
        self._reader.since = found.create_revision
        # What is handled now is still the head when it is not acknowledged.
        if self._current is None or self._current.ending is not None:
            self._head = None
            self._reader.move(Position(self._cursor.revision, self._cursor.name))

    def _adopt(self, kv: KeyValue) -> None:
        cursor = Cursor.parse(kv)
        position = cursor.position(kv)
        self._cursor = msgspec.structs.replace(cursor, revision=position.revision, name=position.name)
        self._seen = kv.mod_revision

    async def _write(
        self, hold: Hold, cursor: Cursor, effects: Effects = NO_EFFECTS, *, of: Record | None = None
    ) -> bool:
        """
        Write the cursor, with effects; False: it was moved (then it is known anew), or they do not hold.

        Raises:
            _SupersededError: `of` is a copy of a dead letter that has another copy by now, or is none any more.
        """
        key, seen = self._group.cursor_key, self._seen
        if seen is None:
            await self._read_cursor()
            return False
        standing = self._group.standing(of) if of is not None else ()
        change = Change(
            (Put(key, cursor.to_json()), *effects.ops),
            effects.keys,
            (Compare.modified_at(key, seen), *standing, *effects.conditions),
            (Range(KeyRange.one(key)), *[Txn((compare,)) for compare in standing]),
            hold.fence,
        )
        # Whatever ends this early leaves open whether it was applied: the cursor is read again then.
        self._seen = None
        outcome = await commit(self._space.sessions, self._space.keys, fit(change))
        if isinstance(outcome, Committed):
            if self._hold is hold:
                self._cursor, self._seen = cursor, outcome.revision
            return True
        found = found_in(outcome.reads[0])
        if not found:
            raise self._group.deleted()
        self._adopt(found[0])
        stands = all(isinstance(answer, TxnResult) and answer.succeeded for answer in outcome.reads[1:])
        # Race: an acknowledgement of ours that nobody waited for ends the letter, too.
        if not stands and of is not None and not self._is_past(of):
            raise _SupersededError
        return False
