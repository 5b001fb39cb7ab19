"""
What the consumers of a group share: its cursor, its dead letters, and how messages are turned into objects.

Keys
    ``{ns}topic/{topic}/cursor/{group}``       JSON position, kind, and what is being tried; on no lease.
    ``{ns}topic/{topic}/dead/{group}/{name}``  a message that was given up: JSON how, then the message.
    ``{ns}topic/{topic}/dead-replayed/{group}/{name}``  the name of its copy that was published for the group.

Algorithm
    A group is made by ``[no cursor] → [put cursor]``: it gets what is published after that revision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec
import trio

from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, KeyValue, Put, Range
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._budget import fit
from etcd_infra._primitives._cas import Change, Refused, commit, found_in
from etcd_infra._primitives._envelope import Head, Position, Record, pack
from etcd_infra._primitives._many import read_many
from etcd_infra._primitives._space import MAX_READS
from etcd_infra._primitives.message import DeadLetter, Delivery, GroupMessage, Message
from etcd_infra.errors import CodecError, ConflictError

if TYPE_CHECKING:
    from etcd_infra._etcd.keys import TopicKeys
    from etcd_infra._etcd.model import Op
    from etcd_infra._primitives._handling import Handling
    from etcd_infra._primitives._space import Space

T = TypeVar("T")

AT_CREATION: Final = -1
"""The revision of a cursor that was never moved: everything after its own creation is to be delivered."""


class Cursor(msgspec.Struct, frozen=True, omit_defaults=True):
    """
    How far a group has come.

    Attributes:
        revision: With `name` the position: everything up to it is done.
        shared: The consumers share the work; else one of them gets everything, in order.
        head: The name of the message that an ordered group is trying.
        attempts: How often it was begun.
    """

    revision: int
    name: str = ""
    shared: bool = False
    head: str = ""
    attempts: int = 0

    @classmethod
    def parse(cls, kv: KeyValue) -> Cursor:
        """
        Read a cursor.

        Raises:
            CodecError: it is none.
        """
        try:
            return msgspec.json.decode(kv.value, type=cls)
        except msgspec.DecodeError as error:
            key = kv.key.decode(errors="replace")
            raise CodecError(f"{key!r} holds no cursor: {error}", key, kv.mod_revision) from error

    def position(self, kv: KeyValue) -> Position:
        """Return the position; `kv` is the key in which it stands."""
        if self.revision == AT_CREATION:
            return Position(kv.create_revision + 1)
        return Position(self.revision, self.name)

    def to_json(self) -> bytes:
        """Render it."""
        return msgspec.json.encode(self)


class Death(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a message was given up; the revision and the index are those of the first delivery."""

    attempts: int
    reason: str
    at: float
    revision: int
    index: int


