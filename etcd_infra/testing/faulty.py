"""
A backend whose answers and requests get lost: on demand, or by chance.

Each directed verb strikes one call: the next one that `only` lets through. With a source of randomness
every call may be struck besides. A write that was struck raises `OutcomeUnknownError`, as it would over a
network; a read `UnavailableError`.
"""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import trio

from etcd_infra._etcd.model import Txn
from etcd_infra._etcd.wrapping import Wrapping
from etcd_infra.errors import EtcdError, OutcomeUnknownError, UnavailableError
from etcd_infra.testing.fault_rates import FaultOfCall, FaultRates, cut_by_chance

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from random import Random

    from etcd_infra._etcd.backend import Backend, WatchStream
    from etcd_infra._etcd.model import KeyRange

T = TypeVar("T")


class FaultyBackend(Wrapping):
    """
    Wraps a backend and loses, delays or applies late what it is told to, or what chance decides.

    Args:
        inner: The backend.
        random: Decides by chance; None: only what is demanded happens. The same seed and the same calls
        meet the
            same faults.
        rates: How likely each fault is; only with `random`.

    Attributes:
        only: Which calls a fault on demand may strike, by verb and request; at first those that write.
        struck: How many faults have struck.

    Raises:
        ValueError: rates without a source of randomness.
    """

    def __init__(self, inner: Backend, random: Random | None = None, rates: FaultRates | None = None) -> None:
        super().__init__(inner)
        if rates is not None and random is None:
            raise ValueError("rates need a source of randomness")
        self._random = random
        self._rates = rates or FaultRates()
        self.only: Callable[[str, object], bool] = _writes
        self.struck = 0
        self._faults: deque[tuple[FaultOfCall, float]] = deque()

    def lose_next_answer(self) -> None:
        """Apply the next call, but lose its answer."""
        self._faults.append((FaultOfCall.LOSE_ANSWER, 0.0))

    def lose_next_request(self) -> None:
        """Lose the next call on its way; the caller can not tell that from a lost answer."""
        self._faults.append((FaultOfCall.LOSE_REQUEST, 0.0))

    def refuse_next(self) -> None:
        """Refuse the next call before it is sent: `UnavailableError`."""
        self._faults.append((FaultOfCall.REFUSE, 0.0))

    def delay_next(self, seconds: float) -> None:
        """Deliver the next call `seconds` late."""
        self._faults.append((FaultOfCall.DELAY, seconds))

    def delay_next_answer(self, seconds: float) -> None:
        """Apply the next call at once, and deliver its answer `seconds` late."""
        self._faults.append((FaultOfCall.DELAY_ANSWER, seconds))

    def apply_next_late(self, seconds: float) -> None:
        """Lose the next call's answer at once, and apply it `seconds` later."""
        self._faults.append((FaultOfCall.APPLY_LATE, seconds))

    def forget_faults(self) -> None:
        """Withdraw what has not struck yet."""
        self._faults.clear()

    def stop(self) -> None:
        """Strike no more: neither by chance nor what was demanded and has not struck yet."""
        self._random = None
        self.forget_faults()

    async def around(self, verb: str, request: object, call: Callable[[], Awaitable[T]]) -> T:  # noqa: C901 - a table
        """See `Wrapping`."""
        if self._faults and self.only(verb, request):
            fault, seconds = self._faults.popleft()
        elif (
            self._random is not None
            and verb != "watch"
            and (drawn := self._rates.draw(self._random)) is not None
        ):
            fault, seconds = drawn
        else:
            return await call()
        self.struck += 1
        match fault:
            case FaultOfCall.DELAY:
                await trio.sleep(seconds)
                return await call()
            case FaultOfCall.DELAY_ANSWER:
                try:
                    return await call()
                finally:
                    await trio.sleep(seconds)  # a refusal takes as long
            case FaultOfCall.DUPLICATE:
                trio.lowlevel.spawn_system_task(_apply_late, call, seconds)
                return await call()
            case FaultOfCall.LOSE_ANSWER:
                with suppress(EtcdError):  # a refusal is an answer, too
                    await call()
            case FaultOfCall.APPLY_LATE:
                # The request is in the network: it outlives whoever sent it, so no nursery can own it.
                trio.lowlevel.spawn_system_task(_apply_late, call, seconds)
                await trio.lowlevel.checkpoint()
            case _:
                await trio.lowlevel.checkpoint()
        if fault is FaultOfCall.REFUSE or not _writes(verb, request):
            msg = f"{verb} failed on demand"
            raise UnavailableError(msg)
        keys = request.written_keys if isinstance(request, Txn) else ()
        raise OutcomeUnknownError(f"{verb}: lost on demand", keys)

    @asynccontextmanager
    async def watch(  # noqa: PLR0913
        self,
        range: KeyRange,  # noqa: A002
        /,
        *,
        start_revision: int = 0,
        prev_kv: bool = False,
        no_put: bool = False,
        no_delete: bool = False,
        progress_notify: bool = False,
        coordination: bool = False,
    ) -> AsyncGenerator[WatchStream]:
        """See `Backend`; it breaks now and then, and is made anew."""

        def opening(revision: int | None) -> AbstractAsyncContextManager[WatchStream]:
            again = 0 if coordination else revision
            return super(FaultyBackend, self).watch(
                range,
                start_revision=start_revision if revision is None else again or 0,
                prev_kv=prev_kv,
                no_put=no_put,
                no_delete=no_delete,
                progress_notify=progress_notify,
                coordination=coordination,
            )

        watching = opening(None) if self._random is None else cut_by_chance(opening, self._cuts, start_revision)
        async with watching as stream:
            yield stream

    def _cuts(self) -> bool:
        return self._random is not None and self._random.random() < self._rates.cut_stream


async def _apply_late(call: Callable[[], Awaitable[object]], seconds: float) -> None:
    await trio.sleep(seconds)
    # A copy that is on its way when the backend is closed never arrives.
    with suppress(EtcdError, trio.ClosedResourceError):
        await call()


def _writes(verb: str, request: object) -> bool:
    if isinstance(request, Txn):
        return not request.is_read_only
    return verb in {"lease_grant", "lease_revoke", "compact"}
