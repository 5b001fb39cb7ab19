"""A topic as one listener hears it: every message from some place on, for this object alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from etcd_infra._primitives._group import message_of
from etcd_infra._primitives._one_at_a_time import OneAtATime

if TYPE_CHECKING:
    from etcd_infra._primitives._reader import Reader
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.message import Message

T = TypeVar("T")


class Messages(Generic[T]):
    """
    A subscription without a group, to be iterated over by one task.

    A consumer that does not keep up costs no memory: what the process's buffer (4,096 messages, 4 MiB) does not
    hold any more is read from etcd.
    """

    def __init__(self, space: Space, topic: str, type: Any, reader: Reader) -> None:  # noqa: A002
        self._space = space
        self._topic = topic
        self._type = type
        self._reader = reader
        self._one_at_a_time = OneAtATime()

    def __aiter__(self) -> Messages[T]:
        return self

    async def __anext__(self) -> Message[T]:
        """
        Wait for the next message.

        Raises:
            MessagesLostError: some were trimmed unread, or the store was restored; iteration may go on after
            it. CodecError: a message does not decode; the next step goes on after it.
            SessionLostError: the coordinator was closed.
            EtcdError: etcd does not let the topic be read.
            trio.BusyResourceError: another task waits here already; let each have a subscription of its own.

        Cancellation:
            Nothing is lost; call again.

        Round trips:
            None while it keeps up; otherwise one for 32 messages, and to list what is next one for each 1,000
            messages of the topic.
        """
        with self._one_at_a_time:
            while True:
                record = await self._reader.next()
                if not record.head.group:
                    message = message_of(self._space, self._topic, self._type, record, 1)
                    self._space.tally.messages_received += 1
                    return message
