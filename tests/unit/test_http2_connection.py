"""A connection over HTTP/2 on Trio: what waits, what wakes it, and when it gives up."""

from __future__ import annotations

from contextlib import asynccontextmanager

import h2.config
import h2.connection
import h2.events
import pytest
import trio
import trio.testing

from etcd_infra._backends import http2_frames as frames_of
from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.grpc_headers import RequestHeaders
from etcd_infra._backends.http2_connection import Connection
from etcd_infra._backends.http2_frames import ErrorCode
from etcd_infra._backends.status import StatusCode
from tests.helpers.http2_server import FIRST, GREETING, OK, answer, data, frames, headers, message
from tests.helpers.tcp import tcp_pair

HEADERS = RequestHeaders("etcd:2379").block("/p.S/M", 5.0, (("hasleader", "true"),))


class Server:
    """The other end of the connection; the test is the server."""

    def __init__(self, stream):
        self.stream = stream
        self._heard = b""

    async def say(self, *said):
        """Send bytes."""
        await self.stream.send_all(b"".join(said))

    async def hear(self, kind):
        """Wait for the next frame of a kind: its stream and payload."""
        while True:
            self._heard = self._heard.removeprefix(frames_of.PREFACE)
            while len(self._heard) >= 9:
                length = int.from_bytes(self._heard[:3], "big")
                if len(self._heard) < 9 + length:
                    break
                ((found, _, stream_id, payload),) = frames(self._heard[: 9 + length])
                self._heard = self._heard[9 + length :]
                if found == kind:
                    return stream_id, payload
            more = await self.stream.receive_some()
            if not more:
                raise EOFError
            self._heard += more


@asynccontextmanager
async def connected(*, greet=True):
    """Open a connection to a test."""
    ours, theirs = trio.testing.memory_stream_pair()
    ready = trio.Event()
    connection = Connection(ours, ready_by=trio.current_time() + 2.0, on_ready=ready.set)
    server = Server(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.serve)
        if greet:
            await server.say(GREETING)
            await ready.wait()
        yield connection, server, nursery
        await connection.aclose()


def failing(code, match=None, *, never_sent=False):
    """Expect a channel's error."""
    return pytest.raises(
        ChannelError, match=match, check=lambda error: (error.code, error.never_sent) == (code, never_sent)
    )


async def test_answers_find_their_callers(autojump_clock):
    """Each caller gets its own answer, in whatever order they come."""
    found = {}

    async def ask(connection, number):
        found[number] = await connection.unary(HEADERS, b"%d" % number, 5.0)

    async with connected() as (connection, server, nursery):
        for number in range(3):
            nursery.start_soon(ask, connection, number)
        asked = dict([await server.hear(frames_of.DATA) for _ in range(3)])
        for stream_id in sorted(asked, reverse=True):
            await server.say(answer(stream_id, b"re:" + asked[stream_id][5:]))
        await trio.testing.wait_all_tasks_blocked()
        assert {number: b"re:%d" % number for number in range(3)} == found


async def test_calls_of_one_turn_leave_together(autojump_clock):
    """Ten calls that are made at once are one write."""
    async with connected() as (connection, server, nursery):
        await trio.testing.wait_all_tasks_blocked()
        writes = []
        sending = connection._transport.send_stream
        pump = sending.send_all_hook

        async def count():
            writes.append(1)
            await pump()

        sending.send_all_hook = count
        for _ in range(10):
            nursery.start_soon(connection.unary, HEADERS, b"", 5.0)
        numbers = [(await server.hear(frames_of.DATA))[0] for _ in range(10)]
        assert [1] == writes
        await server.say(*(answer(number, b"") for number in numbers))


async def test_cancelled_call_is_reset(autojump_clock):
    """A cancelled call is reset on the wire at once, and leaves nothing."""
    async with connected() as (connection, server, _):
        with trio.move_on_after(1):
            await connection.unary(HEADERS, b"", 5.0)
        assert (1, b"\0\0\0\x08") == await server.hear(frames_of.RST_STREAM)
        assert not connection._calls


async def test_call_ends_at_its_deadline(autojump_clock):
    """A call without an answer ends when its time is up, and is reset; it may have been handled."""
    async with connected() as (connection, server, _):
        with failing(StatusCode.DEADLINE_EXCEEDED):
            await connection.unary(HEADERS, b"", trio.current_time() + 3)
        assert pytest.approx(3) == trio.current_time()
        assert 1 == (await server.hear(frames_of.RST_STREAM))[0]


