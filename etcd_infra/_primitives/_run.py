"""One run of a function given to `transact`: what it may do, and what came of it."""

from __future__ import annotations

from contextlib import contextmanager
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import trio

from etcd_infra._etcd.model import KeyRange, KeyValue
from etcd_infra._primitives._reads import SnapshotGoneError
from etcd_infra._primitives.message import Delivery
from etcd_infra._primitives.publish import Publish
from etcd_infra.errors import NotHeldError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from etcd_infra._etcd.model import Op
    from etcd_infra._primitives._reads import Reads
    from etcd_infra._primitives._space import Space

T = TypeVar("T")


class End(Enum):
    """How a run ended: with a value, without its snapshot, or with the wish to wait."""

    RETURNED = auto()
    BEGIN_ANEW = auto()
    WAIT = auto()


class Transaction:
    """One run of a function given to `transact`; worthless after it."""

    def __init__(self, space: Space, reads: Reads) -> None:
        self._space = space
        self._scope = trio.CancelScope()
        self._is_open = True
        self.reads = reads
        self.writes: dict[bytes, bytes | None] = {}
        self.publications: list[Op] = []
        self.end = End.RETURNED

    async def perform(self, function: Callable[[Transaction], Awaitable[T]]) -> tuple[T, ...]:
        """Run `function`; return its value, or nothing if the run was given up."""
        with self.open():
            return (await function(self),)
        return ()

    @contextmanager
    def open(self) -> Generator[None]:
        """Let a body use it; `end` says afterwards whether the run was given up."""
        try:
            with self._scope:
                yield
        finally:
            self._is_open = False

    async def get(self, key: str, *, type: Any = Any) -> Any:  # noqa: A002
        """
        Read a key's value, this run's own writes included; None if it is absent.

        Raises:
            CodecError: the value is none of `type`.
            NotHeldError: the run is over.
            EtcdError: as the backend says.

        Cancellation:
            Nothing is left behind.

        Round trips:
            One; none for what this run has read or written, or the run before has read.
        """
        full = self._full(key)
        if full in self.writes:
            await trio.lowlevel.checkpoint()
            kv = self._written(full)
        else:
            kv = await self._unless_gone(lambda: self.reads.key(full))
        return None if kv is None else self._space.decode(kv, type)

    async def list(self, prefix: str, *, type: Any = Any) -> dict[str, Any]:  # noqa: A002
        """
        Read all keys that start with `prefix`, by key, this run's own writes included; at most 100.

        Raises:
            InvalidRequestError: there are more: a commit could not guard them.
            CodecError, NotHeldError, EtcdError: as `get`.

        Cancellation:
            Nothing is left behind.

        Round trips:
            One.
        """
        self._check_open()
        wanted = KeyRange.prefix(self._space.keys.states + prefix.encode())
        found = {kv.key: kv for kv in await self._unless_gone(lambda: self.reads.range(wanted))}
        for full in self.writes:
            if full in wanted:
                found.pop(full, None)
                if (kv := self._written(full)) is not None:
                    found[full] = kv
        return {self._space.name_of(kv): self._space.decode(kv, type) for _, kv in sorted(found.items())}

    def set(self, key: str, value: Any) -> None:
        """
        Give a key a value, at the commit; the key becomes permanent.

        Raises:
            TypeError, ValueError: the value can not be encoded.
            NotHeldError: the run is over.
        """
        self.writes[self._full(key)] = self._space.encode(value)

    def delete(self, key: str) -> None:
        """
        Delete a key, at the commit.

        Raises:
            NotHeldError: the run is over.
        """
        self.writes[self._full(key)] = None

    def publish(
        self,
        topic: str,
        payload: Any,
        *,
        delivery: Delivery = Delivery.AT_LEAST_ONCE,
        message_id: str | None = None,
    ) -> None:
        """
        Publish a message, at the commit: subscribers see it if and when the writes are there.

        Args:
            topic: Its name.
            payload: Of the topic's type.
            delivery: See `Delivery`.
            message_id: As for `Topic.publish`; if it was published before, the rest is committed without it.

        Raises:
            TypeError, ValueError: an argument is no good.
            NotHeldError: the run is over.
        """
        self._check_open()
        publication = Publish(topic, payload, delivery=delivery, message_id=message_id)
        self.publications.append(publication.render(self._space))

    async def retry(self) -> NoReturn:
        """
        Give up this run, wait until something that it has read changes, and run the function again.

        Raises:
            RuntimeError: nothing was read, so nothing can change; or this stands in a shielded scope.
            NotHeldError: the run is over.
        """
        self._check_open()
        if not self.reads.watched():
            msg = "retry() waits for a change of what was read, and nothing was"
            raise RuntimeError(msg)
        await self._give_up(End.WAIT)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    async def _give_up(self, end: End) -> NoReturn:
        # By cancellation, so that the function unwinds as Trio's users expect, nurseries included.
        self.end = end
        self._scope.cancel()
        await trio.lowlevel.checkpoint()
        msg = "a run can not be given up inside a shielded scope"
        raise RuntimeError(msg)

    async def _unless_gone(self, read: Callable[[], Awaitable[T]]) -> T:
        try:
            return await read()
        except SnapshotGoneError:
            await self._give_up(End.BEGIN_ANEW)

    def _written(self, full: bytes) -> KeyValue | None:
        value = self.writes[full]
        return None if value is None else KeyValue(full, value)

    def _full(self, key: str) -> bytes:
        self._check_open()
        return self._space.keys.state(key)

    def _check_open(self) -> None:
        if not self._is_open:
            msg = "this run of the transaction is over"
            raise NotHeldError(msg)
