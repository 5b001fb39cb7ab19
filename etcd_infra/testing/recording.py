"""A backend that remembers what it was asked: for counting round trips."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from etcd_infra._etcd.calls import Call
from etcd_infra._etcd.wrapping import Wrapping

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from etcd_infra._etcd.backend import Backend

T = TypeVar("T")


class RecordingBackend(Wrapping):
    """
    Wraps a backend; `calls` lists every call in the order of their being sent.

    ``recording.verbs()`` names their verbs; ``recording.calls.clear()`` starts anew. A call that is still
    on its way is listed without an error and with a duration of 0.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.calls: list[Call] = []

    def verbs(self) -> list[str]:
        """Name the verbs of `calls`."""
        return [call.verb for call in self.calls]

    async def around(self, verb: str, request: object, call: Callable[[], Awaitable[T]]) -> T:
        """See `Wrapping`."""
        began = trio.current_time()
        sent = Call(verb, request, 0.0)
        self.calls.append(sent)
        error: type[BaseException] | None = None
        try:
            return await call()
        except BaseException as raised:
            error = type(raised)
            raise
        finally:
            for index in reversed(range(len(self.calls))):
                if self.calls[index] is sent:
                    self.calls[index] = Call(verb, request, trio.current_time() - began, error)
                    break
