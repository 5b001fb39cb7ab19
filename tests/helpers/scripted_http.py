"""An HTTP/1.1 server whose answers are scripted, byte by byte."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import h11
import trio

from etcd_infra._etcd.background import open_background

VERSION = b'{"etcdserver":"3.5.16","etcdcluster":"3.5.0"}'


@dataclass
class ScriptedHttp:
    """
    The server; made by `open_http`.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        scripts: By path: an async function of the connection and the request's body, which writes the answer.
        requests: What was asked: method, path, headers, body.
        hung_up: How many connections the client has ended.
    """

    port: int = 0
    scripts: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    hung_up: int = 0

    @property
    def endpoint(self):
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, connection):
        """Serve one connection."""
        http = h11.Connection(h11.SERVER)
        try:
            while True:
                request, body = None, b""
                while not isinstance(event := await self._next(http, connection), h11.EndOfMessage):
                    if isinstance(event, h11.ConnectionClosed):
                        self.hung_up += 1
                        return
                    if isinstance(event, h11.Request):
                        request = event
                    else:
                        body += event.data
                path = request.target.decode()
                headers = {name.decode(): value.decode() for name, value in request.headers}
                self.requests.append((request.method.decode(), path, headers, body))
                await self.scripts[path](connection, body)
                http = h11.Connection(h11.SERVER)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.hung_up += 1

    @staticmethod
    async def _next(http, connection):
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await connection.receive_some())
        return event


def whole(body, status="200 OK"):
    """Return a script that answers at once, with a length."""

    async def script(connection, _):
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        await connection.send_all(head + body)

    return script


def chunked(*pieces, status="200 OK", hang=False):
    """Return a script that answers in chunks, and then ends the answer, or says nothing any more."""

    async def script(connection, _):
        await connection.send_all(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for piece in pieces:
            await connection.send_all(b"%x\r\n%b\r\n" % (len(piece), piece))
        if hang:
            await hanging(connection, b"")
        await connection.send_all(b"0\r\n\r\n")

    return script


async def hanging(connection, _):
    """Say nothing, until the client hangs up."""
    if not await connection.receive_some():
        raise trio.BrokenResourceError


@asynccontextmanager
async def open_http(**scripts):
    """Listen; `scripts` are by the last part of the path."""
    server = ScriptedHttp(scripts={"/version": whole(VERSION)})
    server.scripts |= {f"/v3/{name.replace('__', '/')}": script for name, script in scripts.items()}
    async with open_background() as background:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server.port = listeners[0].socket.getsockname()[1]
        background.start_soon(partial(trio.serve_listeners, server.serve, listeners))
        yield server
