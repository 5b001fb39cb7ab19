"""
A stream of messages in etcd: published once, delivered in order, to listeners and to groups that remember.

Keys
    ``{ns}topic/{topic}/message/{name}``  a message: JSON head, payload. Its create revision orders it.
    ``{ns}topic/{topic}/id/{id}``         the name of the message that was published under an id.
    The keys of groups are those of `_group`, `_ordered_group`, `_shared_group`; of retention, of `_trimmer`.

Algorithm
    1. Publish: ``[slot] → [put message, put slot]``, with an id nested under "no such id yet" (see `publish`).
    2. Subscribe: one watch per topic and process, and from etcd itself whatever it does not go back to
       (see `_feed`). A group keeps its place in etcd.

Guarantees
    A message that was confirmed is delivered to everybody whose place is before it, in the order (revision,
    index); or they are told that it was trimmed. Published at most once, whatever happens to answers.

Does not guarantee
    That a handler's deeds outside etcd happen once, or at all for AT_MOST_ONCE.

Source
    The log of Kafka; etcd's revision is the offset. The slot is ours.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from etcd_infra._etcd.keys import encode_segment, last_segment
from etcd_infra._etcd.model import DeleteRange, KeyRange, Range, Txn
from etcd_infra._primitives._budget import fit
from etcd_infra._primitives._cas import Change, Committed, check_fence, commit, found_in
from etcd_infra._primitives._claim import Progress, parse_progress
from etcd_infra._primitives._envelope import Position, Record, numbered
from etcd_infra._primitives._group import Cursor, Group, message_of
from etcd_infra._primitives._groups import in_groups
from etcd_infra._primitives._many import read_many
from etcd_infra._primitives._message_names import list_positions
from etcd_infra._primitives._ordered_group import OrderedMessages
from etcd_infra._primitives._reader import Reader
from etcd_infra._primitives._receipt_of import receipt_of
from etcd_infra._primitives._shared_group import SharedMessages
from etcd_infra._primitives._space import check_revision
from etcd_infra._primitives._trimmer import Retention
from etcd_infra._primitives.message import DeadLetter, Delivery
from etcd_infra._primitives.messages import Messages
from etcd_infra._primitives.publish import Publish
from etcd_infra.errors import InvalidAnswerError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._primitives._trunk import Trunk
    from etcd_infra._primitives.fence import Fence
    from etcd_infra._primitives.message import Message
    from etcd_infra._primitives.receipt import Receipt

T = TypeVar("T")


class Topic(Generic[T]):
    """
    The topic `name`; made by ``infra.topic(name)``.

    Args:
        trunk: What all objects of this topic and coordinator share.
        type: Of payloads; bytes for raw ones.
        retention: Which messages are kept; None: all, or what others say who use the topic. Once this process
            publishes or subscribes it offers to trim, by the retention that it was told last; the process that
            was first trims by its own.
    """

    def __init__(self, trunk: Trunk, type: Any, retention: Retention | None) -> None:  # noqa: A002
        if retention is not None and not isinstance(retention, Retention):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"retention= takes a Retention, not {retention!r}"
            raise TypeError(msg)
        self.name = trunk.name
        self._trunk = trunk
        self._space = trunk.space
        self._keys = trunk.keys
        self._type = type
        self._retention = retention

    def __repr__(self) -> str:
        return f"<Topic {self.name!r}>"

    # ── publishing ──────────────────────────────────────────────────────────────────────────────

    async def publish(
        self,
        payload: T,
        *,
        delivery: Delivery = Delivery.AT_LEAST_ONCE,
        message_id: str | None = None,
        fence: Fence | None = None,
    ) -> Receipt:
        """
        Publish a message.

        Args:
            payload: Of the topic's type; bytes are stored as they are.
            delivery: See `Delivery`.
            message_id: Names the message, at most 512 bytes. While a message of this id is in the topic, that
                is until it is trimmed (and for some seconds more), another one is not published: the receipt
                says so.
            fence: A proof that must hold.

        Raises:
            TypeError, ValueError: an argument is no good; nothing was sent.
            InvalidRequestError: more than 1.5 MiB less 8 KiB; nothing was sent.
            FencedError: the fence is dead; nothing was published.
            OutcomeUnknownError: the session ended while an answer was missing.
            StorageFullError, AccessDeniedError, EtcdError: not published.

        Cancellation:
            Published or not, or still to be for a moment; never twice.

        Round trips:
            One; one more for each lost answer, and for a duplicate.
        """
        check_fence(fence)
        operation = Publish(self.name, payload, delivery=delivery, message_id=message_id)
        write = operation.render(self._space)
        self._offer_to_trim()
        change = fit(Change((write,), (), fence=fence, note=b""))
        outcome = await commit(self._space.sessions, self._space.keys, change)
        if not isinstance(outcome, Committed):
            msg = f"publishing without conditions was refused: {outcome}"
            raise InvalidAnswerError(msg)
        self._space.tally.messages_sent += 1
        return await receipt_of(self._space, self._keys, write, outcome, message_id)

    # ── subscribing ─────────────────────────────────────────────────────────────────────────────

    @overload
    def subscribe(
        self, *, group: None = None, from_revision: int | None = None
    ) -> AbstractAsyncContextManager[Messages[T]]: ...
    @overload
    def subscribe(
        self,
        *,
        group: str,
        shared: bool = False,
        from_revision: int | None = None,
        ack_after: float = 30.0,
        max_retries: int = 5,
    ) -> AbstractAsyncContextManager[OrderedMessages[T] | SharedMessages[T]]: ...
    def subscribe(
        self,
        *,
        group: str | None = None,
        shared: bool = False,
        from_revision: int | None = None,
        ack_after: float = 30.0,
        max_retries: int = 5,
    ) -> AbstractAsyncContextManager[Any]:
        """
        Follow the topic; to be entered, and then iterated over.

        Without a group: every message from now on, for this object alone; nothing is acknowledged. With a
        group: the messages after the group's own place in etcd, which survives its consumers; to be
        acknowledged.

        Args:
            group: A name; the group is made when it is first used, and stays until `delete_group`.
            shared: The group's consumers share the messages, in no order; otherwise one of them gets all, in
                order.
            from_revision: Begin with the messages of this revision; 0: with the oldest there is. None: with
                what is published once this is entered. A group that exists goes on from its own place.
            ack_after: Seconds that a handler has; after that it is cancelled, and the message delivered again.
            max_retries: So often a message is delivered again before it becomes a dead letter.

        Raises:
            TypeError, ValueError: an argument is no good, or the group is of the other kind.
            EtcdError: etcd refuses.

        Cancellation:
            While entering, a group may have been made.

        Round trips:
            One to enter; two if nobody in this process follows the topic; with a group one more, and another
            one if it is new; with a shared one three more.
        """
        if from_revision is not None:
            check_revision("from_revision", from_revision)
        if group is None:
            if shared:
                msg = "shared=True needs a group="
                raise ValueError(msg)
            return self._follow(from_revision)
        encode_segment(group)
        _check_seconds("ack_after", ack_after)
        check_revision("max_retries", max_retries)
        limits = {"ack_after": float(ack_after), "max_retries": max_retries}
        return self._consume(self._group(group), from_revision, limits, shared=bool(shared))

    @asynccontextmanager
    async def _follow(self, from_revision: int | None) -> AsyncGenerator[Messages[T]]:
        async with self._trunk.feed.use() as feed:
            self._offer_to_trim()
            if from_revision is None:
                now = await self._space.backend.range(Range(KeyRange.one(self._keys.trimmed)))
                from_revision = max(now.revision + 1, feed.floor.revision)
            yield Messages(self._space, self.name, self._type, Reader(feed, Position(from_revision)))

    @asynccontextmanager
    async def _consume(
        self, group: Group[T], from_revision: int | None, limits: dict[str, Any], *, shared: bool
    ) -> AsyncGenerator[OrderedMessages[T] | SharedMessages[T]]:
        start = None if from_revision is None else Position(from_revision)
        async with self._trunk.feed.use() as feed:
            self._offer_to_trim()
            await group.create(shared=shared, start=start)
            reader = Reader(feed, Position(0))
            if shared:
                sharing = SharedMessages(group, reader, **limits)
                async with sharing.opened():
                    yield sharing
                return
            ordered = OrderedMessages(group, reader, **limits)
            try:
                yield ordered
            finally:
                await ordered.close()

    # ── looking after groups ────────────────────────────────────────────────────────────────────

    async def groups(self) -> tuple[str, ...]:
        """
        Name the topic's groups, in order.

        Round trips:
            One.
        """
        found = await self._space.backend.range(Range(KeyRange.prefix(self._keys.cursors), keys_only=True))
        return tuple(sorted(self._keys.parse_cursor(kv.key) for kv in found.kvs))

    async def unacknowledged(self, group: str, *, limit: int = 100) -> tuple[Message[T], ...]:
        """
        Return the oldest messages that a group has yet to acknowledge, in order; dead letters are none of them.

        Raises:
            ValueError: there is no such group; or an argument is no good.
            CodecError: a payload does not decode.
            EtcdError: etcd does not answer.

        Round trips:
            One, with a work-sharing group two; one for each 1,000 messages of the topic; one for those
            returned.
        """
        check_revision("limit", limit, least=1)
        waiting, attempts = await self._waiting(self._group(group))
        messages: list[Message[T]] = []
        for some in in_groups(waiting, min(limit, 100)):
            found = await read_many(self._space.backend, [self._keys.message(one.name) for one in some])
            records = [
                Record(one.position, one.index, kv.value)
                for one, kv in zip(some, found, strict=True)
                if kv is not None
            ]
            messages += [
                message_of(self._space, self.name, self._type, record, attempts.get(record.name, 0))
                for record in records
                if self._group(group).is_for_us(record)
            ]
            if len(messages) >= limit:
                break
        return tuple(messages[:limit])

    async def _waiting(self, group: Group[T]) -> tuple[list[Record], dict[str, int]]:
        """List what a group has not acknowledged, without values, and how often that was tried."""
        found = await group.read_cursor()
        if found is None:
            msg = f"topic {self.name!r} has no group {group.name!r}"
            raise ValueError(msg)
        cursor = Cursor.parse(found)
        position = cursor.position(found)
        messages = KeyRange.prefix(self._keys.messages)
        positions, _, _ = await list_positions(self._space.backend, messages, position.revision)
        waiting = [record for record in numbered(positions) if record.position > position]
        if not cursor.shared:
            return waiting, {cursor.head: cursor.attempts}
        kept = await self._space.backend.range(Range(KeyRange.prefix(self._keys.progress(group.name, ""))))
        progress: dict[str, Progress] = {last_segment(kv.key): parse_progress(kv) for kv in kept.kvs}
        left = [record for record in waiting if not progress.get(record.name, Progress()).done]
        return left, {name: one.attempts for name, one in progress.items()}

    async def dead_letters(self, group: str) -> tuple[DeadLetter[T], ...]:
        """
        Return the messages that a group has given up, oldest first; a payload that does not decode as bytes.

        Raises:
            EtcdError: etcd does not answer.

        Round trips:
            One.
        """
        reads = (
            Range(KeyRange.prefix(self._keys.dead_letters(group))),
            Range(KeyRange.prefix(self._keys.replays(group)), keys_only=True),
        )
        answer = await self._space.backend.txn(Txn(success=reads))
        dead, replays = map(found_in, answer.results)
        replayed = {last_segment(kv.key) for kv in replays}
        letters = [
            self._group(group).dead_letter(kv, is_replayed=last_segment(kv.key) in replayed) for kv in dead
        ]
        return tuple(sorted(letters, key=lambda one: (one.message.revision, one.message.index)))

    async def replay(self, group: str, letter: DeadLetter[T]) -> bool:
        """
        Deliver a dead letter to its group again, as a new message that no other group gets.

        It stays a dead letter, marked as replayed, until it is acknowledged.

        Returns:
            Whether it was a dead letter still.

        Raises:
            EtcdError: etcd refuses.

        Cancellation:
            Replayed or not, or still to be for a moment; never twice.

        Round trips:
            Two.
        """
        return await self._group(group).replay(letter.name)

    async def discard(self, group: str, letter: DeadLetter[T]) -> bool:
        """
        Delete a dead letter for good; return whether it was there. Its publisher sees it as acknowledged then.

        A copy of it that was replayed and not begun yet is passed over.

        Round trips:
            One.
        """
        one = KeyRange.one(self._keys.dead_letter(group, letter.name))
        removal = self._group(group).removal(letter.name)
        outcome = await commit(
            self._space.sessions, self._space.keys, Change((Range(one, keys_only=True), *removal), ())
        )
        return isinstance(outcome, Committed) and bool(outcome.results) and bool(found_in(outcome.results[0]))

    async def delete_group(self, group: str) -> bool:
        """
        Delete a group, its dead letters included; return whether there was one.

        Its consumers get a `ConflictError` with the next message.

        Round trips:
            One.
        """
        keys = self._keys
        cursor = KeyRange.one(keys.cursor(group))
        doomed = (
            DeleteRange(cursor),
            DeleteRange(KeyRange.prefix(keys.shared(group))),
            DeleteRange(KeyRange.prefix(keys.dead_letters(group))),
            DeleteRange(KeyRange.prefix(keys.replays(group))),
        )
        change = Change((Range(cursor, keys_only=True), *doomed), ())
        outcome = await commit(self._space.sessions, self._space.keys, change)
        return isinstance(outcome, Committed) and bool(outcome.results) and bool(found_in(outcome.results[0]))

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _group(self, name: str) -> Group[T]:
        return Group(self._space, self.name, self._keys, name, self._type)

    def _offer_to_trim(self) -> None:
        if self._retention is not None:
            self._trunk.offer_to_trim(self._retention)


def _check_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = f"{name} must be a number of seconds, not {value!r}"
        raise TypeError(msg)
    if not 0 < value < inf:
        msg = f"{name} must be more than 0 seconds, not {value!r}"
        raise ValueError(msg)
