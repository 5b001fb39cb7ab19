"""The TCP connection under HTTP/2, and what is written to it without waiting."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from etcd_infra._backends import http2_frames as frames_of
from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.grpc_headers import RequestHeaders
from etcd_infra._backends.http2_connection import Connection
from etcd_infra._backends.status import StatusCode
from tests.helpers.http2_server import GREETING, answer, frames
from tests.helpers.tcp import tcp_pair

HEADERS = RequestHeaders("etcd:2379").block("/p.S/M", 5.0, ())
BUFFER_BYTES = 4096


@asynccontextmanager
async def connected(**options):
    """Open a connection over TCP to a test, which is the server and has read the greeting."""
    ours, theirs = await tcp_pair(**options)
    ready = trio.Event()
    connection = Connection(ours, ready_by=trio.current_time() + 5.0, on_ready=ready.set)
    async with trio.open_nursery() as nursery, theirs:
        nursery.start_soon(connection.serve)
        await theirs.send_all(GREETING + frames_of.window_update(0, 1024 * 1024))
        await ready.wait()
        await trio.testing.wait_all_tasks_blocked()
        await theirs.receive_some()
        yield connection, theirs, nursery
        await connection.aclose()


def spied(connection, monkeypatch):
    """Note what is written at once, and in which turn."""
    written = []
    send_now = connection._transport.send_now

    def spy(data):
        written.append((trio.lowlevel.current_task().name, len(frames(data))))
        return send_now(data)

    monkeypatch.setattr(connection._transport, "send_now", spy)
    return written


async def fill(end):
    """Write until the system takes nothing more, also after it has moved what it took."""
    took = True
    while took:
        took = False
        while end.send_now(bytes(65_536)):
            took = True
        await trio.sleep(0.02)


async def test_it_is_a_stream_like_trios():
    """Whatever Trio asks of a stream holds: arguments, errors, closing under a task that waits."""

    async def clogged_pair():
        ours, theirs = await tcp_pair()
        for end in (ours, theirs):
            await fill(end)
        return ours, theirs

    await trio.testing.check_two_way_stream(tcp_pair, clogged_pair)


async def test_writing_at_once_neither_waits_nor_raises():
    """A full connection takes a part and then nothing, and a closed one nothing."""
    ours, theirs = await tcp_pair(buffer_bytes=BUFFER_BYTES)
    said = bytes(range(256)) * 4096
    sent = 0
    while some := ours.send_now(said[sent:]):
        sent += some
    assert 0 < sent < len(said)
    assert said[:4096] == await theirs.receive_some(4096)
    await theirs.aclose()
    await ours.aclose()
    assert not ours.send_now(b"late")


async def test_wake_up_without_bytes_waits_again(monkeypatch):
    """A system that says "readable" too early is asked again; nothing is taken for the end of the connection."""
    ours, theirs = await tcp_pair()
    wait_readable, waits = trio.lowlevel.wait_readable, []

    async def early_once(socket):
        waits.append(1)
        if len(waits) > 1:
            await wait_readable(socket)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", early_once)
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(theirs.send_all, b"late")
        assert b"late" == await ours.receive_some()
    assert waits


async def test_lone_call_does_not_wait_for_the_writer(monkeypatch):
    """A call that is alone is written by its own task, whatever streams are open beside it."""
    async with connected() as (connection, server, nursery):
        watch = connection.open(HEADERS)
        await trio.testing.wait_all_tasks_blocked()
        await server.receive_some()
        written = spied(connection, monkeypatch)
        for number in range(3):
            nursery.start_soon(connection.unary, HEADERS, b"", trio.current_time() + 5.0, name=f"call {number}")
            await trio.testing.wait_all_tasks_blocked()
            await server.send_all(answer(3 + 2 * number, b"re"))
            await trio.testing.wait_all_tasks_blocked()
        assert [("call 0", 2), ("call 1", 2), ("call 2", 2)] == written
        watch.cancel()


async def test_calls_beside_one_another_leave_together(monkeypatch):
    """While one call is on its way, ten more that are made at once are one write."""
    async with connected() as (connection, _, nursery):
        written = spied(connection, monkeypatch)
        for number in range(11):
            nursery.start_soon(connection.unary, HEADERS, b"", trio.current_time() + 5.0, name=f"call {number}")
            if number == 0:
                await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert [2, 20] == [count for _, count in written]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_frame_is_never_cut_by_another(is_cancelled):
    """What is said while a lone call's bytes are half written comes after them, a reset and other calls too."""
    requests = [bytes([number]) * 60_000 for number in range(4)]
    async with connected(buffer_bytes=BUFFER_BYTES) as (connection, server, nursery):
        first = trio.CancelScope()

        async def ask(request, scope):
            with scope:
                await connection.unary(HEADERS, request, trio.current_time() + 5.0)

        nursery.start_soon(ask, requests[0], first)
        await trio.testing.wait_all_tasks_blocked()
        assert connection._unsent
        if is_cancelled:
            first.cancel()
            # So that the next call is alone again, whichever task Trio would run first.
            await trio.testing.wait_all_tasks_blocked()
        for request in requests[1:]:
            nursery.start_soon(ask, request, trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked()
        heard, ended = b"", set()
        expected = {3, 5, 7} if is_cancelled else {1, 3, 5, 7}
        with trio.fail_after(5):
            while not ended >= expected:
                heard += await server.receive_some()
                ended = {stream for kind, flags, stream, _ in whole(heard) if kind == frames_of.DATA and flags}
        asked = dict.fromkeys(expected, b"")
        for kind, _, stream, payload in whole(heard):
            assert kind in {frames_of.HEADERS, frames_of.DATA, frames_of.RST_STREAM, frames_of.SETTINGS}
            if kind == frames_of.DATA and stream in asked:
                asked[stream] += payload[5:] if not asked[stream] else payload
        assert {stream: requests[stream // 2] for stream in expected} == asked
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("last", "never_sent"), [(0, True), (1, False)])
async def test_server_that_goes_away_while_bytes_wait(last, never_sent):
    """Half a request is written: a call above the last one was not handled, the last one goes on to its answer."""
    farewell = frames_of.frame(frames_of.GOAWAY, 0, 0, last.to_bytes(4, "big") + bytes(4))
    async with connected(buffer_bytes=BUFFER_BYTES) as (connection, server, nursery):
        outcomes = []

        async def ask():
            try:
                outcomes.append(await connection.unary(HEADERS, bytes(60_000), trio.current_time() + 5.0))
            except ChannelError as error:
                outcomes.append((error.code, error.never_sent))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert connection._unsent
        await server.send_all(farewell)
        await trio.testing.wait_all_tasks_blocked()
        assert not connection.accepts_calls
        if never_sent:
            assert [(StatusCode.UNAVAILABLE, True)] == outcomes
            return
        with trio.fail_after(5):
            while connection._unsent:
                await server.receive_some()
            await server.send_all(answer(1, b"told"))
            while not outcomes:
                await trio.sleep(0.001)
        assert [b"told"] == outcomes


async def test_connection_that_breaks_while_bytes_wait():
    """Half a request may have been read; one behind it in line for a stream was not."""
    async with connected(buffer_bytes=BUFFER_BYTES) as (connection, server, nursery):
        await server.send_all(frames_of.settings({frames_of.MAX_CONCURRENT_STREAMS: 1}))
        await trio.testing.wait_all_tasks_blocked()
        outcomes = []

        async def ask(number):
            with pytest.raises(ChannelError) as failure:
                await connection.unary(HEADERS, bytes(60_000), trio.current_time() + 5.0)
            outcomes.append((number, failure.value.code, failure.value.never_sent))

        for number in range(2):
            nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
        assert connection._unsent
        await server.aclose()
        with trio.fail_after(5):
            while len(outcomes) < 2:
                await trio.sleep(0.001)
        assert [(0, StatusCode.UNAVAILABLE, False), (1, StatusCode.UNAVAILABLE, True)] == sorted(outcomes)


async def test_lone_call_on_a_broken_connection_may_have_been_sent():
    """The system refuses the bytes: the writer finds out why, and the call ends as one that may have been read."""
    async with connected() as (connection, server, _):
        connection._transport._socket.shutdown(1)
        with pytest.raises(ChannelError) as failure:
            await connection.unary(HEADERS, b"", trio.current_time() + 5.0)
        assert (StatusCode.UNAVAILABLE, False) == (failure.value.code, failure.value.never_sent)
        await server.aclose()


def whole(heard):
    """Return the frames that have arrived as a whole."""
    end = 0
    while end + 9 <= len(heard):
        length = 9 + int.from_bytes(heard[end : end + 3], "big")
        if end + length > len(heard):
            break
        end += length
    return frames(heard[:end])
