"""The channel over HTTP/2: when it dials, and what a hostile server can do to it."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager, suppress
from functools import partial
from math import inf

import pytest
import trio
import trio.testing

from etcd_infra._backends import http2_connection
from etcd_infra._backends import http2_frames as h2
from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.endpoints import Endpoint
from etcd_infra._backends.http2_channel import Http2Channel
from etcd_infra._backends.status import StatusCode
from etcd_infra._etcd.background import open_background
from etcd_infra.testing import find_leaks, take_inventory
from tests.helpers.certificates import Authority
from tests.helpers.http2_server import FIRST, GREETING, answer, frames, headers

METHOD = "/p.S/M"


class Listener:
    """A server made of one function per connection."""

    def __init__(self, serve):
        self._serve = serve
        self.accepted = 0
        self.port = 0

    async def handle(self, stream):
        """Serve one connection; a client that leaves is no fault."""
        self.accepted += 1
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._serve(stream)


@asynccontextmanager
async def listening(serve):
    """Listen on loopback."""
    listener = Listener(serve)
    async with trio.open_nursery() as nursery:
        (socket,) = await nursery.start(partial(trio.serve_tcp, listener.handle, 0, host="127.0.0.1"))
        listener.port = socket.socket.getsockname()[1]
        yield listener
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def opened(port, *, dial_timeout=1.0, tls=None):
    """Open a channel."""
    async with open_background() as background:
        channel = Http2Channel(
            Endpoint("127.0.0.1", port), dial_timeout=dial_timeout, background=background, tls=tls
        )
        yield channel
        await channel.aclose()
        await channel.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await channel.unary(METHOD, b"", time_limit=1.0)


class Requests:
    """The numbers of the streams whose requests are complete, as they come."""

    def __init__(self, stream):
        self._stream = stream
        self._heard = b""

    def __aiter__(self):
        return self

    async def __anext__(self):
        while True:
            while len(self._heard) >= 9 and len(self._heard) >= (
                end := 9 + int.from_bytes(self._heard[:3], "big")
            ):
                ((kind, flags, number, _),) = frames(self._heard[:end])
                self._heard = self._heard[end:]
                if kind == h2.DATA and flags & h2.END_STREAM:
                    return number
            more = await self._stream.receive_some()
            if not more:
                raise StopAsyncIteration
            self._heard = (self._heard + more).removeprefix(h2.PREFACE)


async def answering(stream, *, calls=10**9, last=b""):
    """Serve a number of calls, then say `last` and close."""
    await stream.send_all(GREETING)
    async for number in Requests(stream):
        await stream.send_all(answer(number, b"told"))
        calls -= 1
        if not calls:
            await stream.send_all(last)
            return


async def say_nothing(_):
    await trio.sleep_forever()


async def test_many_callers_share_one_dial():
    """Calls that come before there is a connection wait for the same one."""
    async with listening(answering) as server, opened(server.port) as channel, trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(partial(channel.unary, METHOD, b"", time_limit=5.0))
    assert 1 == server.accepted


async def test_nobody_there_is_known_not_to_have_been_asked():
    """A refused connection says so at once; it is not dialled again by everybody who comes meanwhile."""
    async with listening(answering) as server:
        pass
    async with opened(server.port) as channel:
        for _ in range(3):
            with pytest.raises(ChannelError, match=f"127.0.0.1:{server.port}.*refused") as caught:
                await channel.unary(METHOD, b"", time_limit=5.0)
            assert caught.value.never_sent
        with pytest.raises(ChannelError, match="refused"):
            async with channel.stream(METHOD):
                pass


async def test_mute_server_is_left_at_the_dial_timeout():
    """A server that accepts and says nothing has not been asked."""
    async with (
        listening(say_nothing) as server,
        opened(server.port, dial_timeout=0.2) as channel,
    ):
        with trio.fail_after(2), pytest.raises(ChannelError, match="says nothing") as caught:
            await channel.unary(METHOD, b"", time_limit=5.0)
        assert caught.value.never_sent


async def test_caller_does_not_wait_for_a_dial_beyond_its_own_time():
    """A call's time limit counts from the call, not from the connection."""
    async with (
        listening(say_nothing) as server,
        opened(server.port, dial_timeout=60) as channel,
    ):
        with trio.fail_after(2), pytest.raises(ChannelError) as caught:
            await channel.unary(METHOD, b"", time_limit=0.1)
        assert caught.value.never_sent


async def test_name_that_is_no_name_is_a_failed_dial():
    """A host that can not even be looked up is an endpoint without a connection, and harms nobody else."""
    async with open_background() as background:
        channel = Http2Channel(Endpoint("a..b", 1), dial_timeout=1.0, background=background)
        with pytest.raises(ChannelError, match=r"no connection to a\.\.b:1: .*label") as caught:
            await channel.unary(METHOD, b"", time_limit=5.0)
        assert caught.value.never_sent


