"""
Watches over the HTTP gateway, as one stream of gRPC's: no threads, each watch on a connection of its own.

HTTP/1.1 has no pings. A member that hangs is found by a question now and then, on a connection of its own; a
connection that died, by TCP's probes: both within 15 s.
"""

from __future__ import annotations

import socket
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import h11
import trio

from etcd_infra._backends.channel import ByteStream, ChannelError
from etcd_infra._backends.gateway_json import Documents, failure, from_json, to_json, unwrapped
from etcd_infra._backends.status import StatusCode
from etcd_infra._backends.tls import secured
from etcd_infra._backends.wire_schema import MESSAGES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from etcd_infra._backends.endpoints import Endpoint
    from etcd_infra._backends.tls import TlsConfig
    from etcd_infra._etcd.background import Background

_HTTP_OK: Final = 200
_PIECE: Final = 64 * 1024
_PING_SECONDS: Final = 10.0
_PONG_SECONDS: Final = 4.0
_PROBES: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 6),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)


class Caller:
    """
    Makes one request per connection.

    Args:
        endpoint: Whom to call.
        dial_timeout: Seconds that an attempt to connect may take.
        tls: Certificates, read for each connection; None: plain text.
    """

    def __init__(self, endpoint: Endpoint, *, dial_timeout: float, tls: TlsConfig | None) -> None:
        self._endpoint = endpoint
        self._dial_timeout = dial_timeout
        self._tls = tls

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, headers: dict[str, str], body: bytes = b""
    ) -> AsyncGenerator[Answer]:
        """
        Send a request and wait for the head of the answer.

        Raises:
            ChannelError: nobody is there, or the answer is no HTTP.
        """
        sent = {"Host": str(self._endpoint), "Content-Length": str(len(body))} | headers
        try:
            request = h11.Request(method=method, target=path, headers=list(sent.items()))
            transport = await self._connected()
        except (OSError, UnicodeError, h11.LocalProtocolError, trio.BrokenResourceError) as error:
            details = f"no connection to {self._endpoint}: {error}"
            raise ChannelError(StatusCode.UNAVAILABLE, details, never_sent=True) from error
        async with transport:
            answer = Answer(transport)
            await answer.begin(request, body)
            yield answer

    async def _connected(self) -> trio.abc.Stream:
        with trio.CancelScope(deadline=trio.current_time() + self._dial_timeout):
            transport = await trio.open_tcp_stream(self._endpoint.host, self._endpoint.port)
            for level, option, value in _PROBES:
                transport.socket.setsockopt(level, option, value)
            if self._tls is None:
                return transport
            return await secured(transport, self._tls, self._endpoint.host, "http/1.1")
        raise OSError(f"nobody accepted within {self._dial_timeout:g} s")


class Answer:
    """An answer of which the body is still coming."""

    def __init__(self, transport: trio.abc.Stream) -> None:
        self._transport = transport
        self._http = h11.Connection(h11.CLIENT)
        self.status = 0
        self.reason = ""

    async def begin(self, request: h11.Request, body: bytes) -> None:
        """Send the request, and read the head of the answer."""
        parts = (request, h11.Data(data=body), h11.EndOfMessage())
        try:
            await self._transport.send_all(b"".join(self._http.send(part) or b"" for part in parts))
        except trio.BrokenResourceError as error:
            raise _broken(error) from error
        while not isinstance(head := await self._next(), h11.Response):
            pass
        self.status, self.reason = head.status_code, head.reason.decode(errors="replace")

    async def piece(self) -> bytes | None:
        """
        Wait for some more of the body; None: it is complete.

        Raises:
            ChannelError: the connection broke, or what came is no HTTP.

        Cancellation:
            Nothing is lost; call again.
        """
        match await self._next():
            case h11.Data(data=data):
                return bytes(data)
            case _:
                return None

    async def text(self) -> str:
        """Wait for all of the body."""
        pieces = bytearray()
        while (piece := await self.piece()) is not None:
            pieces += piece
        return pieces.decode(errors="replace")

    async def _next(self) -> object:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(bytes(await self._transport.receive_some(_PIECE)))
        except (h11.RemoteProtocolError, trio.BrokenResourceError) as error:
            raise _broken(error) from error
        return event


