"""How often `FaultyBackend` strikes by itself, and a watch that is cut by chance."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.backend import WatchStream
from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import WatchBatch
from etcd_infra.errors import EtcdError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager
    from random import Random


class FaultOfCall(Enum):
    """What happens to one call."""

    LOSE_REQUEST = auto()
    LOSE_ANSWER = auto()
    DELAY = auto()
    DELAY_ANSWER = auto()
    APPLY_LATE = auto()
    DUPLICATE = auto()
    REFUSE = auto()


@dataclass(frozen=True, slots=True)
class FaultRates:
    """
    How likely each fault is, per call (or, for `cut_stream`, per batch of a watch).

    Attributes:
        lost_request: The call never arrives.
        lost_answer: The call is applied, its answer is lost.
        delay: The call, or its answer, is up to `longest_delay` late.
        late: The caller has no answer; the call is applied up to `latest` later.
        duplicate: The call is applied, and a copy of it up to `latest` later.
        cut_stream: A watch's connection breaks; it is made anew.
        longest_delay: Seconds.
        latest: Seconds.
    """

    lost_request: float = 0.02
    lost_answer: float = 0.02
    delay: float = 0.05
    late: float = 0.02
    duplicate: float = 0.02
    cut_stream: float = 0.02
    longest_delay: float = 2.0
    latest: float = 30.0

    def __post_init__(self) -> None:
        rates = (self.lost_request, self.lost_answer, self.delay, self.late, self.duplicate)
        if any(not 0 <= rate <= 1 for rate in (*rates, self.cut_stream, sum(rates))):
            raise ValueError(
                f"rates must be between 0 and 1, and those of calls must not exceed 1 together: {self}"
            )
        if self.longest_delay < 0 or self.latest < 0:
            raise ValueError(f"delays must not be negative: {self}")

    def draw(self, random: Random) -> tuple[FaultOfCall, float] | None:
        """Draw what happens to one call, and how many seconds it takes; None: nothing."""
        drawn = random.random()
        for rate, fault, longest in (
            (self.lost_request, FaultOfCall.LOSE_REQUEST, 0.0),
            (self.lost_answer, FaultOfCall.LOSE_ANSWER, 0.0),
            (self.delay / 2, FaultOfCall.DELAY, self.longest_delay),
            (self.delay / 2, FaultOfCall.DELAY_ANSWER, self.longest_delay),
            (self.late, FaultOfCall.APPLY_LATE, self.latest),
            (self.duplicate, FaultOfCall.DUPLICATE, self.latest),
        ):
            if drawn < rate:
                return fault, random.uniform(0, longest)
            drawn -= rate
        return None


class _Relayed(WatchStream):
    """A watch that somebody else receives."""

    def __init__(
        self, batches: trio.MemoryReceiveChannel[WatchBatch | EtcdError], created_revision: int
    ) -> None:
        self.created_revision = created_revision
        self._batches = batches
        self._failure: EtcdError | None = None

    async def receive(self) -> WatchBatch:
        if self._failure is not None:
            raise self._failure
        batch = await self._batches.receive()
        if isinstance(batch, EtcdError):
            self._failure = batch
            raise batch
        if batch.created:
            self.created_revision = batch.revision
        return batch


@asynccontextmanager
async def cut_by_chance(
    opening: Callable[[int | None], AbstractAsyncContextManager[WatchStream]],
    cut: Callable[[], bool],
    start_revision: int,
) -> AsyncGenerator[WatchStream]:
    """
    Open a watch whose connection breaks now and then.

    Args:
        opening: Opens it: for the first time (None), and then at a revision.
        cut: Draws after each batch whether it breaks.
        start_revision: Where it begins; 0: from now.
    """
    send, receive = trio.open_memory_channel[WatchBatch | EtcdError](0)
    opened = trio.Event()
    first: list[int | EtcdError] = []

    async def relay() -> None:
        next_revision: int | None = None
        try:
            while True:
                async with opening(next_revision) as stream:
                    if opened.is_set():
                        await send.send(WatchBatch(stream.created_revision, created=True))
                    else:
                        first.append(stream.created_revision)
                        opened.set()
                        next_revision = start_revision or stream.created_revision + 1
                    next_revision = await _relay_until_cut(stream, send, cut, next_revision or 0)
        except EtcdError as error:
            if opened.is_set():
                await send.send(error)
            else:
                first.append(error)
                opened.set()

    async with open_background() as background:
        background.start_soon(relay)
        await opened.wait()
        if isinstance(first[0], EtcdError):
            raise first[0]
        yield _Relayed(receive, first[0])


async def _relay_until_cut(
    stream: WatchStream,
    send: trio.MemorySendChannel[WatchBatch | EtcdError],
    cut: Callable[[], bool],
    next_revision: int,
) -> int:
    """Pass batches on; return the revision at which to go on."""
    while True:
        batch = await stream.receive()
        await send.send(batch)
        next_revision = max(next_revision, batch.revision + 1) if not batch.created else next_revision
        if cut():
            return next_revision