async def test_shorter_deadline_is_not_held_up_by_a_longer_one(autojump_clock):
    """Deadlines are kept in their own order, not in that of the calls."""
    async with connected() as (connection, _, nursery):
        ended = []

        async def ask(seconds):
            with failing(StatusCode.DEADLINE_EXCEEDED):
                await connection.unary(HEADERS, b"", trio.current_time() + seconds)
            ended.append((seconds, trio.current_time()))

        for seconds in (9, 2, 5):
            nursery.start_soon(ask, seconds)
        await trio.sleep(9.5)
        assert [(2, pytest.approx(2)), (5, pytest.approx(5)), (9, pytest.approx(9))] == ended


async def test_call_that_waited_for_a_free_stream_was_not_sent(autojump_clock):
    """A deadline that passes in the line for a stream, or for the window, says that nothing was sent."""
    async with connected() as (connection, server, nursery):
        await server.say(frames_of.settings({frames_of.MAX_CONCURRENT_STREAMS: 1}))
        await trio.testing.wait_all_tasks_blocked()

        @nursery.start_soon
        async def _():
            with failing(StatusCode.DEADLINE_EXCEEDED, never_sent=True):
                await connection.unary(HEADERS, bytes(100_000), 3.0)

        await trio.testing.wait_all_tasks_blocked()
        with failing(StatusCode.DEADLINE_EXCEEDED, never_sent=True):
            await connection.unary(HEADERS, b"", 2.0)
        await trio.sleep(1.5)


async def test_silent_server_is_given_up(autojump_clock):
    """After 10 s of silence a ping is sent; 4 s later the connection is over, and calls are unknown."""
    async with connected() as (connection, server, nursery):

        @nursery.start_soon
        async def _():
            with failing(StatusCode.UNAVAILABLE, "silent for 14.0 s"):
                await connection.unary(HEADERS, b"", trio.current_time() + 60)

        await server.hear(frames_of.PING)
        assert pytest.approx(10) == trio.current_time()
        with pytest.raises(EOFError):
            await server.hear(frames_of.PING)
        assert pytest.approx(14) == trio.current_time()
        assert not connection.accepts_calls


async def test_first_call_after_a_long_time_asks_for_a_sign_of_life(autojump_clock):
    """A call on a connection that was silent for 10 s is sent with a ping; the answer may serve for both."""
    async with connected() as (connection, server, nursery):
        await trio.sleep(100)
        nursery.start_soon(connection.unary, HEADERS, b"", 160)
        await server.hear(frames_of.PING)
        assert pytest.approx(100) == trio.current_time()
        await trio.sleep(3)
        await server.say(headers(1, *FIRST))
        with trio.move_on_after(9) as scope:
            await server.hear(frames_of.PING)
        assert scope.cancelled_caught
        await server.say(data(1, message(b"")), headers(1, *OK, ends=True))


async def test_short_calls_do_not_keep_a_dead_connection(autojump_clock):
    """Calls that time out one after the other find a dead connection, though each is shorter than the silence."""
    async with connected() as (connection, _, _):
        while connection.accepts_calls:
            with pytest.raises(ChannelError):
                await connection.unary(HEADERS, b"", trio.current_time() + 3)
            assert trio.current_time() < 15
        assert pytest.approx(14) == trio.current_time()


async def test_ping_is_waited_for_after_the_last_call(autojump_clock):
    """An unanswered ping ends the connection even if nobody waits for anything any more."""
    async with connected() as (connection, _, _):
        with failing(StatusCode.DEADLINE_EXCEEDED):
            await connection.unary(HEADERS, b"", 11)
        await trio.sleep(3.5)
        assert not connection.accepts_calls


async def test_call_that_is_cancelled_before_it_begins_sends_nothing(autojump_clock):
    """A call in a scope that is cancelled already leaves no trace on the wire."""
    async with connected() as (connection, server, _):
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.unary(HEADERS, b"", 5.0)
        with trio.move_on_after(1):
            await server.hear(frames_of.HEADERS)
            raise AssertionError


