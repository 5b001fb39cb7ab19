"""
One message in the hands of one consumer: acknowledged once, or given back, or taken away.

Ordered and work-sharing groups differ in what gives a consumer the right to a message (`Custody`) and in what
is written (`Desk`); when a handler is cancelled, and what becomes of its message then, is the same.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from typing import TYPE_CHECKING, Protocol

import trio

from etcd_infra._etcd.model import DeleteRange, KeyRange, Put
from etcd_infra._primitives._reads import Reads
from etcd_infra._primitives._run import End, Transaction
from etcd_infra.errors import (
    AckTimeoutError,
    ConflictError,
    EtcdInfraError,
    FencedError,
    LostError,
    NotHeldError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from types import TracebackType

    from etcd_infra._etcd.model import Compare, Op
    from etcd_infra._primitives._envelope import Record
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.fence import Fence

MessageTransaction = Transaction
"""What the body of `GroupMessage.transaction` is given."""


class Ending(Enum):
    """How a handling ended."""

    ACKNOWLEDGED = auto()
    GIVEN_BACK = auto()
    EXPIRED = auto()
    LOST = auto()
    ABANDONED = auto()


class Custody(Protocol):
    """What gives a consumer the right to a message, for as long as it is held."""

    fence: Fence

    def tied(self) -> AbstractContextManager[None]:
        """Open a cancel scope that ends with it."""
        ...

    def is_held(self) -> bool:
        """Whether it is held, by what this process knows."""
        ...

    def loss(self) -> LostError:
        """Say why it is held no more."""
        ...


@dataclass(frozen=True, slots=True)
class Effects:
    """What is to be applied with an acknowledgement, and under which conditions; `keys`: its state keys."""

    ops: tuple[Op, ...] = ()
    keys: tuple[bytes, ...] = ()
    conditions: tuple[Compare, ...] = ()


class Desk(Protocol):
    """Where a group's messages are given out and taken back."""

    async def acknowledge(self, handling: Handling, effects: Effects) -> bool:
        """Write that a message was handled; False: a condition of the effects does not hold."""
        ...

    async def give_back(self, handling: Handling, delay: float, reason: str, *, counts: bool) -> None:
        """Have a message delivered again, or bury it if it was tried often enough."""
        ...

    async def abandon(self, handling: Handling) -> None:
        """Let go of a message whose handler was cancelled, in two seconds at most."""
        ...

    def handler_left(self) -> None:
        """Hear that a handler's scope has ended, in whatever way."""
        ...


