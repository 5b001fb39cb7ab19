"""HTTP/2 and gRPC without I/O: what each side's bytes mean."""

from __future__ import annotations

import pytest

from etcd_infra._backends import http2_frames as h2
from etcd_infra._backends.http2_frames import ErrorCode
from etcd_infra._backends.http2_protocol import CONNECTION_WINDOW, MessageReceived, StreamEnded
from etcd_infra._backends.http2_stream import STREAM_WINDOW
from etcd_infra._backends.status import StatusCode
from tests.helpers.http2_server import (
    FIRST,
    GREETING,
    HEADERS,
    OK,
    answer,
    block,
    data,
    frames,
    greeted,
    headers,
    message,
)


def ending(events):
    """Return how the only call ended: code, details, never sent."""
    (end,) = [event for event in events if isinstance(event, StreamEnded)]
    return end.code, end.details, end.never_sent


def kinds(written):
    """Return the kinds of the frames."""
    return [kind for kind, *_ in frames(written)]


# ── a call ──────────────────────────────────────────────────────────────────────────────────────


def test_answer_is_a_message_and_an_end():
    """An ordinary answer is one message, then an end with the server's status."""
    protocol = greeted()
    stream = protocol.call(HEADERS, b"ask")
    events = protocol.receive(answer(1, b"told"))

    assert [MessageReceived(stream, b"told"), StreamEnded(stream, 0, "", never_sent=False)] == events
    assert 0 == protocol.open_calls


def test_request_is_headers_and_data_that_ends():
    """A unary request is one HEADERS and one DATA frame, which ends the stream."""
    protocol = greeted()
    protocol.call(HEADERS, b"ask")

    assert [
        (h2.HEADERS, h2.END_HEADERS, 1, HEADERS),
        (h2.DATA, h2.END_STREAM, 1, message(b"ask")),
    ] == frames(protocol.take())


def test_streams_have_odd_numbers_that_grow():
    """Calls are streams 1, 3, 5; answers come in any order."""
    protocol = greeted()
    one, two, three = (protocol.call(HEADERS, b"") for _ in range(3))
    events = protocol.receive(answer(5, b"c") + answer(1, b"a") + answer(3, b"b"))

    assert (1, 3, 5) == (one.id, two.id, three.id)
    assert [(three, b"c"), (one, b"a"), (two, b"b")] == [
        e[:2] for e in events if isinstance(e, MessageReceived)
    ]


def test_greeting_is_made_and_acknowledged():
    """The preface and our settings go first; the server's settings are acknowledged."""
    protocol = greeted()
    fresh = type(protocol)()
    assert not fresh.is_ready
    written = fresh.take()
    assert written.startswith(h2.PREFACE)
    assert [h2.SETTINGS, h2.WINDOW_UPDATE] == kinds(written)
    fresh.receive(GREETING)
    assert fresh.is_ready
    assert [(h2.SETTINGS, h2.ACK, 0, b"")] == frames(fresh.take())


def test_open_stream_goes_both_ways():
    """A stream carries messages in both directions until one side ends it."""
    protocol = greeted()
    stream = protocol.open(HEADERS)
    protocol.send(stream, b"one")
    protocol.send(stream, b"two")
    assert [h2.HEADERS, h2.DATA, h2.DATA] == kinds(protocol.take())
    events = protocol.receive(headers(1, *FIRST) + data(1, message(b"a") + message(b"b") + message(b"")))
    assert [b"a", b"b", b""] == [event.message for event in events]
    assert (0, "", False) == ending(protocol.receive(headers(1, *OK, ends=True)))
    # The server ended it in the middle of what we might say.
    assert [(h2.RST_STREAM, 0, 1, b"\0\0\0\x08")] == frames(protocol.take())
    protocol.send(stream, b"late")
    assert not protocol.has_output


def test_cancelled_call_is_reset_and_its_answer_is_ignored():
    """Cancelling resets the stream; what comes for it afterwards is nobody's."""
    protocol = greeted()
    stream = protocol.call(HEADERS, b"ask")
    protocol.take()
    protocol.cancel(stream)
    protocol.cancel(stream)
    assert [(h2.RST_STREAM, 0, 1, b"\0\0\0\x08")] == frames(protocol.take())
    assert [] == protocol.receive(answer(1, b"late") + h2.rst_stream(1, 8) + h2.window_update(1, 5))
    assert not protocol.is_broken


