"""
Publishing as an operation of a transaction: a change of state and the event that tells of it, in one commit.

Keys
    ``{ns}topic/{topic}/message/{name}``  the message; names grow in the order of the operations.
    ``{ns}topic/{topic}/id/{id}``         the name of the message that was published under an id.

Algorithm
    ``put message``; with an id ``[no marker of the id] → [put message, put marker] else [marker]``, nested, so
    that an id that is known already drops this message and nothing else.

Guarantees
    What is published is seen at the revision at which the rest was written, or not at all. One message per id
    as long as its marker is there: until the message is trimmed.

Source
    The outbox pattern (C. Richardson, "Microservices Patterns", 2018), without the relay: here both are keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from etcd_infra._etcd.keys import encode_segment
from etcd_infra._etcd.model import Compare, KeyRange, Put, Range, Txn
from etcd_infra._primitives._budget import MAX_REQUEST_BYTES
from etcd_infra._primitives._envelope import Head, pack
from etcd_infra._primitives.message import Delivery
from etcd_infra._primitives.operations import BY_US, Content, Operation, Step
from etcd_infra.errors import InvalidRequestError

if TYPE_CHECKING:
    from etcd_infra._etcd.model import Op
    from etcd_infra._primitives._space import Space

MAX_MESSAGE_BYTES: Final = MAX_REQUEST_BYTES - 8 * 1024
"""Less than etcd takes, or a message could be published and never become a dead letter."""


@dataclass(frozen=True, slots=True)
class Publish(Operation):
    """
    Publish a message: `key` is the topic's name.

    Attributes:
        payload: Of the topic's type; bytes are stored as they are.
        delivery: See `Delivery`.
        message_id: If it was published before, and was not trimmed yet, this message is dropped: the result's
            `success` is False.
    """

    payload: Any
    delivery: Delivery = field(default=Delivery.AT_LEAST_ONCE, kw_only=True)
    message_id: str | None = field(default=None, kw_only=True)
    is_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # Through the class's own setter: it is frozen.
        object.__setattr__(self, "delivery", Delivery(self.delivery))
        if self.message_id is not None:
            encode_segment(self.message_id)

    def target(self, space: Space) -> bytes:
        """Return the key of a new message."""
        return space.keys.topic(self.key).message(space.names.next(space.clock.wall()))

    def encode(self, space: Space) -> bytes:
        """See `Operation`."""
        head = Head(
            space.node_id,
            space.clock.wall(),
            self.delivery,
            id=self.message_id or "",
            raw=isinstance(self.payload, bytes),
        )
        value = pack(head, space.encode(self.payload))
        if len(value) > MAX_MESSAGE_BYTES:
            msg = f"a message has at most {MAX_MESSAGE_BYTES} bytes, not {len(value)}"
            raise InvalidRequestError(msg)
        return value

    def apply(self, before: Content | None, encoded: bytes, space: Space) -> Step:
        """See `Operation`."""
        del before, space
        return Step(Content(encoded, version=BY_US), self.payload, None if self.message_id else True)

    def write(self, target: bytes, content: Content, space: Space) -> Op:
        """See `Operation`."""
        assert content.value is not None
        put = Put(target, content.value)
        if self.message_id is None:
            return put
        marker = space.keys.topic(self.key).marker(self.message_id)
        name = target.rpartition(b"/")[2]
        return Txn((Compare.absent(marker),), (put, Put(marker, name)), (Range(KeyRange.one(marker)),))

    def render(self, space: Space) -> Op:
        """
        Return what publishes it, once.

        Raises:
            TypeError, ValueError: the topic's name, the id or the payload is no good.
        """
        target = self.target(space)
        return self.write(target, Content(self.encode(space)), space)
