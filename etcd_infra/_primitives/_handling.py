"""
One message in the hands of one consumer: acknowledged once, or given back, or taken away.

Ordered and work-sharing groups differ in what gives a consumer the right to a message (`Custody`) and in what
is written (`Desk`); when a handler is cancelled, and what becomes of its message then, is the same.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager, contextmanager
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
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from types import TracebackType

    from etcd_infra._etcd.model import Compare, Op
    from etcd_infra._primitives._envelope import Record
    from etcd_infra._primitives._space import Space
    from etcd_infra._primitives.fence import Fence

logger = logging.getLogger("etcd_infra.topic")


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

    def lost(self, handling: Handling) -> None:
        """Take in that a message was taken away."""
        ...


class Handling:
    """
    One delivery.

    Attributes:
        ending: How it ended; None: it has not.
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
        self._news = trio.Event()
        self._writes = 0
        self._deadline = trio.CancelScope(deadline=until)
        self.in_scope = False
        self._desk = desk
        self._space = space
        self._scopes: list[AbstractAsyncContextManager[None]] = []
        self._conflicted = False

    @property
    def is_by_hand(self) -> bool:
        """Whether it is open, no scope of the handler's ends it in time, and nothing is written for it now."""
        return self.ending is None and not self.in_scope and not self._writes

    def end(self, how: Ending) -> None:
        """Note how it ended; only the first time counts, unless it turns out that it is acknowledged."""
        if self.ending is None or how is Ending.ACKNOWLEDGED:
            self.ending = how
            if how is not Ending.EXPIRED:
                self._deadline.deadline = inf
            if how is Ending.LOST:
                self._desk.lost(self)
            self._tell()

    def close(self) -> None:
        """End it because its subscription is closed: a handler that runs is cancelled."""
        self.end(Ending.ABANDONED)
        if self.in_scope and self.ending is Ending.ABANDONED:
            self._deadline.cancel()

    async def wait_settled(self) -> None:
        """Wait until it has ended and nothing is written for it; end it if its time is over."""
        while self.ending is None or self._writes:
            news = self._news
            with trio.move_on_at(self.until if self.is_by_hand else inf):
                await news.wait()
            if self.is_by_hand and self.until <= trio.current_time():
                await self.expire()

    async def wait_left(self) -> None:
        """Wait until no handler runs, and nothing is written for it."""
        while self.in_scope or self._writes:
            await self._news.wait()

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
        if self.in_scope:
            self._deadline.cancel()  # or it would be handled twice at a time
        await self._give_back(Ending.GIVEN_BACK, delay, "", counts=True)
        await trio.lowlevel.checkpoint_if_cancelled()

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Transaction]:
        """See `GroupMessage.transaction`."""
        run = Transaction(self._space, Reads(self._space.backend, one_snapshot=True))

        async def commit() -> None:
            await self._settle(_effects(run))
            self._space.tally.messages_sent += len(run.publications)

        if self.ending is not None:
            self._check_open()
        async with self._scope(commit):
            with run.open():
                yield run
            if run.end is not End.RETURNED:
                raise self._conflict()
            if self.ending is not None and (run.writes or run.publications):
                msg = f"message {self.record.name!r} was settled inside its transaction: nothing was written"
                raise NotHeldError(msg)

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

    def _tell(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()

    @contextmanager
    def _writing(self) -> Generator[None]:
        # Race: the next message must not be begun before what is written for this one is definite.
        self._writes += 1
        try:
            yield
        finally:
            self._writes -= 1
            self._tell()

    async def _give_back(self, how: Ending, delay: float, reason: str, *, counts: bool) -> None:
        with self._writing():
            self.end(how)
            try:
                await self._desk.give_back(self, delay, reason, counts=counts)
            except FencedError as error:
                # It was to become a dead letter, and is not ours any more: somebody else gets it.
                raise self.custody.loss() from error

    async def _settle(self, effects: Effects) -> None:
        self._check_open()
        with self._writing():
            try:
                applied = await self._desk.acknowledge(self, effects)
            except FencedError as error:
                self.end(Ending.LOST)
                raise self.custody.loss() from error
            if applied:
                self.end(Ending.ACKNOWLEDGED)
        if not applied:
            raise self._conflict()

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
            self._tell()
        await self._cut_short()

    async def _failed(self, error: Exception) -> None:
        if self.ending is Ending.LOST or not self.custody.is_held():
            self.end(Ending.LOST)
            if not isinstance(error, LostError):
                error.add_note(f"and the message was taken away: {self.custody.loss()}")
            return
        if self.ending is not None:
            return
        try:
            await self._give_back(Ending.GIVEN_BACK, 0.0, type(error).__name__, counts=not self._conflicted)
        except EtcdInfraError as problem:
            error.add_note(f"and giving the message back failed: {problem}")

    async def _cut_short(self) -> None:
        """Say why the body was cancelled, if it was."""
        if self.ending is Ending.LOST or (self.ending is None and not self.custody.is_held()):
            self.end(Ending.LOST)
            raise self.custody.loss()
        if self.ending is Ending.ABANDONED:
            msg = f"the subscription was closed while message {self.record.name!r} was handled"
            raise NotHeldError(msg)
        if self.ending is None:
            await self.expire()
            msg = f"message {self.record.name!r} was not acknowledged in time (attempt {self.attempt})"
            raise AckTimeoutError(msg)

    async def expire(self) -> None:
        """End it because its time is over: it is delivered again."""
        try:
            await self._give_back(Ending.EXPIRED, 0.0, AckTimeoutError.__name__, counts=True)
        except LostError as error:
            logger.info("message %r was taken away when its time was over: %s", self.record.name, error)


def _effects(run: Transaction) -> Effects:
    """Turn what a body has read and written into a part of the Txn that acknowledges."""
    written = tuple(run.writes)
    ops = tuple(
        DeleteRange(KeyRange.one(key)) if value is None else Put(key, value)
        for key, value in run.writes.items()
    )
    conditions = (*run.reads.conditions(), *run.reads.unwritten_since(written))
    return Effects((*ops, *run.publications), written, conditions)
