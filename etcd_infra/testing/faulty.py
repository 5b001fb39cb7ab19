"""
A backend whose answers and requests get lost on demand.

Each directed verb strikes one call: the next one that `only` lets through. A write that struck raises
`OutcomeUnknownError`, as it would over a network; a read `UnavailableError`.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeVar

import trio

from etcd_infra._etcd.model import Txn
from etcd_infra._etcd.wrapping import Wrapping
from etcd_infra.errors import EtcdError, OutcomeUnknownError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from etcd_infra._etcd.backend import Backend

T = TypeVar("T")


class _Fault(Enum):
    LOSE_REQUEST = auto()
    LOSE_ANSWER = auto()
    DELAY = auto()
    DELAY_ANSWER = auto()
    APPLY_LATE = auto()
    REFUSE = auto()


class FaultyBackend(Wrapping):
    """
    Wraps a backend and loses, delays or applies late what it is told to.

    Attributes:
        only: Which calls a fault may strike, by verb and request; at first those that write.
        struck: How many faults have struck.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.only: Callable[[str, object], bool] = _writes
        self.struck = 0
        self._faults: deque[tuple[_Fault, float]] = deque()

    def lose_next_answer(self) -> None:
        """Apply the next call, but lose its answer."""
        self._faults.append((_Fault.LOSE_ANSWER, 0.0))

    def lose_next_request(self) -> None:
        """Lose the next call on its way; the caller can not tell that from a lost answer."""
        self._faults.append((_Fault.LOSE_REQUEST, 0.0))

    def refuse_next(self) -> None:
        """Refuse the next call before it is sent: `UnavailableError`."""
        self._faults.append((_Fault.REFUSE, 0.0))

    def delay_next(self, seconds: float) -> None:
        """Deliver the next call `seconds` late."""
        self._faults.append((_Fault.DELAY, seconds))

    def delay_next_answer(self, seconds: float) -> None:
        """Apply the next call at once, and deliver its answer `seconds` late."""
        self._faults.append((_Fault.DELAY_ANSWER, seconds))

    def apply_next_late(self, seconds: float) -> None:
        """Lose the next call's answer at once, and apply it `seconds` later."""
        self._faults.append((_Fault.APPLY_LATE, seconds))

    def forget_faults(self) -> None:
        """Withdraw what has not struck yet."""
        self._faults.clear()

    async def around(self, verb: str, request: object, call: Callable[[], Awaitable[T]]) -> T:
        """See `Wrapping`."""
        if not self._faults or not self.only(verb, request):
            return await call()
        fault, seconds = self._faults.popleft()
        self.struck += 1
        match fault:
            case _Fault.DELAY:
                await trio.sleep(seconds)
                return await call()
            case _Fault.DELAY_ANSWER:
                try:
                    return await call()
                finally:
                    await trio.sleep(seconds)  # a refusal takes as long
            case _Fault.LOSE_ANSWER:
                await call()
            case _Fault.APPLY_LATE:
                # The request is in the network: it outlives whoever sent it, so no nursery can own it.
                trio.lowlevel.spawn_system_task(_apply_late, call, seconds)
                await trio.lowlevel.checkpoint()
            case _:
                await trio.lowlevel.checkpoint()
        if fault is _Fault.REFUSE or not _writes(verb, request):
            msg = f"{verb} failed on demand"
            raise UnavailableError(msg)
        keys = request.written_keys if isinstance(request, Txn) else ()
        raise OutcomeUnknownError(f"{verb}: lost on demand", keys)


async def _apply_late(call: Callable[[], Awaitable[object]], seconds: float) -> None:
    await trio.sleep(seconds)
    with suppress(EtcdError):
        await call()


def _writes(verb: str, request: object) -> bool:
    if isinstance(request, Txn):
        return not request.is_read_only
    return verb in {"lease_grant", "lease_revoke", "compact"}