async def test_cancellation_can_end_other_calls(autojump_clock):
    """A call that gets the last stream number because another one was cancelled sends those behind it away."""
    async with connected() as (connection, server, nursery):
        connection._protocol._largest_stream_id = 3
        await server.say(frames_of.settings({frames_of.MAX_CONCURRENT_STREAMS: 1}))
        await trio.testing.wait_all_tasks_blocked()
        first = connection.open(HEADERS)
        connection.open(HEADERS)

        @nursery.start_soon
        async def _():
            with failing(StatusCode.UNAVAILABLE, "no more numbers", never_sent=True):
                await connection.unary(HEADERS, b"", 60)
            assert pytest.approx(1) == trio.current_time()

        await trio.sleep(1)
        first.cancel()
        await trio.sleep(2)


async def test_many_deadlines_are_looked_at_together(autojump_clock, monkeypatch):
    """A thousand calls that end one after the other are not a thousand looks at a thousand calls."""
    async with connected() as (connection, server, nursery):
        await server.say(frames_of.settings({frames_of.MAX_CONCURRENT_STREAMS: 2000}))
        await trio.testing.wait_all_tasks_blocked()
        looks, expire = [], connection._expire
        monkeypatch.setattr(connection, "_expire", lambda now: (looks.append(now), expire(now)))
        late = []

        async def ask(deadline):
            with failing(StatusCode.DEADLINE_EXCEEDED):
                await connection.unary(HEADERS, b"", deadline)
            late.append(trio.current_time() - deadline)

        for number in range(1000):
            nursery.start_soon(ask, 3 + number / 1000)
        await trio.sleep(5)
        assert 1000 == len(late)
        assert len(looks) <= 1 / 0.005 + 2
        assert 0 <= min(late) <= max(late) < 0.006


@pytest.mark.parametrize("end", ["deadline", "cancellation"])
async def test_calls_given_up_together_do_not_begin_one_another(autojump_clock, end):
    """Those in line behind a call that is given up with them were never sent, and never are."""
    async with connected() as (connection, server, nursery):
        await server.say(frames_of.settings({frames_of.MAX_CONCURRENT_STREAMS: 1}))
        await trio.testing.wait_all_tasks_blocked()
        ends = []

        async def ask(number):
            with pytest.raises(ChannelError) as caught:
                await connection.unary(HEADERS, b"%d" % number, 3.0)
            ends.append((caught.value.code, caught.value.never_sent))

        async with trio.open_nursery() as callers:
            for number in range(5):
                callers.start_soon(ask, number)
                await trio.testing.wait_all_tasks_blocked()
            if end == "cancellation":
                callers.cancel_scope.cancel()
        expired = StatusCode.DEADLINE_EXCEEDED
        given_up = [(expired, False), *[(expired, True)] * 4] if end == "deadline" else []
        assert given_up == sorted(ends)
        nursery.start_soon(connection.unary, HEADERS, b"next", 9.0)
        assert [(1, message(b"0")), (3, message(b"next"))] == [
            await server.hear(frames_of.DATA) for _ in range(2)
        ]
        nursery.cancel_scope.cancel()


async def test_server_that_stops_reading_does_not_get_what_was_given_up(autojump_clock):
    """When the server closes its side, a request that was not written yet stays unwritten."""
    async with connected() as (connection, server, nursery):

        @nursery.start_soon
        async def _():
            with failing(StatusCode.UNAVAILABLE, "closed", never_sent=True):
                await connection.unary(HEADERS, bytes(70_000), 5.0)

        await server.hear(frames_of.HEADERS)
        await server.stream.send_eof()
        heard = 0
        with pytest.raises(EOFError):
            while True:
                heard += len((await server.hear(frames_of.DATA))[1])
        assert 65_535 == heard


async def test_server_that_answers_pings_is_kept(autojump_clock):
    """A call may wait as long as it likes on a server that shows that it lives."""
    async with connected() as (connection, server, nursery):
        pings = 0

        @nursery.start_soon
        async def _():
            nonlocal pings
            with trio.move_on_after(98):
                while True:
                    _, payload = await server.hear(frames_of.PING)
                    await server.say(frames_of.ping(payload, ack=True))
                    pings += 1

        stream = connection.open(HEADERS)
        with trio.move_on_after(99):
            await stream.receive()
        assert connection.accepts_calls
        assert 9 == pings


