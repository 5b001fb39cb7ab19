"""One frozen record per call, to an observer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

import trio

from etcd_infra._etcd.calls import Call, Observer
from etcd_infra._etcd.wrapping import Wrapping

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from etcd_infra._etcd.backend import Backend

T = TypeVar("T")
logger = logging.getLogger("etcd_infra.calls")


class Observed(Wrapping):
    """A backend that tells `observer` of each call after it ended."""

    def __init__(self, inner: Backend, observer: Observer) -> None:
        super().__init__(inner)
        self._observer = observer

    async def around(self, verb: str, request: object, call: Callable[[], Awaitable[T]]) -> T:
        """See `Wrapping`."""
        began = trio.current_time()
        error: type[BaseException] | None = None
        try:
            return await call()
        except BaseException as raised:
            error = type(raised)
            raise
        finally:
            self._tell(Call(verb, request, trio.current_time() - began, error))

    def _tell(self, call: Call) -> None:
        try:
            self._observer(call)
        except Exception:
            logger.exception("the observer failed on %s", call.verb)