async def test_closing_ends_a_dial():
    """Closing gives up an attempt to connect, and those who wait for it."""
    async with (
        listening(say_nothing) as server,
        open_background() as background,
        trio.open_nursery() as nursery,
    ):
        channel = Http2Channel(Endpoint("127.0.0.1", server.port), dial_timeout=60, background=background)

        @nursery.start_soon
        async def _():
            with pytest.raises(ChannelError) as caught:
                await channel.unary(METHOD, b"", time_limit=60)
            assert caught.value.never_sent

        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(5):
            await channel.aclose()


async def test_server_that_goes_away_as_it_greets_says_why():
    """A connection that takes no call from the beginning is a failed dial, with the server's reason."""

    async def serve(stream):
        await stream.send_all(GREETING + h2.frame(h2.GOAWAY, 0, 0, bytes(8) + b"full"))
        await trio.sleep_forever()

    async with listening(serve) as server, opened(server.port) as channel:
        with pytest.raises(ChannelError, match="NO_ERROR full") as caught:
            await channel.unary(METHOD, b"", time_limit=5.0)
        assert caught.value.never_sent


async def test_call_without_a_time_limit():
    """A call may take for ever."""
    async with listening(answering) as server, opened(server.port) as channel:
        assert b"told" == await channel.unary(METHOD, b"", time_limit=inf)


async def test_next_call_after_a_break_dials_again():
    """A connection that was closed is replaced when it is needed."""
    async with listening(partial(answering, calls=1)) as server, opened(server.port) as channel:
        for _ in range(3):
            assert await channel.unary(METHOD, b"", time_limit=5.0) == b"told"
            # The server's end of the connection is on its way.
            while channel._connection is not None and channel._connection.accepts_calls:
                await trio.sleep(0.001)
    assert server.accepted == 3