@dataclass(frozen=True, slots=True)
class Group(Generic[T]):
    """One group of one topic; `type` is the payload's."""

    space: Space
    topic: str
    keys: TopicKeys
    name: str
    type: Any

    @property
    def cursor_key(self) -> bytes:
        """Where its cursor stands."""
        return self.keys.cursor(self.name)

    async def read_cursor(self) -> KeyValue | None:
        """Read its cursor; None if there is no such group. One round trip."""
        return await self.space.backend.get(self.cursor_key)

    async def known_cursor(self) -> KeyValue:
        """
        Read the cursor of a group that was there.

        Raises:
            ConflictError: it was deleted.

        Round trips:
            One.
        """
        for attempt in range(MAX_READS):
            if (found := await self.read_cursor()) is not None:
                return found
            # etcd: some servers answer linearizable reads with an older revision now and then (#20418).
            await trio.sleep(delay(attempt, self.space.random.random()))
        raise self.deleted()

    async def create(self, *, shared: bool, start: Position | None) -> None:
        """
        Make the group, unless it is there.

        Args:
            shared: The kind it must have.
            start: What comes after it is delivered; None: what is published from now on.

        Raises:
            ValueError: it is there, and of the other kind.

        Round trips:
            One, and one more if it is new.
        """
        found = await self.read_cursor()
        if found is None:
            cursor = Cursor(AT_CREATION, shared=shared) if start is None else Cursor(*start, shared=shared)
            change = Change(
                (Put(self.cursor_key, cursor.to_json()),),
                (),
                (Compare.absent(self.cursor_key),),
                (Range(KeyRange.one(self.cursor_key)),),
            )
            outcome = await commit(self.space.sessions, self.space.keys, change)
            if not isinstance(outcome, Refused):
                return
            found = found_in(outcome.reads[0])[0]
        if Cursor.parse(found).shared != shared:
            kinds = ("an ordered", "a work-sharing") if shared else ("a work-sharing", "an ordered")
            msg = f"group {self.name!r} of topic {self.topic!r} is {kinds[0]} one, not {kinds[1]} one"
            raise ValueError(msg)

    def deleted(self) -> ConflictError:
        """Say that somebody deleted the group."""
        msg = f"group {self.name!r} of topic {self.topic!r} was deleted"
        return ConflictError(msg, self.name, 0)

    def message(self, record: Record, handling: Handling) -> GroupMessage[T]:
        """
        Turn a record into what a consumer gets.

        Raises:
            CodecError: it is no message, or its payload does not decode.
        """
        payload = decoded(self.space, self.type, record)
        about = _about(self.topic, record.head, record, handling.attempt)
        self.space.tally.messages_received += 1
        return GroupMessage(payload=payload, handling=handling, **about)

    def is_for_us(self, record: Record) -> bool:
        """Whether a message is for this group."""
        try:
            return record.head.group in {"", self.name}
        except CodecError:
            return True

    def settles_before(self, record: Record) -> bool:
        """Whether a message is acknowledged before it is handled."""
        try:
            return record.head.mode == Delivery.AT_MOST_ONCE
        except CodecError:
            return False

    def burial(self, record: Record, attempts: int, reason: str) -> tuple[Op, ...]:
        """Return what makes a message a dead letter; a replayed one takes its old place."""
        death = Death(attempts, reason, self.space.clock.wall(), record.position.revision, record.index)
        dead = self._original(record) or record.name
        value = msgspec.json.encode(death) + b"\n" + record.value
        note = DeleteRange(KeyRange.one(self.keys.replay(self.name, dead)))
        return (Put(self.keys.dead_letter(self.name, dead), value), note)

    def resurrection(self, record: Record) -> tuple[Op, ...]:
        """Return what must be done when a message was handled: a replayed one is a dead letter no more."""
        dead = self._original(record)
        return self.removal(dead) if dead else ()

    def standing(self, record: Record) -> tuple[Compare, ...]:
        """Return what a replayed message depends on: that it is the last copy, of a letter that is there."""
        dead = self._original(record)
        if not dead:
            return ()
        # A copy and the note of it are one commit.
        return (Compare.modified_at(self.keys.replay(self.name, dead), record.position.revision),)

    def removal(self, dead: str) -> tuple[Op, ...]:
        """Return what deletes a dead letter."""
        keys = (self.keys.dead_letter(self.name, dead), self.keys.replay(self.name, dead))
        return tuple(DeleteRange(KeyRange.one(key)) for key in keys)

    @staticmethod
    def _original(record: Record) -> str:
        """Return the name of the dead letter that a message is a copy of; empty if it is none."""
        try:
            return record.head.dead
        except CodecError:
            return ""

    def dead_letter(self, kv: KeyValue, *, is_replayed: bool) -> DeadLetter[T]:
        """
        Describe a dead letter; a payload that does not decode is shown as bytes.

        Raises:
            CodecError: it is none.
        """
        how, _, value = kv.value.partition(b"\n")
        name = kv.key.rpartition(b"/")[2].decode(errors="replace")
        try:
            death = msgspec.json.decode(how, type=Death)
        except msgspec.DecodeError as error:
            raise CodecError(f"{name!r} is no dead letter: {error}", name, kv.mod_revision) from error
        record = Record(Position(death.revision, name), death.index, value)
        message: Message[Any]
        try:
            message = message_of(self.space, self.topic, self.type, record, death.attempts)
        except CodecError:
            message = undecoded(self.topic, record, death.attempts)
        return DeadLetter(
            message=message, reason=death.reason, died_at=death.at, is_replayed=is_replayed, name=name
        )

    async def replay(self, name: str) -> bool:
        """
        Publish a dead letter again, for this group alone; return whether there was one.

        It is no dead letter any more once it is acknowledged. One whose copy is there already is left alone.
        Who still handles an earlier copy, which was trimmed, can not acknowledge it any more.

        Round trips:
            Two.
        """
        key, note = self.keys.dead_letter(self.name, name), self.keys.replay(self.name, name)
        while True:
            dead, noted = await read_many(self.space.backend, [key, note])
            if dead is None:
                return False
            earlier_name = noted.value.decode(errors="replace") if noted else "none"
            earlier = self.keys.message(earlier_name)
            claim = KeyRange.one(self.keys.claim(self.name, earlier_name))
            how, _, value = dead.value.partition(b"\n")
            death = msgspec.json.decode(how, type=Death)
            record = Record(Position(death.revision, name), death.index, value)
            head = msgspec.structs.replace(record.head, group=self.name, dead=name)
            copy = self.space.names.next(self.space.clock.wall())
            change = Change(
                (
                    Put(self.keys.message(copy), pack(head, record.payload)),
                    Put(note, copy.encode()),
                    DeleteRange(claim),
                ),
                (),
                (
                    Compare.modified_at(key, dead.mod_revision),
                    Compare.modified_at(note, noted.mod_revision if noted else 0),
                    Compare.absent(earlier),
                ),
                (Range(KeyRange.one(earlier), keys_only=True),),
            )
            outcome = await commit(self.space.sessions, self.space.keys, fit(change))
            # Refused: its copy is there still, or somebody has changed something since.
            if not isinstance(outcome, Refused) or found_in(outcome.reads[0]):
                return True


