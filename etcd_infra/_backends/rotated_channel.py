"""A channel that is made anew when the files that it was made of were replaced: rotated certificates."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import trio

from etcd_infra._backends.channel import ByteStream, Channel, ChannelError, Metadata
from etcd_infra._backends.status import StatusCode

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from etcd_infra._etcd.background import Background


class RotatedChannel(Channel):
    """
    Calls begin on the newest channel; an older one is closed when its last call has ended.

    Args:
        make: Makes a channel of what the files hold now; an `OSError` is a failed attempt to connect,
            unless there is an older channel: that one goes on.
        stamp: Returns what is another value once a file was replaced.
        background: Where old channels are closed.
    """

    def __init__(
        self, make: Callable[[], Channel], stamp: Callable[[], object], background: Background
    ) -> None:
        self._make = make
        self._stamp = stamp
        self._background = background
        self._made_of: object = None
        self._newest: Channel | None = None
        self._calls: dict[Channel, int] = {}
        self._closed = False

    async def unary(
        self, method: str, request: bytes, /, *, time_limit: float, metadata: Metadata = ()
    ) -> bytes:
        """Implement `Channel.unary`."""
        with self._used() as channel:
            return await channel.unary(method, request, time_limit=time_limit, metadata=metadata)

    @asynccontextmanager
    async def stream(self, method: str, /, *, metadata: Metadata = ()) -> AsyncGenerator[ByteStream]:
        """Implement `Channel.stream`."""
        with self._used() as channel:
            async with channel.stream(method, metadata=metadata) as stream:
                yield stream

    async def aclose(self) -> None:
        """Implement `Channel.aclose`."""
        self._closed = True
        for channel in tuple(self._calls):
            await channel.aclose()

    @contextmanager
    def _used(self) -> Generator[Channel]:
        channel = self._current()
        self._calls[channel] += 1
        try:
            yield channel
        finally:
            self._calls[channel] -= 1
            if channel is not self._newest:
                self._retire(channel)

    def _current(self) -> Channel:
        if self._closed:
            raise trio.ClosedResourceError("this connection to etcd was closed")
        try:
            stamp = self._stamp()
            if self._newest is None or stamp != self._made_of:
                made = self._make()
                old, self._newest, self._made_of = self._newest, made, stamp
                self._calls[made] = 0
                if old is not None:
                    self._retire(old)
        except OSError as error:
            if self._newest is not None:
                return self._newest  # a rotation is under way: its other files are still to come
            details = f"the certificates can not be read: {error}"
            raise ChannelError(StatusCode.UNAVAILABLE, details, never_sent=True) from error
        return self._newest

    def _retire(self, channel: Channel) -> None:
        if not self._calls[channel] and not self._closed:
            del self._calls[channel]
            self._background.start_soon(channel.aclose)
