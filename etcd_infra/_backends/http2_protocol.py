"""
The client's side of HTTP/2 and gRPC, without I/O: bytes in and events out, calls in and bytes out.

House rules. Nothing here waits, and nothing knows the time. What the peer does wrong on one stream ends that
stream; what it does wrong on the connection ends the connection; neither raises. A request counts as handed
over when its last byte was taken by `take`: before that the server can not have handled it.

Source: RFC 9113; gRPC `doc/PROTOCOL-HTTP2.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from etcd_infra._backends import http2_frames as h2
from etcd_infra._backends.grpc_headers import (
    HEADER_LIST_LIMIT,
    AnswerHeaders,
    AnswerHeadersDecoder,
    BadHeadersError,
)
from etcd_infra._backends.http2_frames import ErrorCode
from etcd_infra._backends.http2_reader import ConnectionFaultError, FrameReader, unpadded
from etcd_infra._backends.http2_stream import MESSAGE_HEAD_BYTES, STREAM_WINDOW, BadMessageError, Stream
from etcd_infra._backends.status import StatusCode

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECTION_WINDOW: Final = 32 * 1024 * 1024
# Answers that the peer asks for and does not read.
_REPLIES_LIMIT: Final = 10_000

_SETTINGS: Final = {
    h2.HEADER_TABLE_SIZE: 0,
    h2.ENABLE_PUSH: 0,
    h2.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
    h2.MAX_HEADER_LIST_SIZE: HEADER_LIST_LIMIT,
}
_WIDER_CONNECTION: Final = h2.window_update(0, CONNECTION_WINDOW - h2.DEFAULT_WINDOW)

_STATUS_OF_RESET: Final = {
    ErrorCode.REFUSED_STREAM: StatusCode.UNAVAILABLE,
    ErrorCode.CANCEL: StatusCode.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: StatusCode.PERMISSION_DENIED,
}


class MessageReceived(NamedTuple):
    """A whole message came; call `consumed` when it was taken."""

    stream: Stream
    message: bytes


class StreamEnded(NamedTuple):
    """
    A call is over; its messages came before.

    Attributes:
        stream: The call.
        code: gRPC's status code.
        details: Its text.
        never_sent: The server has certainly not handled the request.
    """

    stream: Stream
    code: int
    details: str
    never_sent: bool


Event: TypeAlias = MessageReceived | StreamEnded


class Http2Protocol:
    """
    One connection.

    Invariant: each stream that was opened ends in exactly one `StreamEnded`, or in `cancel`.

    Args:
        largest_stream_id: Where the numbers of streams are used up.

    Attributes:
        is_ready: The server's first SETTINGS have come.
        accepts_calls: Another call may be made on this connection.
        is_broken: Nothing more can be said or heard.
        reason: Why it is broken, or is being left.
    """

    def __init__(self, *, largest_stream_id: int = h2.LARGEST_STREAM_ID) -> None:
        self.is_ready = False
        self.accepts_calls = True
        self.is_broken = False
        self.reason = ""
        self._largest_stream_id = largest_stream_id
        self._next_id = 1
        self._streams: dict[int, Stream] = {}
        self._queued: dict[Stream, None] = {}
        self._sending: dict[Stream, None] = {}
        self._completed: list[Stream] = []
        self._out = [h2.PREFACE, h2.settings(_SETTINGS), _WIDER_CONNECTION]
        self._replies = 0
        self._reader = FrameReader()
        self._events: list[Event] = []
        self._handlers: dict[int, Callable[[int, int, bytes], None]] = {
            h2.DATA: self._read_data,
            h2.HEADERS: self._read_headers,
            h2.RST_STREAM: self._read_reset,
            h2.SETTINGS: self._read_settings,
            h2.PUSH_PROMISE: self._refuse_push,
            h2.PING: self._read_ping,
            h2.GOAWAY: self._read_goaway,
            h2.WINDOW_UPDATE: self._read_window_update,
        }
        self._headers = AnswerHeadersDecoder()
        self._send_window = h2.DEFAULT_WINDOW
        self._stream_window = h2.DEFAULT_WINDOW
        self._max_frame = h2.SMALLEST_MAX_FRAME
        self._max_streams = h2.LARGEST_STREAM_ID
        self._receive_window = CONNECTION_WINDOW

    # ── what we say ─────────────────────────────────────────────────────────────────────────────

    @property
    def has_output(self) -> bool:
        """Whether `take` has something to give, or may begin calls that waited for their turn."""
        return bool(self._out) or (bool(self._queued) and self._has_room)

    @property
    def open_calls(self) -> int:
        """How many calls are not over."""
        return len(self._streams) + len(self._queued)

    def take(self) -> bytes:
        """
        Return what has to be written now, and take it for written.

        Calls that waited for a free stream begin here and nowhere else: those that are given up in the same
        turn as the call before them never do. It can be the end of calls, see `take_events`.
        """
        self._admit_queued()
        out = b"".join(self._out)
        self._out.clear()
        self._replies = 0
        for stream in self._completed:
            stream.handed_over = True
        self._completed.clear()
        return out

    def call(self, headers: bytes, message: bytes) -> Stream:
        """Begin a call with one message, and no more."""
        stream = Stream(headers, self._stream_window)
        stream.write(message)
        stream.ends = True
        self._admit(stream)
        return stream

    def open(self, headers: bytes) -> Stream:
        """Begin a call that stays open for messages."""
        stream = Stream(headers, self._stream_window)
        self._admit(stream)
        return stream

    def send(self, stream: Stream, message: bytes) -> None:
        """Send a message on a stream that is open; nothing happens if it is over."""
        if not stream.is_over:
            stream.write(message)
            if stream.id:
                self._write(stream)

    def cancel(self, stream: Stream) -> None:
        """Forget a call, and tell the server; nothing happens if it is over."""
        if stream.is_over:
            return
        if stream.id and not self.is_broken:
            self._out.append(h2.rst_stream(stream.id, ErrorCode.CANCEL))
        self._forget(stream)

    def consumed(self, stream: Stream, message: bytes) -> None:
        """Say that a message was taken: there is room for more."""
        stream.held -= MESSAGE_HEAD_BYTES + len(message)
        if not stream.is_over:
            self._credit(stream)

    def ping(self) -> None:
        """Ask the server for a sign of life; any bytes of it are one."""
        self._out.append(h2.ping(b"etcd-inf"))

    def _admit(self, stream: Stream) -> None:
        if self._queued or not self._has_room:
            self._queued[stream] = None
        else:
            self._begin(stream)

    @property
    def _has_room(self) -> bool:
        return self.accepts_calls and len(self._streams) < self._max_streams

    def _admit_queued(self) -> None:
        while self._queued and self._has_room:
            stream = next(iter(self._queued))
            del self._queued[stream]
            self._begin(stream)

    def _begin(self, stream: Stream) -> None:
        stream.id = self._next_id
        self._next_id += 2
        self._streams[stream.id] = stream
        self._out.append(h2.header_frames(stream.id, stream.headers, self._max_frame))
        if not stream.ends:
            self._completed.append(stream)
        self._write(stream)
        if self._next_id > self._largest_stream_id:
            self.accepts_calls = False
            self._refuse_queued("the connection has no more numbers for streams")

    def _refuse_queued(self, reason: str) -> None:
        for stream in tuple(self._queued):
            self._end(stream, StatusCode.UNAVAILABLE, reason, never_sent=True)

    def _write(self, stream: Stream) -> None:
        while stream.outgoing:
            room = min(self._send_window, stream.send_window, self._max_frame)
            if room <= 0:
                self._sending[stream] = None
                return
            piece = stream.take_piece(room)
            self._send_window -= len(piece)
            stream.send_window -= len(piece)
            last = stream.ends and not stream.outgoing
            self._out.append(h2.frame(h2.DATA, h2.END_STREAM if last else 0, stream.id, piece))
            if last:
                self._completed.append(stream)
        self._sending.pop(stream, None)

    def _write_all(self) -> None:
        # Whoever could not send everything goes to the end of the line.
        for stream in list(self._sending):
            if self._send_window <= 0:
                break
            del self._sending[stream]
            self._write(stream)

    # ── what we hear ────────────────────────────────────────────────────────────────────────────

    def receive(self, data: bytes) -> list[Event]:
        """Read what came from the server; no bytes at all are the end of the connection."""
        if self.is_broken:
            return []
        if not data:
            return self.close("the connection was closed")
        try:
            for kind, flags, stream_id, payload in self._reader.feed(data):
                # RFC 9113, 5.5: frames of unknown types are ignored.
                if handle := self._handlers.get(kind):
                    handle(flags, stream_id, payload)
        except ConnectionFaultError as fault:
            self._break(f"{fault.code.name}: {fault}")
            self._out.append(h2.goaway(fault.code, str(fault)))
        return self.take_events()

    def close(self, reason: str) -> list[Event]:
        """End every call, because the connection is given up."""
        self._break(reason)
        return self.take_events()

    def take_events(self) -> list[Event]:
        """Return what happened since the last time."""
        events, self._events = self._events, []
        return events

    def _break(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.is_broken = True
        self.accepts_calls = False
        # Invariant: what is called never sent is never sent. The server may still read what it does not answer.
        self._out.clear()
        for stream in (*self._streams.values(), *self._queued):
            self._end(stream, StatusCode.UNAVAILABLE, reason, never_sent=not stream.handed_over)

    def _stream(self, stream_id: int) -> Stream | None:
        """Return the stream of a frame; None if it is over already."""
        stream = self._streams.get(stream_id)
        if stream is None and (stream_id % 2 == 0 or stream_id >= self._next_id):
            raise ConnectionFaultError(
                ErrorCode.PROTOCOL_ERROR, f"a frame for stream {stream_id}, which nobody opened"
            )
        return stream

    def _read_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        stream = self._stream(stream_id)
        content = unpadded(flags, payload)
        # RFC 9113, 6.1: padding counts, too.
        size = len(payload)
        self._receive_window -= size
        if self._receive_window < 0:
            raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        if self._receive_window <= CONNECTION_WINDOW // 2:
            # A stream that nobody reads has its own window: the connection never waits for it.
            self._out.append(h2.window_update(0, CONNECTION_WINDOW - self._receive_window))
            self._receive_window = CONNECTION_WINDOW
        if stream is None:
            return
        stream.receive_window -= size
        if stream.receive_window < 0:
            self._abort(stream, ErrorCode.FLOW_CONTROL_ERROR, "more data than the stream's window")
        elif not stream.is_answered:
            self._abort(stream, ErrorCode.PROTOCOL_ERROR, "data before the answer's headers")
        else:
            self._read_messages(stream, content, ends=bool(flags & h2.END_STREAM))

    def _read_messages(self, stream: Stream, data: bytes, *, ends: bool) -> None:
        try:
            for message in stream.read(data):
                self._events.append(MessageReceived(stream, message))
        except BadMessageError as error:
            self._abort(stream, ErrorCode.CANCEL, str(error))
            return
        if ends:
            self._finish(stream, StatusCode.INTERNAL, "the server ended the stream without a status")
        else:
            self._credit(stream)

    def _credit(self, stream: Stream) -> None:
        credit = stream.due_credit()
        if credit:
            self._out.append(h2.window_update(stream.id, credit))

    def _read_headers(self, flags: int, stream_id: int, block: bytes) -> None:
        stream = self._stream(stream_id)
        try:
            headers = self._headers.decode(block)
        except BadHeadersError as error:
            raise ConnectionFaultError(ErrorCode.COMPRESSION_ERROR, str(error)) from error
        if stream is None:
            return
        if flags & h2.END_STREAM:
            self._read_trailers(stream, headers)
        elif stream.is_answered:
            self._abort(stream, ErrorCode.PROTOCOL_ERROR, "headers in the middle of an answer")
        elif not headers.informational:
            stream.is_answered = True
            if headers.refusal is not None:
                self._abort(stream, ErrorCode.CANCEL, headers.refusal.details, code=headers.refusal.code)

    def _read_trailers(self, stream: Stream, headers: AnswerHeaders) -> None:
        if headers.status is not None and (stream.is_answered or headers.refusal is None):
            code, details = headers.status
            if code == StatusCode.OK and stream.has_partial_message:
                code, details = StatusCode.INTERNAL, "the answer ended within a message"
        elif stream.is_answered or headers.refusal is None:
            code, details = StatusCode.INTERNAL, "the server ended the stream without a status"
        else:
            code, details = headers.refusal
        self._finish(stream, code, details)

    def _read_reset(self, _: int, stream_id: int, payload: bytes) -> None:
        _check_size("RST_STREAM", payload, 4)
        stream = self._stream(stream_id)
        if stream is not None:
            code = h2.read_u32(payload)
            status = _STATUS_OF_RESET.get(ErrorCode(code) if code in _CODES else ErrorCode.INTERNAL_ERROR)
            details = f"the server reset the stream: {h2.error_name(code)}"
            # RFC 9113, 8.7: a refused stream was not processed at all, unless the server contradicts itself.
            is_refused = code == ErrorCode.REFUSED_STREAM and not stream.is_answered
            # What waits to be written will be: only a request that lacks its end can not be handled.
            never_sent = is_refused or not (stream.is_complete or stream.handed_over)
            self._end(stream, status or StatusCode.INTERNAL, details, never_sent=never_sent)

    def _read_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id or len(payload) % 6 or (flags & h2.ACK and payload):
            raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "malformed SETTINGS")
        if flags & h2.ACK:
            return
        for name, value in h2.read_settings(payload):
            self._apply_setting(name, value)
        self.is_ready = True
        self._reply(h2.settings_ack())
        self._write_all()

    def _apply_setting(self, name: int, value: int) -> None:
        if name == h2.MAX_CONCURRENT_STREAMS:
            self._max_streams = value
        elif name == h2.INITIAL_WINDOW_SIZE:
            if value > h2.LARGEST_WINDOW:
                raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
            for stream in (*self._streams.values(), *self._queued):
                self._widen(stream, value - self._stream_window)
            self._stream_window = value
        elif name == h2.MAX_FRAME_SIZE:
            if not h2.SMALLEST_MAX_FRAME <= value <= h2.LARGEST_MAX_FRAME:
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, f"frames of {value} bytes")
            self._max_frame = value

    def _widen(self, stream: Stream, increment: int) -> None:
        stream.send_window += increment
        if stream.send_window > h2.LARGEST_WINDOW:
            raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window is too large")

    def _refuse_push(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "the server pushed, which was forbidden")

    def _read_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        _check_size("PING", payload, 8)
        if stream_id:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if not flags & h2.ACK:
            self._reply(h2.ping(payload, ack=True))

    def _reply(self, reply: bytes) -> None:
        self._replies += 1
        if self._replies > _REPLIES_LIMIT:
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, "more questions than answers are read")
        self._out.append(reply)

    def _read_goaway(self, _: int, stream_id: int, payload: bytes) -> None:
        if stream_id or len(payload) < 8:  # noqa: PLR2004 - RFC 9113, 6.8
            raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "malformed GOAWAY")
        last = h2.read_u32(payload) & h2.LARGEST_STREAM_ID
        self.accepts_calls = False
        said = payload[8:200].decode("ascii", "replace")
        details = f"the server goes away: {h2.error_name(h2.read_u32(payload, 4))} {said}".rstrip()
        self.reason = self.reason or details
        # RFC 9113, 6.8: streams above the last one were not processed, unless the server contradicts itself.
        for stream in [stream for number, stream in self._streams.items() if number > last]:
            self._end(stream, StatusCode.UNAVAILABLE, details, never_sent=not stream.is_answered)
        self._refuse_queued(details)

    def _read_window_update(self, _: int, stream_id: int, payload: bytes) -> None:
        _check_size("WINDOW_UPDATE", payload, 4)
        increment = h2.read_u32(payload) & h2.LARGEST_STREAM_ID
        if stream_id == 0:
            self._send_window += increment
            if not increment or self._send_window > h2.LARGEST_WINDOW:
                raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, f"a window widened by {increment}")
            self._write_all()
            return
        stream = self._stream(stream_id)
        if stream is None:
            return
        if not increment or stream.send_window + increment > h2.LARGEST_WINDOW:
            self._abort(stream, ErrorCode.FLOW_CONTROL_ERROR, f"a window widened by {increment}")
            return
        stream.send_window += increment
        self._write(stream)

    # ── how calls end ───────────────────────────────────────────────────────────────────────────

    def _finish(self, stream: Stream, code: int, details: str) -> None:
        """End a stream that the server has ended."""
        if not stream.is_complete:
            # It does not want to hear the rest.
            self._out.append(h2.rst_stream(stream.id, ErrorCode.CANCEL))
        self._end(stream, code, details, never_sent=False)

    def _abort(
        self, stream: Stream, error: ErrorCode, details: str, *, code: int = StatusCode.INTERNAL
    ) -> None:
        """End a stream whose answer is of no use."""
        self._out.append(h2.rst_stream(stream.id, error))
        self._end(stream, code, details, never_sent=False)

    def _end(self, stream: Stream, code: int, details: str, *, never_sent: bool) -> None:
        self._forget(stream)
        self._events.append(StreamEnded(stream, code, details, never_sent))

    def _forget(self, stream: Stream) -> None:
        stream.is_over = True
        if stream.id:
            del self._streams[stream.id]
            self._sending.pop(stream, None)
        else:
            del self._queued[stream]


def _check_size(kind: str, payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, f"a {kind} frame with {len(payload)} bytes")


_CODES: Final = frozenset(ErrorCode)