def _broken(error: Exception) -> ChannelError:
    return ChannelError(StatusCode.UNAVAILABLE, f"the connection broke: {error!r}")


@dataclass(eq=False)
class _Watch:
    id: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    early: list[bytes | ChannelError] = field(default_factory=list)
    has_begun: bool = False


class GatewayWatchStream(ByteStream):
    """
    Many watches as one stream: each is a request of its own, whose answers come one after the other.

    etcd: nothing can be sent after the first bytes of an answer, so a watch is canceled by hanging up.
    Answers to creations are passed on in the order of the creations, as on a stream of gRPC's; until its turn
    comes, what a watch answers is kept.
    """

    def __init__(self, background: Background, caller: Caller, path: str, headers: dict[str, str]) -> None:
        self._background = background
        self._caller = caller
        self._path = path
        self._headers = headers
        self._watches: dict[int, _Watch] = {}
        self._to_begin: deque[_Watch] = deque()
        self._answers: deque[bytes | ChannelError] = deque()
        self._more = trio.Event()

    def send(self, message: bytes) -> None:
        """Implement `ByteStream.send`."""
        request: Any = MESSAGES["WatchRequest"].FromString(message)
        if request.HasField("create_request"):
            watch_id = request.create_request.watch_id
            watch = self._watches[watch_id] = _Watch(watch_id)
            self._to_begin.append(watch)
            self._background.start_soon(self._serve, watch, to_json("WatchRequest", message))
        elif watch := self._watches.pop(request.cancel_request.watch_id, None):
            watch.scope.cancel()

    async def receive(self) -> bytes:
        """Implement `ByteStream.receive`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._answers:
            self._more = trio.Event()
            await self._more.wait()
        answer = self._answers.popleft()
        if isinstance(answer, ChannelError):
            raise answer
        return answer

    async def keep_pinging(self) -> None:
        """End the stream when the member, though connected, does not answer any more."""
        while True:
            await trio.sleep(_PING_SECONDS)
            if self._watches and (error := await self._ping()):
                self._put(error)

    async def _ping(self) -> ChannelError | None:
        try:
            with trio.CancelScope(deadline=trio.current_time() + _PONG_SECONDS):
                async with self._caller.ask("GET", "/version", {}):
                    return None
        except ChannelError as error:
            return error
        return ChannelError(StatusCode.UNAVAILABLE, "no answer to a ping")

    async def _serve(self, watch: _Watch, body: bytes) -> None:
        with watch.scope:
            try:
                await self._read(watch, body)
            except ChannelError as error:
                self._pass_on(watch, error)
            finally:
                self._watches.pop(watch.id, None)

    async def _read(self, watch: _Watch, body: bytes) -> None:
        documents = Documents()
        async with self._caller.ask("POST", self._path, self._headers, body) as answer:
            if answer.status != _HTTP_OK:
                raise failure(await answer.text(), StatusCode.UNAVAILABLE, reason=answer.reason)
            while (piece := await answer.piece()) is not None:
                for document in documents.feed(piece):
                    result: Any = unwrapped(document)
                    self._pass_on(watch, from_json("WatchResponse", result))
                    if result.get("created") and result.get("canceled"):
                        return  # refused: nobody will cancel it
                    await trio.lowlevel.checkpoint()
            for document in documents.finish():
                self._pass_on(watch, from_json("WatchResponse", unwrapped(document)))
        raise ChannelError(StatusCode.OK, "the server ended the watch")

    def _pass_on(self, watch: _Watch, answer: bytes | ChannelError) -> None:
        if watch.has_begun:
            self._put(answer)
            return
        watch.early.append(answer)
        while self._to_begin and self._to_begin[0].early:
            first = self._to_begin.popleft()
            first.has_begun = True
            for each in first.early:
                self._put(each)

    def _put(self, answer: bytes | ChannelError) -> None:
        self._answers.append(answer)
        self._more.set()