async def test_idle_connection_is_not_pinged(autojump_clock):
    """Without calls there are no pings: the server would take offence."""
    async with connected() as (connection, server, _):
        with trio.move_on_after(300) as scope:
            await server.hear(frames_of.PING)
        assert scope.cancelled_caught
        assert connection.accepts_calls


async def test_server_that_does_not_greet_is_given_up(autojump_clock):
    """A server that accepts and says nothing is left at the dial timeout."""
    async with connected(greet=False) as (connection, server, _):
        with pytest.raises(EOFError):
            await server.hear(frames_of.PING)
        assert pytest.approx(2) == trio.current_time()
        assert "says nothing" in connection.fact


async def test_closed_connection_ends_every_call(autojump_clock):
    """When the server closes, calls end as unknown and streams end, messages first."""
    async with connected() as (connection, server, nursery):

        @nursery.start_soon
        async def _():
            with failing(StatusCode.UNAVAILABLE, "closed"):
                await connection.unary(HEADERS, b"", 5.0)

        stream = connection.open(HEADERS)
        await trio.testing.wait_all_tasks_blocked()
        await server.say(headers(1, *FIRST), data(1, message(b"last")))
        await server.stream.aclose()
        assert b"last" == await stream.receive()
        with failing(StatusCode.UNAVAILABLE, "closed"):
            await stream.receive()
        with failing(StatusCode.UNAVAILABLE, "closed"):
            await stream.receive()


async def test_draining_connection_ends_after_its_last_call(autojump_clock):
    """After GOAWAY the calls that the server still serves finish; then the connection is closed."""
    async with connected() as (connection, server, nursery):
        found = []

        @nursery.start_soon
        async def _():
            found.append(await connection.unary(HEADERS, b"", 5.0))

        await server.hear(frames_of.DATA)
        await server.say(frames_of.frame(frames_of.GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4)))
        await trio.testing.wait_all_tasks_blocked()
        assert not connection.accepts_calls
        await server.say(answer(1, b"x"))
        with pytest.raises(EOFError):
            await server.hear(frames_of.PING)
        assert [b"x"] == found


async def test_draining_connection_ends_when_its_last_call_is_cancelled(autojump_clock):
    """A connection that takes no more calls is closed when the last one is given up, too."""
    async with connected() as (connection, server, _):
        stream = connection.open(HEADERS)
        await server.hear(frames_of.HEADERS)
        await server.say(frames_of.frame(frames_of.GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4)))
        await trio.testing.wait_all_tasks_blocked()
        assert not connection.accepts_calls
        stream.cancel()
        with trio.fail_after(1), pytest.raises(EOFError):
            await server.hear(frames_of.PING)


async def test_server_is_told_what_it_did_wrong(autojump_clock):
    """A fault of the server is answered by GOAWAY before the connection is closed."""
    async with connected() as (connection, server, _):
        await server.say(frames_of.frame(frames_of.PING, 0, 0, b"short"))
        _, payload = await server.hear(frames_of.GOAWAY)
        assert ErrorCode.FRAME_SIZE_ERROR == int.from_bytes(payload[4:8], "big")
        with pytest.raises(EOFError):
            await server.hear(frames_of.PING)
        assert not connection.accepts_calls


async def test_wrong_number_of_answers_is_an_error(autojump_clock):
    """A unary call has one answer: none, or two, is no answer."""
    async with connected() as (connection, server, nursery):
        for number, said in ((1, b""), (3, message(b"a") + message(b"b"))):

            @nursery.start_soon
            async def _(expected=number):
                with failing(StatusCode.INTERNAL, "answers instead of one"):
                    await connection.unary(HEADERS, b"", 5.0)

            await trio.testing.wait_all_tasks_blocked()
            await server.say(headers(number, *FIRST), data(number, said), headers(number, *OK, ends=True))
        await trio.testing.wait_all_tasks_blocked()
        assert not connection._calls


async def test_receive_may_be_cancelled(autojump_clock):
    """A cancelled `receive` loses nothing."""
    async with connected() as (connection, server, _):
        stream = connection.open(HEADERS)
        with trio.move_on_after(1):
            await stream.receive()
        await server.hear(frames_of.HEADERS)
        await server.say(headers(1, *FIRST), data(1, message(b"x")))
        assert b"x" == await stream.receive()
        stream.cancel()
        assert 1 == (await server.hear(frames_of.RST_STREAM))[0]