# ── how answers can end ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("said", "code", "details"),
    [
        (
            headers(1, *FIRST, ("grpc-status", "5"), ("grpc-message", "not%20found%3A 100%25"), ends=True),
            5,
            "not found: 100%",
        ),
        (headers(1, *FIRST, ("grpc-status", "14"), ends=True), 14, ""),
        (headers(1, *FIRST, ("grpc-status", "x"), ends=True), 2, ""),
        (headers(1, *FIRST, ("grpc-status", "99"), ends=True), 99, ""),
        (headers(1, *FIRST, ("grpc-status", "5"), ("grpc-message", "%ff%zz"), ends=True), 5, "\ufffd%zz"),
        (headers(1, *FIRST, ends=True), 13, "without a status"),
        (headers(1, *FIRST) + data(1, message(b"x"), ends=True), 13, "without a status"),
        (headers(1, *FIRST) + headers(1, ("x", "y"), ends=True), 13, "without a status"),
        (
            headers(1, *FIRST) + data(1, message(b"xyz")[:-1]) + headers(1, *OK, ends=True),
            13,
            "within a message",
        ),
        (
            headers(1, *FIRST)
            + data(1, message(b"xyz")[:-1])
            + headers(1, ("grpc-status", "14"), ("grpc-message", "gone"), ends=True),
            14,
            "gone",
        ),
        (headers(1, *FIRST) + data(1, b"\1\0\0\0\0"), 13, "compression flag 1"),
        (headers(1, *FIRST, ("grpc-encoding", "gzip")), 13, "gzip"),
        (headers(1, (":status", "200"), ("content-type", "text/html")), 2, "text/html"),
        (headers(1, (":status", "503"), ends=True), 14, "HTTP status 503"),
        (headers(1, (":status", "503"), *OK, ends=True), 14, "HTTP status 503"),
        (headers(1, (":status", "429")), 14, "429"),
        (headers(1, (":status", "404")), 12, "404"),
        (headers(1, (":status", "401")), 16, "401"),
        (headers(1, (":status", "403")), 7, "403"),
        (headers(1, (":status", "400")), 13, "400"),
        (headers(1, (":status", "418")), 2, "418"),
        (headers(1, ("content-type", "application/grpc")), 13, "without an HTTP status"),
        (headers(1, *FIRST) + headers(1, *FIRST), 13, "in the middle"),
        (data(1, message(b"x")), 13, "before the answer's headers"),
        (h2.rst_stream(1, ErrorCode.CANCEL), 1, "CANCEL"),
        (h2.rst_stream(1, ErrorCode.ENHANCE_YOUR_CALM), 8, "ENHANCE_YOUR_CALM"),
        (h2.rst_stream(1, ErrorCode.INADEQUATE_SECURITY), 7, "INADEQUATE_SECURITY"),
        (h2.rst_stream(1, ErrorCode.INTERNAL_ERROR), 13, "INTERNAL_ERROR"),
        (h2.rst_stream(1, 77), 13, "error 77"),
        (h2.window_update(1, 2**31 - 1), 13, "window"),
        (h2.window_update(1, 0), 13, "window"),
    ],
)
def test_bad_end_is_a_status(said, code, details):
    """Whatever ends one call badly is a status with the reason, may have been applied, and hurts no other."""
    protocol = greeted()
    protocol.call(HEADERS, b"ask")
    other = protocol.call(HEADERS, b"ask")
    protocol.take()
    found = ending(protocol.receive(said))

    assert (code, False) == (found[0], found[2])
    assert details in found[1]
    assert [MessageReceived(other, b"ok")] == protocol.receive(answer(3, b"ok"))[:1]