class Handling:
    """
    One delivery.

    Attributes:
        ending: How it ended; None: it has not.
        ended: Set when it has.
        in_scope: Whether a handler runs that is cancelled in time.
    """

    def __init__(  # noqa: PLR0913
        self, desk: Desk, space: Space, custody: Custody, record: Record, *, attempt: int, until: float
    ) -> None:
        self.custody = custody
        self.record = record
        self.attempt = attempt
        self.until = until
        self.ending: Ending | None = None
        self.ended = trio.Event()
        self._left = trio.Event()
        self._deadline = trio.CancelScope(deadline=until)
        self.in_scope = False
        self._desk = desk
        self._space = space
        self._scopes: list[AbstractAsyncContextManager[None]] = []
        self._conflicted = False

    def end(self, how: Ending) -> None:
        """Note how it ended; only the first time counts."""
        if self.ending is None:
            self.ending = how
            self.ended.set()
            if how is not Ending.EXPIRED:
                self._deadline.deadline = inf

    async def wait_left(self) -> None:
        """Wait until no handler runs."""
        if self.in_scope:
            await self._left.wait()

    # ── what a handler may do ───────────────────────────────────────────────────────────────────

    async def acknowledge(self) -> None:
        """See `GroupMessage.ack`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.ending is not Ending.ACKNOWLEDGED:
            await self._settle(Effects())

    async def give_back(self, delay: float) -> None:
        """See `GroupMessage.nack`."""
        if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay < inf:  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"a delay must be a number of seconds, at least 0, not {delay!r}"
            raise ValueError(msg)
        self._check_open()
        self.end(Ending.GIVEN_BACK)
        await self._desk.give_back(self, delay, "", counts=True)
        await trio.lowlevel.checkpoint_if_cancelled()

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Transaction]:
        """See `GroupMessage.transaction`."""
        run = Transaction(self._space, Reads(self._space.backend, one_snapshot=True))

        async def commit() -> None:
            await self._settle(_effects(run))

        if self.ending is not None:
            self._check_open()
        async with self._scope(commit):
            with run.open():
                yield run
            if run.end is not End.RETURNED:
                raise self._conflict()

    async def enter(self) -> None:
        """Begin the scope of ``async with message``."""
        scope = self._scope(self.acknowledge)
        await scope.__aenter__()
        self._scopes.append(scope)

    async def leave(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """End it."""
        return await self._scopes.pop().__aexit__(kind, error, trace)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _check_open(self) -> None:
        if self.ending is Ending.LOST or (self.ending is None and not self.custody.is_held()):
            self.end(Ending.LOST)
            raise self.custody.loss()
        if self.ending is not None:
            msg = f"message {self.record.name!r} is not to be handled any more: {self.ending.name.lower()}"
            raise NotHeldError(msg)

    async def _settle(self, effects: Effects) -> None:
        self._check_open()
        try:
            applied = await self._desk.acknowledge(self, effects)
        except FencedError as error:
            self.end(Ending.LOST)
            raise self.custody.loss() from error
        if not applied:
            raise self._conflict()
        self.end(Ending.ACKNOWLEDGED)

    def _conflict(self) -> ConflictError:
        self._conflicted = True
        return ConflictError("what the handler has read was changed meanwhile; nothing was written")

    @asynccontextmanager
    async def _scope(self, acknowledge: Callable[[], Awaitable[None]]) -> AsyncGenerator[None]:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.ending is Ending.ACKNOWLEDGED:  # published at most once: nobody else gets it
            yield
            return
        self._check_open()
        self.in_scope = True
        try:
            with self.custody.tied(), self._deadline:
                yield
                if self.ending is None:
                    await acknowledge()
        except Exception as error:
            await self._failed(error)
            raise
        except BaseException:
            if self.ending is None:
                self.end(Ending.ABANDONED)
                await self._desk.abandon(self)
            raise
        finally:
            self.in_scope = False
            self._left.set()
            self._desk.handler_left()
        await self._cut_short()

    async def _failed(self, error: Exception) -> None:
        if self.ending is Ending.LOST or not self.custody.is_held():
            self.end(Ending.LOST)
            if not isinstance(error, LostError):
                error.add_note(f"and the message was taken away: {self.custody.loss()}")
            return
        if self.ending is not None:
            return
        self.end(Ending.GIVEN_BACK)
        try:
            counts = not self._conflicted
            await self._desk.give_back(self, 0.0, type(error).__name__, counts=counts)
        except EtcdInfraError as problem:
            error.add_note(f"and giving the message back failed: {problem}")

    async def _cut_short(self) -> None:
        """Say why the body was cancelled, if it was."""
        if self.ending is Ending.LOST or (self.ending is None and not self.custody.is_held()):
            self.end(Ending.LOST)
            raise self.custody.loss()
        if self.ending is None:
            await self.expire()
            msg = f"message {self.record.name!r} was not acknowledged in time (attempt {self.attempt})"
            raise AckTimeoutError(msg)

    async def expire(self) -> None:
        """End it because its time is over: it is delivered again."""
        self.end(Ending.EXPIRED)
        await self._desk.give_back(self, 0.0, AckTimeoutError.__name__, counts=True)


def _effects(run: Transaction) -> Effects:
    """Turn what a body has read and written into a part of the Txn that acknowledges."""
    written = tuple(run.writes)
    ops = tuple(
        DeleteRange(KeyRange.one(key)) if value is None else Put(key, value)
        for key, value in run.writes.items()
    )
    conditions = (*run.reads.conditions(), *run.reads.unwritten_since(written))
    return Effects((*ops, *run.publications), written, conditions)
