"""
A channel on Trio itself: it dials when it is used, and hands each call to a connection that accepts it.

A connection belongs to the backend's background, not to the task that happened to need it first. One that
drains (the server goes away, stream numbers are used up) finishes its calls while the next one is in use.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Any, Final

import trio

from etcd_infra._backends.channel import ByteStream, Channel, ChannelError, Metadata
from etcd_infra._backends.grpc_headers import RequestHeaders
from etcd_infra._backends.home import Home
from etcd_infra._backends.http2_connection import Connection
from etcd_infra._backends.http2_socket import TcpStream
from etcd_infra._backends.status import StatusCode
from etcd_infra._backends.tls import secured

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from etcd_infra._backends.endpoints import Endpoint
    from etcd_infra._backends.tls import TlsConfig
    from etcd_infra._etcd.background import Background

# A server that is down is not dialled again for every caller that comes meanwhile.
_DIAL_PAUSE_SECONDS: Final = 0.1


class Http2Channel(Channel):
    """
    A connection over HTTP/2 to one endpoint, and those before it that still have calls.

    Args:
        endpoint: The member.
        dial_timeout: Seconds for one attempt to connect, the server's greeting included: one that accepts
            and says nothing is known to have got no request.
        background: Where connections are served.
        tls: How to secure connections; None: not at all.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        dial_timeout: float,
        background: Background | trio.Nursery,
        tls: TlsConfig | None = None,
    ) -> None:
        self._home = Home()
        self._endpoint = endpoint
        self._dial_timeout = dial_timeout
        self._background = background
        self._tls = tls
        self._headers = RequestHeaders(str(endpoint), scheme="http" if tls is None else "https")
        self._connection: Connection | None = None
        self._connections: set[Connection] = set()
        self._dial: _Dial | None = None
        self._closed = False

    async def unary(
        self, method: str, request: bytes, /, *, time_limit: float, metadata: Metadata = ()
    ) -> bytes:
        """Implement `Channel.unary`."""
        deadline = trio.current_time() + time_limit
        connection = self._usable() or await self._connect(deadline)
        return await connection.unary(self._headers.block(method, time_limit, metadata), request, deadline)

    @asynccontextmanager
    async def stream(self, method: str, /, *, metadata: Metadata = ()) -> AsyncGenerator[ByteStream]:
        """Implement `Channel.stream`."""
        connection = self._usable() or await self._connect(inf)
        stream = connection.open(self._headers.block(method, None, metadata))
        try:
            yield stream
        finally:
            stream.cancel()

    async def aclose(self) -> None:
        """Implement `Channel.aclose`."""
        if self._closed or not self._home.is_here:
            return
        self._closed = True
        for connection in tuple(self._connections):
            await connection.aclose()
        if self._dial is not None:
            await self._dial.aclose()

    def _usable(self) -> Connection | None:
        self._home.check()
        if self._closed:
            raise trio.ClosedResourceError("this connection to etcd was closed")
        connection = self._connection
        return connection if connection is not None and connection.accepts_calls else None

    async def _connect(self, deadline: float) -> Connection:
        dial = self._dial
        if dial is None or dial.is_stale(trio.current_time()):
            dial = _Dial()
            self._background.start_soon(self._serve, dial)
            self._dial = dial
        with trio.CancelScope(deadline=deadline):
            await dial.done.wait()
        connection = dial.connection
        if connection is None or not connection.accepts_calls:
            fact = dial.fact if connection is None else connection.fact
            details = f"no connection to {self._endpoint}: {fact}"
            raise ChannelError(StatusCode.UNAVAILABLE, details, never_sent=True)
        return connection

    async def _serve(self, dial: _Dial) -> None:
        try:
            with dial.scope:
                ready_by = trio.current_time() + self._dial_timeout
                transport = await self._open_transport(dial, ready_by)
                if transport is not None:
                    await self._serve_connection(dial, transport, ready_by)
        finally:
            dial.finish()

    async def _open_transport(self, dial: _Dial, ready_by: float) -> trio.abc.Stream | None:
        with trio.CancelScope(deadline=ready_by):
            try:
                transport = TcpStream(await trio.open_tcp_stream(self._endpoint.host, self._endpoint.port))
                if self._tls is not None:
                    return await secured(transport, self._tls, self._endpoint.host)
            except (OSError, ValueError, trio.BrokenResourceError) as error:
                # ValueError: no name of a host, as those who translate or verify it see it.
                dial.fact = _described(error)
                return None
            else:
                return transport
        dial.fact = f"nobody accepted within {self._dial_timeout:g} s"
        return None

    async def _serve_connection(self, dial: _Dial, transport: trio.abc.Stream, ready_by: float) -> None:
        def ready() -> None:
            self._connection = dial.connection = connection
            dial.finish()

        connection = Connection(transport, ready_by=ready_by, on_ready=ready)
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            dial.fact = connection.fact
            self._connections.discard(connection)


class _Dial:
    """One attempt to connect, and those who wait for it."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.connection: Connection | None = None
        self.fact = "no answer yet"
        self._done_at = inf

    def finish(self) -> None:
        """Let those who wait see what became of it; safe to repeat."""
        if not self.done.is_set():
            self._done_at = trio.current_time()
            self.done.set()

    async def aclose(self) -> None:
        """Give the attempt up, and wait until those who wait for it know."""
        self.scope.cancel()
        with trio.CancelScope(shield=True):
            await self.done.wait()

    def is_stale(self, now: float) -> bool:
        """Whether it is time for another attempt."""
        if self.connection is not None:
            return not self.connection.accepts_calls
        return now >= self._done_at + _DIAL_PAUSE_SECONDS


def _described(error: OSError | ValueError | trio.BrokenResourceError) -> str:
    # Trio tries each address of a name; if all fail, the reasons are behind its own error.
    cause: Any = error.__cause__
    reasons: tuple[object, ...] = getattr(cause, "exceptions", (cause or error,))
    return ", ".join(map(str, reasons))