def test_informational_headers_are_skipped():
    """Headers with a status of 1xx come before the answer's own."""
    protocol = greeted()
    protocol.call(HEADERS, b"")
    assert [] == protocol.receive(headers(1, (":status", "103"), ("link", "x")))
    assert b"x" == protocol.receive(answer(1, b"x"))[0].message


def test_refused_stream_was_never_handled():
    """REFUSED_STREAM says that the request was not looked at, though it was sent."""
    protocol = greeted()
    protocol.call(HEADERS, b"")
    protocol.take()
    assert (14, True) == ending(protocol.receive(h2.rst_stream(1, ErrorCode.REFUSED_STREAM)))[::2]


def test_refusal_after_an_answer_is_unknown():
    """REFUSED_STREAM from a server that has begun to answer proves nothing."""
    protocol = greeted()
    protocol.call(HEADERS, b"")
    protocol.take()
    said = headers(1, *FIRST) + h2.rst_stream(1, ErrorCode.REFUSED_STREAM)
    assert (14, False) == ending(protocol.receive(said))[::2]


# ── how connections end ─────────────────────────────────────────────────────────────────────────


def test_end_of_connection_tells_what_was_sent():
    """When the connection ends, calls that were written are unknown, those that were not are not sent."""
    protocol = greeted()
    written = protocol.call(HEADERS, b"")
    protocol.take()
    unwritten = protocol.call(HEADERS, b"")
    events = protocol.receive(b"")

    assert {written: False, unwritten: True} == {event.stream: event.never_sent for event in events}
    assert {StatusCode.UNAVAILABLE} == {event.code for event in events}
    assert (True, False, 0) == (protocol.is_broken, protocol.accepts_calls, protocol.open_calls)
    assert [] == protocol.receive(answer(1, b"x"))


@pytest.mark.parametrize("said", [b"", h2.ping(b"short")])
def test_request_that_was_not_sent_never_is(said):
    """A call that ends as never sent leaves no byte to be written after that, even if the server still reads."""
    protocol = greeted()
    protocol.call(HEADERS, b"ask")
    assert (14, True) == ending(protocol.receive(said))[::2]
    assert [h2.GOAWAY] * bool(said) == kinds(protocol.take())


def test_reset_of_a_request_on_its_way_is_unknown():
    """A reset does not call back the end of a request that is among what is to be written."""
    protocol = greeted()
    protocol.call(HEADERS, b"ask")
    assert (13, False) == ending(protocol.receive(h2.rst_stream(1, ErrorCode.INTERNAL_ERROR)))[::2]
    assert [h2.HEADERS, h2.DATA] == kinds(protocol.take())
    protocol.call(HEADERS, bytes(100_000))
    assert (13, True) == ending(protocol.receive(h2.rst_stream(3, ErrorCode.INTERNAL_ERROR)))[::2]


def test_stream_that_was_opened_was_sent():
    """A stream that stays open counts as sent once its headers were taken."""
    protocol = greeted()
    protocol.open(HEADERS)
    protocol.take()
    assert (13, False) == ending(protocol.receive(h2.rst_stream(1, ErrorCode.INTERNAL_ERROR)))[::2]


def test_request_that_was_written_in_part_was_not_sent():
    """A request whose last byte waits for the window can not have been handled."""
    protocol = greeted()
    stream = protocol.call(HEADERS, bytes(100_000))
    protocol.take()
    assert not stream.is_complete
    assert (14, True) == ending(protocol.close("given up"))[::2]


def test_goaway_ends_later_calls_only():
    """GOAWAY: calls above the last stream were not handled, the others finish, new ones go elsewhere."""
    protocol = greeted()
    first, second = protocol.call(HEADERS, b""), protocol.call(HEADERS, b"")
    protocol.take()
    assert [] == protocol.receive(goaway(2**31 - 1, ErrorCode.NO_ERROR))
    events = protocol.receive(goaway(1, ErrorCode.ENHANCE_YOUR_CALM, b"too_many_pings"))

    assert [(second, 14, True)] == [(e.stream, e.code, e.never_sent) for e in events]
    assert "ENHANCE_YOUR_CALM too_many_pings" in events[0].details
    assert not protocol.accepts_calls
    assert [MessageReceived(first, b"x")] == protocol.receive(answer(1, b"x"))[:1]


