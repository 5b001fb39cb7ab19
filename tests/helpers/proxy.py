"""A TCP proxy that does to a connection what networks do."""

from __future__ import annotations

import struct
from contextlib import asynccontextmanager
from socket import SO_LINGER, SOL_SOCKET

import trio

from etcd_infra.testing.server import free_port


class _Gate:
    """Open or closed; passing a closed one waits."""

    def __init__(self):
        self._open = trio.Event()
        self._open.set()

    def close(self):
        if self._open.is_set():
            self._open = trio.Event()

    def open(self):
        self._open.set()

    async def wait(self):
        await self._open.wait()


class ChaosProxy:
    """
    A listener at `endpoint` in front of the etcd at `upstream`, with faults on demand.

    After `swallow_answers`, `heal` resets the connections that lost bytes, as nothing else could follow.
    """

    def __init__(self, upstream, endpoint):
        self.endpoint = endpoint
        self.upstream = upstream
        self.accepted = 0
        self.swallowed_bytes = 0
        self._requests = _Gate()
        self._answers = _Gate()
        self._is_swallowing = False
        self._is_refusing = False
        self._connections = set()
        self._tainted = set()

    def black_hole(self):
        """Deliver nothing in either direction, break nothing; new connections are accepted and silent."""
        self._requests.close()
        self._answers.close()

    def hold_answers(self):
        """Deliver requests, keep the answers back until `heal`."""
        self._answers.close()

    def swallow_answers(self):
        """Deliver requests, throw the answers away."""
        self._is_swallowing = True

    def refuse(self):
        """Reset every connection, and each new one at once."""
        self._is_refusing = True
        self.reset()

    def reset(self):
        """Reset every connection (RST)."""
        for client in tuple(self._connections):
            self._reset(client)

    def heal(self):
        """Work again."""
        self._is_swallowing = self._is_refusing = False
        for client in tuple(self._tainted):
            self._reset(client)
        self._requests.open()
        self._answers.open()

    def _reset(self, client):
        client.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.close()

    async def serve(self, client):
        """Serve one connection to its end."""
        self.accepted += 1
        if self._is_refusing:
            self._reset(client)
            return
        self._connections.add(client)
        host, port = self.upstream.removeprefix("http://").split(":")
        try:
            await self._requests.wait()
            async with await trio.open_tcp_stream(host, int(port)) as server, trio.open_nursery() as nursery:
                nursery.start_soon(self._forward, client, server, self._requests, nursery.cancel_scope)
                nursery.start_soon(self._answer, server, client, nursery.cancel_scope)
        except OSError:
            self._reset(client)
        finally:
            self._connections.discard(client)
            self._tainted.discard(client)

    async def _forward(self, source, sink, gate, scope):
        try:
            async for data in source:
                await gate.wait()
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()

    async def _answer(self, server, client, scope):
        try:
            async for data in server:
                await self._answers.wait()
                if self._is_swallowing:
                    self.swallowed_bytes += len(data)
                    self._tainted.add(client)
                else:
                    await client.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()


@asynccontextmanager
async def open_proxy(upstream):
    """A proxy in front of `upstream`, "http://host:port"."""
    port = free_port()
    proxy = ChaosProxy(upstream, f"http://127.0.0.1:{port}")
    async with trio.open_nursery() as nursery:
        await nursery.start(_listen, proxy.serve, port)
        try:
            yield proxy
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_mute_listener():
    """An endpoint that accepts connections and never says a word."""
    port = free_port()

    async def listen(stream):
        async with stream:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(_listen, listen, port)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            nursery.cancel_scope.cancel()


async def _listen(handler, port, task_status):
    await trio.serve_tcp(handler, port, host="127.0.0.1", task_status=task_status)