async def test_server_that_goes_away_finishes_its_calls():
    """After GOAWAY new calls use a new connection, while the old one finishes."""
    finish = trio.Event()

    async def serve(stream):
        if server.accepted > 1:
            await answering(stream)
            return
        await stream.send_all(GREETING)
        async for number in Requests(stream):
            await stream.send_all(h2.frame(h2.GOAWAY, 0, 0, number.to_bytes(4, "big") + bytes(4)))
            await finish.wait()
            await stream.send_all(answer(number, b"old"))
            return

    found = []
    async with listening(serve) as server, opened(server.port) as channel:

        async def ask():
            found.append(await channel.unary(METHOD, b"", time_limit=5.0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while not channel._connection or channel._connection.accepts_calls:
                await trio.sleep(0.001)
            await ask()
            finish.set()
    assert [b"told", b"old"] == found


async def test_stream_is_cancelled_when_its_block_is_left():
    """Leaving a stream's block, by whatever way, resets it."""
    resets = []

    async def serve(stream):
        await stream.send_all(GREETING)
        heard = b""
        async for more in stream:
            heard += more
            resets[:] = [number for kind, _, number, _ in frames(heard) if kind == h2.RST_STREAM]

    async with listening(serve) as server, opened(server.port) as channel:
        async with channel.stream(METHOD):
            pass
        with trio.move_on_after(0.05):
            async with channel.stream(METHOD) as stream:
                await stream.receive()
        with pytest.raises(ZeroDivisionError):
            async with channel.stream(METHOD):
                raise ZeroDivisionError
        with trio.fail_after(2):
            while resets != [1, 3, 5]:
                await trio.sleep(0.001)


# ── hostile servers ─────────────────────────────────────────────────────────────────────────────


def after_the_request(*said, then=trio.sleep_forever):
    """Serve: greet, wait for a request, say something, do something."""

    async def serve(stream):
        await stream.send_all(GREETING)
        async for _ in Requests(stream):
            for piece in said:
                await stream.send_all(piece)
            await then()
            return

    return serve


async def at_once():
    await trio.lowlevel.checkpoint()


async def flood(stream):
    """Send header blocks without end: 40 MB of them."""
    await stream.send_all(GREETING)
    async for _ in Requests(stream):
        await stream.send_all(h2.frame(h2.HEADERS, 0, 1, b""))
        for _ in range(2_500):
            await stream.send_all(h2.frame(h2.CONTINUATION, 0, 1, bytes(16_384)))


async def starve(stream):
    """Allow no byte of any request."""
    await stream.send_all(h2.settings({h2.INITIAL_WINDOW_SIZE: 0}))
    await trio.sleep_forever()


async def allow_nobody(stream):
    """Allow no stream at all."""
    await stream.send_all(h2.settings({h2.MAX_CONCURRENT_STREAMS: 0}))
    await trio.sleep_forever()


async def web_server(stream):
    """Speak another protocol."""
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


async def reset_everything(stream):
    """Refuse each stream with a storm of resets."""
    await stream.send_all(GREETING)
    async for number in Requests(stream):
        await stream.send_all(h2.rst_stream(number, 2) * 10_000)


UNAVAILABLE, DEADLINE, INTERNAL = StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.INTERNAL
HOSTILE = {
    "closes instead of greeting": (lambda _: at_once(), UNAVAILABLE, True),
    "speaks HTTP/1.1": (web_server, UNAVAILABLE, True),
    "closes after the request": (after_the_request(then=at_once), UNAVAILABLE, False),
    "half a frame, then silence": (after_the_request(answer(1, b"x")[:7]), DEADLINE, False),
    "half a frame, then the end": (after_the_request(answer(1, b"x")[:7], then=at_once), UNAVAILABLE, False),
    "half a message, then the end": (
        after_the_request(answer(1, b"xyz")[:-20], then=at_once),
        UNAVAILABLE,
        False,
    ),
    "headers, then silence": (after_the_request(headers(1, *FIRST)), DEADLINE, False),
    "garbage": (after_the_request(bytes(range(256)) * 40), UNAVAILABLE, False),
    "40 MB of headers": (flood, UNAVAILABLE, False),
    "no window": (starve, DEADLINE, True),
    "no streams": (allow_nobody, DEADLINE, True),
    "a storm of resets": (reset_everything, INTERNAL, False),
    "goes away at once": (
        after_the_request(h2.frame(h2.GOAWAY, 0, 0, bytes(8)), then=at_once),
        UNAVAILABLE,
        True,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_server_is_an_error_in_time(name):
    """Whatever a server does, a call ends in time with the right verdict, and nothing is left of the channel."""
    serve, code, never_sent = HOSTILE[name]
    before = take_inventory()
    async with listening(serve) as server, opened(server.port) as channel:
        # Long enough on a busy machine, unless its end is what is waited for.
        time_limit = 0.3 if code == DEADLINE else 10.0
        for _ in range(2):
            with trio.fail_after(15), pytest.raises(ChannelError) as caught:
                await channel.unary(METHOD, b"ask", time_limit=time_limit)
            assert (code, never_sent) == (caught.value.code, caught.value.never_sent), str(caught.value)
            await trio.sleep(0.15)
    assert [] == find_leaks(before, take_inventory())


def secured(files, *, protocol="h2", then=answering):
    """Serve over TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.cert, files.key)
    context.set_alpn_protocols([protocol])

    async def serve(stream):
        secure = trio.SSLStream(stream, context, server_side=True)
        with suppress(trio.BrokenResourceError):
            await secure.do_handshake()
            await then(secure)

    return serve


def saying(*said):
    """Say something instead of a handshake, wait for a moment, and close."""

    async def serve(stream):
        for piece in said:
            await stream.send_all(piece)
        await stream.receive_some()
        await trio.sleep(0.05)

    return serve


HOSTILE_TLS = {
    "mute": lambda _: say_nothing,
    "closes": lambda _: lambda _stream: at_once(),
    "plain HTTP": lambda _: web_server,
    "garbage": lambda _: saying(bytes(range(256)) * 40),
    "half a record": lambda _: saying(b"\x16\x03\x03\x02\x00" + bytes(100)),
    "other protocol": lambda authority: secured(authority.server("127.0.0.1"), protocol="http/1.1"),
    "other host": lambda authority: secured(authority.server("other.test")),
}


@pytest.mark.parametrize("name", HOSTILE_TLS)
async def test_hostile_tls_server_is_an_error_in_time(name, tmp_path):
    """Before a server has proven itself nothing is sent; the call ends in time, and no socket is left."""
    authority = Authority(tmp_path)
    serve, client = HOSTILE_TLS[name](authority), authority.client()
    before = take_inventory()
    async with listening(serve) as server, opened(server.port, dial_timeout=0.5, tls=client) as channel:
        for _ in range(2):
            with trio.fail_after(10), pytest.raises(ChannelError) as caught:
                await channel.unary(METHOD, b"ask", time_limit=5.0)
            assert (UNAVAILABLE, True) == (caught.value.code, caught.value.never_sent), str(caught.value)
            await trio.sleep(0.15)
    assert [] == find_leaks(before, take_inventory())


async def test_calls_of_any_size_over_tls(tmp_path):
    """Secured, one call after the other and many at once get their answers, on one connection."""
    authority = Authority(tmp_path)
    serve = secured(authority.server("127.0.0.1"))
    async with listening(serve) as server, opened(server.port, tls=authority.client()) as channel:
        for size in (0, 1, 20_000):
            assert b"told" == await channel.unary(METHOD, bytes(size), time_limit=5.0)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(partial(channel.unary, METHOD, b"x", time_limit=5.0))
    assert 1 == server.accepted


async def test_numbers_used_up_mean_another_connection(monkeypatch):
    """Who calls when a connection has no number left gets the next connection; calls on the old one are finished."""
    short = partial(http2_connection.Http2Protocol, largest_stream_id=5)
    monkeypatch.setattr(http2_connection, "Http2Protocol", short)
    async with listening(answering) as server, opened(server.port) as channel:
        for _ in range(8):
            assert b"told" == await channel.unary(METHOD, b"", time_limit=5.0)
    assert 3 == server.accepted