def test_goaway_below_an_answered_call_is_no_proof():
    """A server that answers a call and then says that it never saw it contradicts itself: the outcome is unknown."""
    protocol = greeted()
    first, second = protocol.call(HEADERS, b""), protocol.call(HEADERS, b"")
    protocol.take()
    protocol.receive(headers(3, *FIRST))
    events = protocol.receive(goaway(0, ErrorCode.NO_ERROR))
    assert [(first, True), (second, False)] == [(event.stream, event.never_sent) for event in events]


def test_farewell_is_short():
    """However much there is to say about what the server did wrong, it fits into its smallest frame."""
    assert len(h2.goaway(ErrorCode.PROTOCOL_ERROR, "x" * 100_000)) < 1000


def goaway(last, code, said=b""):
    return h2.frame(h2.GOAWAY, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big") + said)


FAULTS = {
    "frame too long": (h2.frame(h2.DATA, 0, 1, bytes(16_385)), ErrorCode.FRAME_SIZE_ERROR),
    "stream nobody opened": (headers(3, *FIRST), ErrorCode.PROTOCOL_ERROR),
    "stream of the server": (headers(2, *FIRST), ErrorCode.PROTOCOL_ERROR),
    "data on no stream": (data(0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "no hpack": (
        h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\xff"),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "dynamic table": (h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xbe"), ErrorCode.COMPRESSION_ERROR),
    "push": (h2.frame(h2.PUSH_PROMISE, h2.END_HEADERS, 1, b"\0\0\0\2\x83"), ErrorCode.PROTOCOL_ERROR),
    "padding beyond the frame": (h2.frame(h2.DATA, h2.PADDED, 1, b"\x05abc"), ErrorCode.PROTOCOL_ERROR),
    "padding instead of content": (h2.frame(h2.DATA, h2.PADDED, 1, b"\x04abc"), ErrorCode.PROTOCOL_ERROR),
    "empty padded": (h2.frame(h2.HEADERS, h2.PADDED, 1, b""), ErrorCode.PROTOCOL_ERROR),
    "short priority": (h2.frame(h2.HEADERS, h2.HAS_PRIORITY, 1, b"\0\0"), ErrorCode.FRAME_SIZE_ERROR),
    "continuation of nothing": (h2.frame(h2.CONTINUATION, 0, 1, b""), ErrorCode.PROTOCOL_ERROR),
    "interrupted headers": (h2.frame(h2.HEADERS, 0, 1, b"") + h2.ping(bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "headers interrupted by their own stream": (
        h2.frame(h2.HEADERS, 0, 1, b"") + h2.frame(h2.DATA, h2.END_HEADERS, 1, block(*FIRST)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "other's continuation": (
        h2.frame(h2.HEADERS, 0, 1, b"") + h2.frame(h2.CONTINUATION, 4, 3, b""),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "continuations without end": (
        h2.frame(h2.HEADERS, 0, 1, b"") + h2.frame(h2.CONTINUATION, 0, 1, b"") * 100,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "headers without end": (
        h2.frame(h2.HEADERS, 0, 1, b"") + h2.frame(h2.CONTINUATION, 0, 1, bytes(16_384)) * 10,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "header list": (
        h2.frame(h2.HEADERS, 0, 1, block(("x", "y" * 16_000)))
        + h2.frame(h2.CONTINUATION, 0, 1, block(("x", "y" * 16_000))) * 6
        + h2.frame(h2.CONTINUATION, 4, 1, b""),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "ping of 7": (h2.frame(h2.PING, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
    "ping on a stream": (h2.frame(h2.PING, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "ping flood": (h2.ping(bytes(8)) * 20_000, ErrorCode.ENHANCE_YOUR_CALM),
    "settings flood": (h2.settings({}) * 20_000, ErrorCode.ENHANCE_YOUR_CALM),
    "settings of 5": (h2.frame(h2.SETTINGS, 0, 0, bytes(5)), ErrorCode.FRAME_SIZE_ERROR),
    "settings on a stream": (h2.frame(h2.SETTINGS, 0, 1, b""), ErrorCode.FRAME_SIZE_ERROR),
    "settings ack with content": (h2.frame(h2.SETTINGS, h2.ACK, 0, bytes(6)), ErrorCode.FRAME_SIZE_ERROR),
    "window setting": (h2.settings({h2.INITIAL_WINDOW_SIZE: 2**31}), ErrorCode.FLOW_CONTROL_ERROR),
    "window setting on top": (
        h2.window_update(1, 2**31 - 1 - 65_535) + h2.settings({h2.INITIAL_WINDOW_SIZE: 80_000}),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "frame setting": (h2.settings({h2.MAX_FRAME_SIZE: 5}), ErrorCode.PROTOCOL_ERROR),
    "connection window": (h2.window_update(0, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR),
    "connection window by 0": (h2.window_update(0, 0), ErrorCode.FLOW_CONTROL_ERROR),
    "window of 3": (h2.frame(h2.WINDOW_UPDATE, 0, 0, bytes(3)), ErrorCode.FRAME_SIZE_ERROR),
    "reset of 3": (h2.frame(h2.RST_STREAM, 0, 1, bytes(3)), ErrorCode.FRAME_SIZE_ERROR),
    "reset of nobody": (h2.rst_stream(99, 0), ErrorCode.PROTOCOL_ERROR),
    "short goaway": (h2.frame(h2.GOAWAY, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
    "goaway on a stream": (h2.frame(h2.GOAWAY, 0, 1, bytes(8)), ErrorCode.FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_the_connection_ends_it(name):
    """What breaks the protocol ends the connection: calls are unknown, the server is told why."""
    said, code = FAULTS[name]
    protocol = greeted()
    protocol.call(HEADERS, b"ask")
    protocol.take()
    status, details, never_sent = ending(protocol.receive(said))

    assert (StatusCode.UNAVAILABLE, False) == (status, never_sent)
    assert code.name in details
    kind, _, _, payload = frames(protocol.take())[-1]
    assert (h2.GOAWAY, code) == (kind, int.from_bytes(payload[4:8], "big"))
    assert protocol.is_broken


def test_server_that_does_not_greet_first_is_left():
    """Anything before SETTINGS is no HTTP/2 server; the request was not even written."""
    protocol = type(greeted())()
    protocol.call(HEADERS, b"")
    assert (14, True) == ending(protocol.receive(b"HTTP/1.1 400 Bad Request\r\n\r\n"))[::2]


# ── flow control ────────────────────────────────────────────────────────────────────────────────


def test_big_request_waits_for_both_windows():
    """A request of 1.5 MiB leaves in pieces as the windows of stream and connection are widened."""
    protocol = greeted()
    request = bytes(range(256)) * 6 * 1024
    stream = protocol.call(HEADERS, request)
    sent = b""
    for _ in range(200):
        pieces = [payload for kind, _, _, payload in frames(protocol.take()) if kind == h2.DATA]
        assert all(len(piece) <= 16_384 for piece in pieces)
        sent += b"".join(pieces)
        if stream.is_complete:
            break
        assert len(sent) <= 65_535 * 100
        protocol.receive(h2.window_update(0, 20_000))
        assert not protocol.has_output or stream.send_window > 0
        protocol.receive(h2.window_update(1, 20_000))

    assert message(request) == sent
    assert stream.handed_over


def test_small_call_passes_one_that_waits_for_its_own_window():
    """A call whose stream is full holds up nobody else while the connection has room."""
    protocol = greeted()
    protocol.receive(h2.window_update(0, 1_000_000))
    protocol.call(HEADERS, bytes(100_000))
    protocol.take()
    protocol.call(HEADERS, b"small")
    assert [h2.HEADERS, h2.DATA] == kinds(protocol.take())


def test_connection_window_is_shared_in_turns():
    """Two big requests on a full connection advance both, whoever was first."""
    protocol = greeted()
    protocol.receive(h2.settings({h2.INITIAL_WINDOW_SIZE: 10_000_000}))
    protocol.call(HEADERS, bytes(500_000))
    protocol.call(HEADERS, bytes(500_000))
    protocol.take()
    senders = set()
    for _ in range(4):
        protocol.receive(h2.window_update(0, 16_384))
        senders |= {stream_id for kind, _, stream_id, _ in frames(protocol.take()) if kind == h2.DATA}
    assert {1, 3} == senders


def test_smaller_initial_window_counts_for_open_streams():
    """A change of the initial window moves the windows of streams that are open, below 0 if it must."""
    protocol = greeted()
    stream = protocol.open(HEADERS)
    protocol.send(stream, bytes(60_000))
    protocol.receive(h2.settings({h2.INITIAL_WINDOW_SIZE: 0}))
    assert -60_005 == stream.send_window
    protocol.take()
    protocol.send(stream, b"x")
    protocol.receive(h2.window_update(1, 60_005))
    assert not protocol.has_output
    protocol.receive(h2.window_update(1, 6))
    assert [h2.DATA] == kinds(protocol.take())


def test_settings_that_allow_more_let_calls_go_on():
    """Calls that wait for a stream or for room go on as soon as settings allow it, line and window alike."""
    protocol = greeted()
    protocol.receive(h2.settings({h2.MAX_CONCURRENT_STREAMS: 0, h2.INITIAL_WINDOW_SIZE: 0}))
    call = protocol.call(HEADERS, b"ask")
    protocol.receive(h2.settings({h2.INITIAL_WINDOW_SIZE: 5}))
    assert [h2.SETTINGS, h2.SETTINGS] == kinds(protocol.take())
    protocol.receive(h2.settings({h2.MAX_CONCURRENT_STREAMS: 1}))
    assert [h2.SETTINGS, h2.HEADERS, h2.DATA] == kinds(protocol.take())
    assert not call.is_complete
    protocol.receive(h2.settings({h2.INITIAL_WINDOW_SIZE: 8}))
    assert [h2.SETTINGS, h2.DATA] == kinds(protocol.take())
    assert call.is_complete


def test_cancelled_call_sends_no_more():
    """A call that waits for the connection's window when it is cancelled is not continued."""
    protocol = greeted()
    protocol.receive(h2.settings({h2.INITIAL_WINDOW_SIZE: 200_000}))
    stream = protocol.call(HEADERS, bytes(100_000))
    protocol.cancel(stream)
    assert h2.RST_STREAM == kinds(protocol.take())[-1]
    protocol.receive(h2.window_update(0, 100_000))
    assert not protocol.has_output


def test_data_that_nobody_wants_frees_the_connection():
    """Data of a cancelled call, padding included, is credited to the connection to the byte."""
    protocol = greeted()
    protocol.cancel(protocol.open(HEADERS))
    protocol.take()
    window = CONNECTION_WINDOW
    said = h2.frame(h2.DATA, h2.PADDED, 1, b"\xff" + bytes(15_000)) * 100
    for _ in range(60):
        window -= 15_001 * 100
        assert window >= 0
        protocol.receive(said)
        window += sum(int.from_bytes(payload, "big") for *_, payload in frames(protocol.take()))
        assert window <= CONNECTION_WINDOW
    assert window == protocol._receive_window
    assert not protocol.is_broken


def test_bigger_frames_are_used_when_allowed():
    """The server's largest frame is what we send."""
    protocol = greeted()
    protocol.receive(h2.settings({h2.MAX_FRAME_SIZE: 50_000}))
    protocol.take()
    protocol.call(HEADERS, bytes(60_000))
    assert [50_000, 10_005] == [
        len(payload) for kind, *_, payload in frames(protocol.take()) if kind == h2.DATA
    ]


def test_message_beyond_the_window_arrives():
    """An answer of three windows passes: its parts are credited as they come."""
    protocol = greeted()
    stream = protocol.call(HEADERS, b"")
    protocol.take()
    payload = bytes(3 * STREAM_WINDOW)
    said = headers(1, *FIRST) + data(1, message(payload))
    window = {0: CONNECTION_WINDOW, 1: STREAM_WINDOW}
    events = []
    for kind, flags, stream_id, piece in frames(said):
        if kind == h2.DATA:
            window[0] -= len(piece)
            window[1] -= len(piece)
            assert min(window.values()) >= 0
        events += protocol.receive(h2.frame(kind, flags, stream_id, piece))
        for update, _, number, increment in frames(protocol.take()):
            assert h2.WINDOW_UPDATE == update
            window[number] += int.from_bytes(increment, "big")
    assert [MessageReceived(stream, payload)] == events


def test_unread_messages_hold_up_their_stream_only():
    """Messages that nobody takes use up their own stream's window, never the connection's."""
    protocol = greeted()
    stream = protocol.open(HEADERS)
    protocol.take()
    protocol.receive(headers(1, *FIRST))
    chunk = message(bytes(1024 * 1024 - 5))
    granted = {0: 0, 1: 0}
    for _ in range(STREAM_WINDOW // len(chunk)):
        protocol.receive(data(1, chunk))
    for _, _, number, increment in frames(protocol.take()):
        granted[number] += int.from_bytes(increment, "big")
    assert 0 == granted[1]
    assert 0 == stream.receive_window
    for _ in range(STREAM_WINDOW // len(chunk)):
        protocol.consumed(stream, bytes(len(chunk) - 5))
    granted[1] = sum(int.from_bytes(i, "big") for _, _, number, i in frames(protocol.take()) if number == 1)
    assert STREAM_WINDOW == granted[1]


def test_small_messages_that_nobody_takes_are_held():
    """Messages of one frame each are credited when they are taken, and not after the end of their stream."""
    protocol = greeted()
    stream = protocol.open(HEADERS)
    protocol.take()
    protocol.receive(headers(1, *FIRST))
    for _ in range(200):
        protocol.receive(data(1, message(bytes(16_000))))
    assert not protocol.has_output
    for _ in range(150):
        protocol.consumed(stream, bytes(16_000))
    assert [h2.WINDOW_UPDATE] == kinds(protocol.take())
    protocol.receive(data(1, message(bytes(16_000))) * 100 + h2.rst_stream(1, 8))
    for _ in range(150):
        protocol.consumed(stream, bytes(16_000))
    assert not protocol.has_output


def test_more_than_the_window_is_the_servers_fault():
    """A stream that overruns its window is reset; the connection lives."""
    protocol = greeted()
    protocol.open(HEADERS)
    protocol.take()
    protocol.receive(headers(1, *FIRST))
    chunk = message(bytes(1024 * 1024 - 5))
    events = []
    for _ in range(5):
        events += protocol.receive(data(1, chunk))
    assert 4 == len([event for event in events if isinstance(event, MessageReceived)])
    assert (13, "more data than the stream's window", False) == ending(events)
    assert not protocol.is_broken


# ── limits and oddities ─────────────────────────────────────────────────────────────────────────


def test_calls_beyond_the_limit_wait_their_turn():
    """Above MAX_CONCURRENT_STREAMS calls wait in line, and begin as others end."""
    protocol = greeted()
    protocol.receive(h2.settings({h2.MAX_CONCURRENT_STREAMS: 2}))
    protocol.take()
    calls = [protocol.call(HEADERS, b"%d" % number) for number in range(4)]
    assert [1, 3, 0, 0] == [call.id for call in calls]
    protocol.cancel(calls[2])
    assert 4 == len(frames(protocol.take()))
    protocol.receive(answer(1, b""))
    assert [(h2.HEADERS, 5), (h2.DATA, 5)] == [(kind, number) for kind, _, number, _ in frames(protocol.take())]
    protocol.receive(h2.settings({h2.MAX_CONCURRENT_STREAMS: 1}))
    waiting = protocol.call(HEADERS, b"")
    assert 0 == waiting.id
    assert [(waiting, 14, True)] == [
        e[:2] + e[3:] for e in protocol.receive(goaway(5, 0)) if e.stream is waiting
    ]


def test_numbers_of_streams_run_out():
    """After the last number no call is accepted, and what still waits goes elsewhere."""
    protocol = greeted(largest_stream_id=3)
    protocol.call(HEADERS, b"")
    assert protocol.accepts_calls
    protocol.call(HEADERS, b"")
    assert not protocol.accepts_calls
    assert 2 == protocol.open_calls


def test_last_number_taken_by_a_queued_call_ends_those_behind_it():
    """When a cancellation lets a call in that takes the last number, the others in line end at once, not sent."""
    protocol = greeted(largest_stream_id=3)
    protocol.receive(h2.settings({h2.MAX_CONCURRENT_STREAMS: 1}))
    first, second, third = (protocol.call(HEADERS, b"") for _ in range(3))
    protocol.take()
    protocol.cancel(first)
    assert protocol.has_output
    protocol.take()
    assert 3 == second.id
    assert [(third, 14, True)] == [(e.stream, e.code, e.never_sent) for e in protocol.take_events()]


def test_stream_in_line_keeps_its_messages():
    """What is sent on a stream that waits for its number leaves after its headers, in order."""
    protocol = greeted()
    protocol.receive(h2.settings({h2.MAX_CONCURRENT_STREAMS: 0}))
    protocol.take()
    stream = protocol.open(HEADERS)
    protocol.send(stream, b"one")
    protocol.send(stream, b"two")
    assert not protocol.has_output
    protocol.receive(h2.settings({h2.MAX_CONCURRENT_STREAMS: 1}))
    assert [
        (h2.HEADERS, h2.END_HEADERS, 1, HEADERS),
        (h2.DATA, 0, 1, message(b"one")),
        (h2.DATA, 0, 1, message(b"two")),
    ] == frames(protocol.take())[1:]


def test_ping_is_answered():
    """A PING is sent back; the answer to ours is not."""
    protocol = greeted()
    assert [] == protocol.receive(h2.ping(b"12345678") + h2.ping(b"etcd-inf", ack=True))
    assert [(h2.PING, h2.ACK, 0, b"12345678")] == frames(protocol.take())


def test_questions_that_are_answered_are_no_flood():
    """A server may ask as often as it likes if it reads the answers."""
    protocol = greeted()
    for _ in range(3):
        protocol.receive(h2.ping(bytes(8)) * 6_000)
        assert 6_000 == len(frames(protocol.take()))


def test_oddities_are_understood():
    """Padding, priorities, headers in pieces, unknown frames and settings mean what they should."""
    protocol = greeted()
    stream = protocol.call(HEADERS, b"")
    protocol.take()
    first = block(*FIRST)
    said = (
        h2.frame(0xEE, 0xFF, 1, b"what")
        + h2.frame(h2.PRIORITY, 0, 1, bytes(5))
        + h2.settings({0x99: 7})
        + h2.frame(h2.HEADERS, h2.PADDED | h2.HAS_PRIORITY, 1, b"\x02" + bytes(5) + first[:3] + b"\0\0")
        + h2.frame(h2.CONTINUATION, 0, 1, first[3:4])
        + h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, first[4:])
        + h2.frame(h2.DATA, h2.PADDED, 1, b"\x03" + message(b"x")[:2] + b"\0\0\0")
        + h2.frame(h2.DATA, 0, 1, message(b"x")[2:])
        + headers(1, *OK, ends=True)
    )
    assert [MessageReceived(stream, b"x"), StreamEnded(stream, 0, "", never_sent=False)] == protocol.receive(
        said
    )


def test_long_headers_go_in_pieces():
    """A block of headers beyond a frame continues in CONTINUATION frames."""
    protocol = greeted()
    protocol.call(bytes(40_000), b"")
    found = frames(protocol.take())
    assert [h2.HEADERS, h2.CONTINUATION, h2.CONTINUATION, h2.DATA] == [kind for kind, *_ in found]
    assert [0, 0, h2.END_HEADERS, h2.END_STREAM] == [flags for _, flags, *_ in found]
    assert bytes(40_000) == b"".join(payload for *_, payload in found[:3])


def test_message_that_grpc_can_not_say_is_refused():
    """A message has a length of four bytes at most."""

    class Huge(bytes):
        __slots__ = ()

        def __len__(self):
            return 2**32

    with pytest.raises(ValueError, match="4294967296"):
        greeted().call(HEADERS, Huge())
