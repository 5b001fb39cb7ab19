"""Repeats what was certainly not applied: reads, and writes that never reached a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import trio

from etcd_infra._etcd.wrapping import Wrapping
from etcd_infra._policy.backoff import delay
from etcd_infra.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from random import Random

    from etcd_infra._etcd.backend import Backend

T = TypeVar("T")

PATIENCE_SECONDS: Final = 5.0
TRIED_ONCE: Final = frozenset({"lease_keep_alive", "watch"})


class Retrying(Wrapping):
    """
    A backend that tries again on `UnavailableError`, for up to five seconds, then raises it.

    For a read that is every failure to answer; for a write it means that no server has seen it. An
    `OutcomeUnknownError` passes through: only who wrote the guard knows whether sending again is harmless.
    Keep-alives are tried once, their caller has a pace and a deadline of its own; watches come back by
    themselves.
    """

    def __init__(self, inner: Backend, random: Random) -> None:
        super().__init__(inner)
        self._random = random

    async def around(self, verb: str, request: object, call: Callable[[], Awaitable[T]]) -> T:
        """See `Wrapping`."""
        del request
        give_up_at = trio.current_time() + PATIENCE_SECONDS
        failures = 0
        while True:
            try:
                return await call()
            except UnavailableError:
                pause = delay(failures, self._random.random())
                if verb in TRIED_ONCE or trio.current_time() + pause >= give_up_at:
                    raise
            await trio.sleep(pause)
            failures += 1