async def test_server_that_stops_reading_holds_up_nobody_for_ever(autojump_clock):
    """When nothing more can be written, calls still end at their deadlines, and the connection in the end."""
    async with connected() as (connection, _, nursery):
        connection._transport.send_stream.send_all_hook = trio.sleep_forever

        @nursery.start_soon
        async def _():
            # It never got beyond us: what is written first is the answer to the greeting.
            with failing(StatusCode.UNAVAILABLE, "silent|reads nothing", never_sent=True):
                await connection.unary(HEADERS, b"", 60)

        await trio.testing.wait_all_tasks_blocked()
        with failing(StatusCode.DEADLINE_EXCEEDED):
            await connection.unary(HEADERS, b"", 5.0)
        assert pytest.approx(5) == trio.current_time()
        await trio.sleep(10)
        assert not connection.accepts_calls


async def test_server_that_talks_and_does_not_read_is_left(autojump_clock):
    """Signs of life are none if nothing is taken for as long as a dead connection may live."""
    async with connected() as (connection, server, nursery):
        connection._transport.send_stream.send_all_hook = trio.sleep_forever

        @nursery.start_soon
        async def _():
            with failing(StatusCode.UNAVAILABLE, "reads nothing", never_sent=True):
                await connection.unary(HEADERS, b"", 60)

        for _ in range(20):
            await trio.sleep(1)
            if connection.accepts_calls:
                await server.say(frames_of.settings({}))
        assert not connection.accepts_calls


# ── a compliant peer ────────────────────────────────────────────────────────────────────────────


class Echo:
    """A gRPC server made of the `h2` package: it echoes each message, and remembers the headers."""

    def __init__(self, stream):
        self._stream = stream
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self._h2 = h2.connection.H2Connection(config)
        self._received = {}
        self._to_send = {}
        self.headers = {}

    async def run(self):
        """Serve until the client leaves."""
        self._h2.initiate_connection()
        while True:
            await self._stream.send_all(self._h2.data_to_send())
            received = await self._stream.receive_some()
            if not received:
                return
            for event in self._h2.receive_data(received):
                self._handle(event)
            self._send()

    def _handle(self, event):
        if isinstance(event, h2.events.RequestReceived):
            self.headers[event.stream_id] = dict(event.headers)
            self._received[event.stream_id] = b""
        elif isinstance(event, h2.events.DataReceived):
            self._received[event.stream_id] += event.data
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self._h2.send_headers(event.stream_id, FIRST)
            self._to_send[event.stream_id] = self._received.pop(event.stream_id)

    def _send(self):
        for stream_id, rest in list(self._to_send.items()):
            while rest and (room := min(self._h2.local_flow_control_window(stream_id), 16_384)):
                self._h2.send_data(stream_id, rest[:room])
                rest = rest[room:]  # noqa: PLW2901
            self._to_send[stream_id] = rest
            if not rest:
                del self._to_send[stream_id]
                self._h2.send_headers(stream_id, OK, end_stream=True)


async def memory_pair():
    """Both ends of a connection in memory."""
    return trio.testing.memory_stream_pair()


@pytest.mark.parametrize("pair", [memory_pair, tcp_pair])
async def test_compliant_peer_understands_us(pair):
    """With the `h2` package as the peer, requests and answers of any size arrive whole, and so do headers."""
    ours, theirs = await pair()
    ready = trio.Event()
    connection = Connection(ours, ready_by=trio.current_time() + 2.0, on_ready=ready.set)
    echo = Echo(theirs)
    requests = [b"", b"small", bytes(range(256)) * 6_000, bytes(70_000), bytes(9 * 1024 * 1024)]

    async def ask(request):
        assert request == await connection.unary(HEADERS, request, trio.current_time() + 60)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo.run)
        nursery.start_soon(connection.serve)
        await ready.wait()
        for request in requests:
            await ask(request)
        async with trio.open_nursery() as callers:
            for request in requests:
                callers.start_soon(ask, request)
        await connection.aclose()
    await theirs.aclose()

    assert {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/p.S/M",
        ":authority": "etcd:2379",
        "te": "trailers",
        "content-type": "application/grpc",
        "user-agent": "etcd-infra",
        "grpc-timeout": "5000m",
        "hasleader": "true",
    } == echo.headers[1]
