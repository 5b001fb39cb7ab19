"""
The two verbs of a gRPC connection, on bytes: everything above speaks to any transport through these.

A transport's own exceptions and status objects end here; what passes is a `ChannelError` with neutral facts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from etcd_infra._backends.status import StatusCode

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

Metadata: TypeAlias = tuple[tuple[str, str], ...]


class ChannelError(Exception):
    """
    A call ended without a usable answer.

    Attributes:
        code: The gRPC status code; OK for a stream that the server ended without complaint.
        details: The status text, as it came.
        never_sent: The server has certainly not handled the request, and never will.
    """

    def __init__(self, code: int, details: str, *, never_sent: bool = False) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details
        self.never_sent = never_sent

    def __str__(self) -> str:
        return f"status {int(self.code)}: {self.details}"

    @property
    def blames_endpoint(self) -> bool:
        """Whether another member might well have answered."""
        return self.never_sent or self.code in _ENDPOINT_FAILURES


# etcd: every other code is the answer of a member that lives and has a leader.
_ENDPOINT_FAILURES = frozenset(
    {
        StatusCode.OK,
        StatusCode.CANCELLED,
        StatusCode.UNKNOWN,
        StatusCode.DEADLINE_EXCEEDED,
        StatusCode.UNIMPLEMENTED,
        StatusCode.INTERNAL,
        StatusCode.UNAVAILABLE,
        StatusCode.DATA_LOSS,
    }
)


class ByteStream(ABC):
    """An open call in both directions."""

    @abstractmethod
    def send(self, message: bytes) -> None:
        """Hand a message over to be sent in order; never waits, so keep them few and small."""

    @abstractmethod
    async def receive(self) -> bytes:
        """
        Wait for the next message.

        Raises:
            ChannelError: the stream is over, for whatever reason; messages before its end were delivered.

        Cancellation:
            Nothing is lost; call again.
        """


class Channel(ABC):
    """
    A connection to one endpoint, made when it is first used and again whenever it broke.

    Every verb raises `ForkedError` in a process that was forked after the channel was made.

    Attributes:
        renews_access: A new stream may be let in where an older one was denied.
    """

    renews_access: ClassVar[bool] = False

    @abstractmethod
    async def unary(
        self, method: str, request: bytes, /, *, time_limit: float, metadata: Metadata = ()
    ) -> bytes:
        """
        Send one message, and no more; wait for the one answer and the status.

        It works on a streaming method too, which then sees a stream of one message.

        Args:
            method: The full path, "/package.Service/Method".
            request: The message.
            time_limit: Seconds; the server is told too.
            metadata: Headers, in lower case.

        Raises:
            ChannelError: there was no answer, or it was an error.

        Cancellation:
            The call is cancelled on the wire; the request may have been handled.
        """

    @abstractmethod
    def stream(self, method: str, /, *, metadata: Metadata = ()) -> AbstractAsyncContextManager[ByteStream]:
        """Open a call in both directions; leaving the block cancels it on the wire."""

    @abstractmethod
    async def aclose(self) -> None:
        """Cancel every call and leave nothing behind; safe to repeat, works in a cancelled scope."""