def message_of(space: Space, topic: str, type: Any, record: Record, attempt: int) -> Message[Any]:  # noqa: A002
    """
    Turn a record into what a reader gets.

    Raises:
        CodecError: it is no message, or its payload is none of `type`.
    """
    return Message(payload=decoded(space, type, record), **_about(topic, record.head, record, attempt))


def undecoded(topic: str, record: Record, attempt: int) -> Message[bytes]:
    """Turn a record that does not decode into something to look at."""
    try:
        head = record.head
    except CodecError:
        head = Head("", 0.0, Delivery.AT_LEAST_ONCE)
        return Message(payload=record.value, **_about(topic, head, record, attempt))
    return Message(payload=record.payload, **_about(topic, head, record, attempt))


def decoded(space: Space, type: Any, record: Record) -> Any:  # noqa: A002
    """
    Decode a payload.

    Raises:
        CodecError: it is none of `type`.
    """
    if type is bytes or (record.head.raw and type is Any):
        return record.payload
    try:
        return space.codec.decode(record.payload, type)
    except ValueError as error:
        name = getattr(type, "__name__", type)
        msg = f"the payload of message {record.name!r} is no {name}: {error}"
        raise CodecError(msg, record.name, record.position.revision) from error


def _about(topic: str, head: Head, record: Record, attempt: int) -> dict[str, Any]:
    try:
        delivery = Delivery(head.mode)
    except ValueError as error:
        msg = f"message {record.name!r} has an unknown delivery mode: {head.mode!r}"
        raise CodecError(msg, record.name, record.position.revision) from error
    return {
        "topic": topic,
        "publisher_id": head.node,
        "published_at": head.at,
        "message_id": head.id or head.dead or record.name,
        "revision": record.position.revision,
        "index": record.index,
        "delivery": delivery,
        "attempt": attempt,
    }
