"""Messages as their readers see them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import Self

    from etcd_infra._primitives._handling import Handling
    from etcd_infra._primitives._run import Transaction

T = TypeVar("T")


class Delivery(StrEnum):
    """
    What a publisher promises, and what is stored for it; all three store the message until it is trimmed.

    AT_MOST_ONCE: a group acknowledges it before it is handled: never twice, and lost if its consumer dies.
    AT_LEAST_ONCE: acknowledged after it was handled; delivered again until then, or until it is a dead letter.
    EXACTLY_ONCE: stored and delivered like AT_LEAST_ONCE; asks the handler to use `GroupMessage.transaction`,
    so that what it writes takes effect once.
    """

    AT_MOST_ONCE = "at-most-once"
    AT_LEAST_ONCE = "at-least-once"
    EXACTLY_ONCE = "exactly-once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message(Generic[T]):
    """
    A message.

    Attributes:
        topic: The topic's name.
        payload: Of the topic's type.
        publisher_id: The publisher's node id.
        published_at: Unix seconds by the publisher's clock.
        message_id: What the publisher gave, else a name that no other message of the topic has.
        revision: The store's revision at which it was published.
        index: How many messages of its topic and revision come before it. (revision, index) is the order.
        delivery: As it was published.
        attempt: How often it was delivered to this group, this time included; 1 without a group.
    """

    topic: str
    payload: T
    publisher_id: str
    published_at: float
    message_id: str
    revision: int
    index: int
    delivery: Delivery
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMessage(Message[T]):
    """
    A message that was delivered to a group: to be acknowledged.

    ``async with message:`` cancels its body when the message is taken away or its time is over, acknowledges
    it when the body has succeeded, and has it delivered again when the body has raised.

    Raises (on leaving; if it was being acknowledged just then, it may be acknowledged all the same):
        LockLostError: it was taken away: the session was lost, or somebody deleted the claim. Another consumer
            gets it.
        AckTimeoutError: `ack_after` seconds were over.
        NotHeldError: its subscription was closed meanwhile.
        BaseException: what the body raised, as it is.

    Cancellation:
        Nothing is sent: it is delivered again, and counts as an attempt. While it is acknowledged: acknowledged
        or not, or still to be for a moment.

    Round trips:
        One to acknowledge; none to have it delivered again by an ordered group, one by a work-sharing group.
    """

    handling: Handling = field(repr=False, compare=False)

    async def ack(self) -> None:
        """
        Say that it was handled: it is not delivered to this group again. Harmless if that was said before.

        Raises:
            LockLostError: it was taken away; it is delivered again.
            NotHeldError: it was given back, or its time is over.
            OutcomeUnknownError: the session ended while the answer was missing.
            EtcdError: etcd refuses; it was not acknowledged.

        Cancellation:
            Acknowledged or not, or still to be for a moment.

        Round trips:
            One.
        """
        await self.handling.acknowledge()

    async def nack(self, delay: float = 0.0) -> None:
        """
        Give it back, to be delivered again after `delay` seconds (sooner if this consumer dies meanwhile).

        After `max_retries` of them it becomes a dead letter instead. A body of ``async with message`` that
        still runs is cancelled.

        Raises:
            ValueError: the delay is negative or no number.
            LockLostError, NotHeldError, EtcdError: as `ack`.

        Cancellation:
            It is given back all the same: at once, or when the session ends.

        Round trips:
            None in an ordered group, one in a work-sharing group; one if it becomes a dead letter.
        """
        await self.handling.give_back(delay)

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """
        Handle it so that what is written takes effect exactly once: with the acknowledgement, in one Txn.

        To be entered instead of ``async with message``; otherwise the same. The body reads and writes through
        the `Transaction`; nothing is visible before it is left.

        Raises (on leaving):
            ConflictError: what was read has changed meanwhile; nothing was written. It is delivered again, and
                this does not count as an attempt.
            LockLostError, AckTimeoutError, BaseException: as ``async with message``; nothing was written,
                unless it was being committed just then: then all of it was, or nothing.
            InvalidRequestError: over etcd's budget; nothing was written.
            NotHeldError: it is settled already: by `ack` or `nack`, or because it was published at most once.

        Round trips:
            One for each key or prefix that is read, one to commit.
        """
        return self.handling.transaction()

    async def __aenter__(self) -> Self:
        await self.handling.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self.handling.leave(kind, error, trace)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter(Generic[T]):
    """
    A message that a group has given up.

    Attributes:
        message: The message; its `attempt` says how often it was tried.
        reason: The name of the last attempt's exception; empty if its consumer died, or did not say.
        died_at: Unix seconds by the last consumer's clock.
        is_replayed: It was published again for its group, and is not acknowledged yet.
        name: What `Topic.replay` needs.
    """

    message: Message[T]
    reason: str
    died_at: float
    is_replayed: bool
    name: str
