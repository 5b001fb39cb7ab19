"""A TCP proxy that does to connections what networks do, on demand."""

from __future__ import annotations

import struct
from contextlib import asynccontextmanager
from functools import partial
from socket import SO_LINGER, SOL_SOCKET
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra.testing.server import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class _Gate:
    """Open or closed; passing a closed one waits."""

    def __init__(self) -> None:
        self._open = trio.Event()
        self._open.set()

    def close(self) -> None:
        if self._open.is_set():
            self._open = trio.Event()

    def open(self) -> None:
        self._open.set()

    async def wait(self) -> None:
        await self._open.wait()


class TcpProxy:
    """
    A listener in front of one server; made by `open_proxy`.

    Every verb acts at once on the connections that exist and on those that come, until `heal`. Faults add up.

    Attributes:
        endpoint: Where it listens, "http://host:port".
        upstream: Where new connections lead, "http://host:port"; may be changed.
        accepted: How many connections have been accepted.
        swallowed_bytes: How much of the server's answers was thrown away.
    """

    def __init__(self, upstream: str, endpoint: str) -> None:
        self.endpoint = endpoint
        self.upstream = upstream
        self.accepted = 0
        self.swallowed_bytes = 0
        self._requests = _Gate()
        self._answers = _Gate()
        self._delay = 0.0
        self._is_swallowing = False
        self._is_refusing = False
        self._connections: set[trio.SocketStream] = set()
        self._tainted: set[trio.SocketStream] = set()

    def __repr__(self) -> str:
        return f"<TcpProxy {self.endpoint} → {self.upstream}>"

    def black_hole(self) -> None:
        """Deliver nothing in either direction, break nothing; new connections are accepted and silent."""
        self.hold_requests()
        self.hold_answers()

    def hold_requests(self) -> None:
        """Keep back what the client sends; `heal` delivers it late."""
        self._requests.close()

    def hold_answers(self) -> None:
        """Deliver requests, keep back what the server sends; `heal` delivers it late."""
        self._answers.close()

    def swallow_answers(self) -> None:
        """Deliver requests, throw the answers away; `heal` resets the connections that lost bytes."""
        self._is_swallowing = True

    def delay(self, seconds: float) -> None:
        """Deliver everything at least `seconds` late, in either direction (twice that while more follows)."""
        self._delay = seconds

    def refuse(self) -> None:
        """Reset every connection, and each new one at once."""
        self._is_refusing = True
        self.reset()

    def reset(self) -> None:
        """Reset every connection (RST), once; new ones work."""
        for client in tuple(self._connections):
            _reset(client)

    def heal(self) -> None:
        """Work again."""
        self._is_swallowing = self._is_refusing = False
        self._delay = 0.0
        # A stream that lost bytes in the middle makes no sense any more.
        for client in tuple(self._tainted):
            _reset(client)
        self._requests.open()
        self._answers.open()

    async def serve(self, client: trio.SocketStream) -> None:
        """Serve one accepted connection to its end."""
        self.accepted += 1
        if self._is_refusing:
            _reset(client)
            return
        self._connections.add(client)
        host, port = self.upstream.removeprefix("http://").split(":")
        try:
            await self._requests.wait()
            async with await trio.open_tcp_stream(host, int(port)) as server, trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, client, server, nursery.cancel_scope)
                nursery.start_soon(self._pass_back, server, client, nursery.cancel_scope)
        except OSError:
            _reset(client)
        finally:
            self._connections.discard(client)
            self._tainted.discard(client)

    async def _pass_on(
        self, client: trio.SocketStream, server: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        try:
            async for data in client:
                await self._hold_up(self._requests)
                await server.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()

    async def _pass_back(
        self, server: trio.SocketStream, client: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        try:
            async for data in server:
                await self._hold_up(self._answers)
                if self._is_swallowing:
                    self.swallowed_bytes += len(data)
                    self._tainted.add(client)
                else:
                    await client.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()

    async def _hold_up(self, gate: _Gate) -> None:
        if self._delay:
            await trio.sleep(self._delay)
        await gate.wait()


def _reset(client: trio.SocketStream) -> None:
    # Closed by hand: `aclose` would wait, and say goodbye.
    if client.socket.fileno() >= 0:
        client.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.close()


@asynccontextmanager
async def open_proxy(upstream: str) -> AsyncGenerator[TcpProxy]:
    """
    Open a proxy on a free port of 127.0.0.1; it passes everything on until told otherwise.

    Args:
        upstream: "http://host:port"; need not answer.

    Cancellation:
        Every connection is closed, here as at the end of the block.
    """
    async with open_background() as background:
        port = free_port()
        proxy = TcpProxy(upstream, f"http://127.0.0.1:{port}")
        await background.start(partial(trio.serve_tcp, proxy.serve, port, host="127.0.0.1"))
        yield proxy
