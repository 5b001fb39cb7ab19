"""
One HTTP/2 connection on Trio: a socket, three tasks and the protocol of `http2_protocol.py`; no threads.

House rules. The protocol decides, this module moves bytes and wakes tasks. What tasks ask for in one turn of
the loop leaves together, since the writer runs in the next turn; only a call that is alone does not wait for
that. What the network did not take at once is left to the writer, and nobody writes before it is gone: a frame
is never cut by another one. What arrives together wakes its tasks in one pass.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._backends.channel import ByteStream, ChannelError
from etcd_infra._backends.http2_protocol import Http2Protocol, MessageReceived, StreamEnded
from etcd_infra._backends.http2_socket import TcpStream
from etcd_infra._backends.status import StatusCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from etcd_infra._backends.http2_protocol import Event
    from etcd_infra._backends.http2_stream import Stream

# etcd: its server refuses pings more often than every 5 s, and any on a connection without calls. Silence of
# 10 s and no answer to a ping for 4 s find a dead connection within 15 s, and within 4 s if it was idle before.
_SILENCE_SECONDS: Final = 10.0
_PING_SECONDS: Final = 4.0
_FAREWELL_SECONDS: Final = 0.1
# Each look at the time is one at every call.
_BETWEEN_LOOKS_SECONDS: Final = 0.005
# A server that takes less than this in as long as a dead connection lives is as good as dead, whatever it says.
_PIECE_BYTES: Final = 64 * 1024


class Connection:
    """
    A connection that is served by `serve`.

    Invariant: a call is in `_calls` exactly as long as somebody waits for its end.

    Args:
        transport: The bytes, in both directions; closed in the end.
        ready_by: When the server must have greeted, on Trio's clock.
        on_ready: Called once, when it has.
    """

    def __init__(self, transport: trio.abc.Stream, *, ready_by: float, on_ready: Callable[[], None]) -> None:
        self._transport = transport
        self._tcp = transport if isinstance(transport, TcpStream) else None
        self._protocol = Http2Protocol()
        self._calls: dict[Stream, _UnaryCall | ConnectionStream] = {}
        self._ready_by = ready_by
        self._on_ready = on_ready
        self._callers = 0
        self._unsent: bytes | memoryview = b""
        self._writer: trio.lowlevel.Task | None = None
        self._said_all = trio.Event()
        self._closed = trio.Event()
        self._rest = trio.CancelScope()
        self._serving = trio.CancelScope()
        self._heard_at = trio.current_time()
        self._pinged_at: float | None = None

    @property
    def accepts_calls(self) -> bool:
        """Whether another call can be made here."""
        return self._protocol.accepts_calls

    @property
    def fact(self) -> str:
        """Why the connection ended, or takes no more calls."""
        return self._protocol.reason

    async def unary(self, headers: bytes, request: bytes, deadline: float) -> bytes:
        """Send one message, wait for the one answer; see `Channel.unary`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        stream = self._protocol.call(headers, request)
        call = _UnaryCall(trio.lowlevel.current_task(), deadline)
        self._add(stream, call, deadline)

        def abort(_: object) -> trio.lowlevel.Abort:
            self.cancel(stream)
            return trio.lowlevel.Abort.SUCCEEDED

        self._callers += 1
        try:
            # One in line for a free stream is left to the writer: its beginning can be the end of other calls.
            if self._callers == 1 and stream.id and self._tcp is not None and not self._unsent:
                self._write_now()
            self._wake_writer()
            await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            self._callers -= 1
        return call.result()

    def open(self, headers: bytes) -> ConnectionStream:
        """Begin a call in both directions."""
        stream = self._protocol.open(headers)
        call = ConnectionStream(self, stream)
        self._add(stream, call, inf)
        self._wake_writer()
        return call

    def send(self, stream: Stream, message: bytes) -> None:
        """Send a message on an open stream."""
        self._protocol.send(stream, message)
        self._wake_writer()

    def consumed(self, stream: Stream, message: bytes) -> None:
        """Make room for more messages of a stream."""
        self._protocol.consumed(stream, message)
        self._wake_writer()

    def cancel(self, stream: Stream) -> None:
        """Forget a call."""
        self._calls.pop(stream, None)
        self._protocol.cancel(stream)
        self._wake_writer()
        self._leave_if_drained()

    async def serve(self) -> None:
        """Serve the connection until it ends, for whatever reason; every call on it ends then."""
        try:
            with self._serving:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._keep_time)
                    await self._read()
                    # The server did something wrong, and is told what.
                    with trio.move_on_after(_FAREWELL_SECONDS):
                        await self._said_all.wait()
                    nursery.cancel_scope.cancel()
        finally:
            self._dispatch(self._protocol.close("the connection was closed"))
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._transport)
            self._closed.set()

    async def aclose(self) -> None:
        """Give the connection up, and wait until nothing of it is left."""
        self._serving.cancel()
        with trio.CancelScope(shield=True):
            await self._closed.wait()

    # ── three tasks ─────────────────────────────────────────────────────────────────────────────

    async def _read(self) -> None:
        while not self._protocol.is_broken:
            try:
                data = bytes(await self._transport.receive_some())
            except trio.BrokenResourceError as error:
                self._give_up(_described(error))
                return
            self._heard_at = trio.current_time()
            self._pinged_at = None
            was_ready = self._protocol.is_ready
            self._dispatch(self._protocol.receive(data))
            if self._protocol.is_ready and not was_ready:
                self._on_ready()
            self._wake_writer()
            self._leave_if_drained()

    async def _write(self) -> None:
        while True:
            while self._has_more_to_write:
                if not self._unsent:
                    self._write_now()
                    self._dispatch(self._protocol.take_events())
                    self._leave_if_drained()
                if self._unsent and not await self._write_rest():
                    return
            if self._protocol.is_broken:
                self._said_all.set()
            self._writer = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort_writer)

    @property
    def _has_more_to_write(self) -> bool:
        return bool(self._unsent) or self._protocol.has_output

    def _write_now(self) -> None:
        """Write as much as can be written within this turn; the rest is for the writer."""
        out = self._protocol.take()
        sent = 0 if self._tcp is None else self._tcp.send_now(out)
        if sent < len(out):
            self._unsent = memoryview(out)[sent:]

    async def _write_rest(self) -> bool:
        """Write what could not be written at once; False: the connection was given up."""
        while self._unsent:
            piece = self._unsent[:_PIECE_BYTES]
            with trio.move_on_after(_SILENCE_SECONDS + _PING_SECONDS) as patience:
                try:
                    await self._transport.send_all(piece)
                except trio.BrokenResourceError as error:
                    self._give_up(_described(error))
                    return False
            if patience.cancelled_caught:
                self._give_up("the server reads nothing")
                return False
            self._unsent = self._unsent[len(piece) :]
        return True

    def _abort_writer(self, _: object) -> trio.lowlevel.Abort:
        self._writer = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_writer(self) -> None:
        if self._writer is not None and (self._has_more_to_write or self._protocol.is_broken):
            writer, self._writer = self._writer, None
            trio.lowlevel.reschedule(writer)

    async def _keep_time(self) -> None:
        """End calls whose time is up, and the connection when it is silent."""
        while True:
            with trio.CancelScope(deadline=self._next_check(trio.current_time())) as self._rest:
                await trio.sleep_forever()
            now = trio.current_time()
            if not self._protocol.is_ready and now >= self._ready_by:
                self._give_up("the server accepts connections and says nothing")
                return
            self._expire(now)
            if not self._is_alive(now):
                self._give_up(f"the server kept silent for {now - self._heard_at:.1f} s")
                return

    def _next_check(self, now: float) -> float:
        if not self._protocol.is_ready:
            return self._ready_by
        if self._pinged_at is not None:
            # Also if nobody waits any more: the next call had better not find a dead connection.
            silence_ends = self._pinged_at + _PING_SECONDS
        elif self._calls:
            silence_ends = self._heard_at + _SILENCE_SECONDS
        else:
            return inf
        deadlines = (call.deadline for call in self._calls.values())
        # Race: bytes that came meanwhile have moved the moment; it is never in the past for long.
        return max(now + _BETWEEN_LOOKS_SECONDS, min((silence_ends, *deadlines)))

    def _expire(self, now: float) -> None:
        for stream, call in [entry for entry in self._calls.items() if entry[1].deadline <= now]:
            ending = StreamEnded(
                stream, StatusCode.DEADLINE_EXCEEDED, "no answer in time", never_sent=not stream.is_complete
            )
            self.cancel(stream)
            call.end(ending)

    def _is_alive(self, now: float) -> bool:
        if self._pinged_at is not None:
            return now < self._pinged_at + _PING_SECONDS
        if self._calls and now >= self._heard_at + _SILENCE_SECONDS:
            self._pinged_at = now
            self._protocol.ping()
            self._wake_writer()
        return True

    # ── calls ───────────────────────────────────────────────────────────────────────────────────

    def _add(self, stream: Stream, call: _UnaryCall | ConnectionStream, deadline: float) -> None:
        if not self._calls:
            # After a long silence this is now: be it that nobody asked, or that calls shorter than the silence
            # were in vain one after the other, which must not keep a dead connection.
            deadline = min(deadline, self._heard_at + _SILENCE_SECONDS)
        self._calls[stream] = call
        if deadline < self._rest.deadline:  # noqa: PLR1730 - setting it costs more than looking
            self._rest.deadline = deadline

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            call = self._calls.get(event.stream)
            if call is None:
                continue
            if isinstance(event, MessageReceived):
                call.deliver(event.message)
            else:
                del self._calls[event.stream]
                call.end(event)

    def _give_up(self, fact: str) -> None:
        self._dispatch(self._protocol.close(fact))
        self._serving.cancel()

    def _leave_if_drained(self) -> None:
        if not (self._protocol.accepts_calls or self._calls or self._protocol.is_broken):
            self._serving.cancel()


class _UnaryCall:
    """One task that waits for one answer."""

    __slots__ = ("_answers", "_ending", "_task", "deadline")

    def __init__(self, task: trio.lowlevel.Task, deadline: float) -> None:
        self.deadline = deadline
        self._task = task
        self._answers: list[bytes] = []
        self._ending: StreamEnded | None = None

    def deliver(self, message: bytes) -> None:
        """Keep an answer."""
        self._answers.append(message)

    def end(self, ending: StreamEnded) -> None:
        """Let the task go on."""
        self._ending = ending
        trio.lowlevel.reschedule(self._task)

    def result(self) -> bytes:
        """Return the answer, or raise what there was instead."""
        ending = self._ending
        assert ending is not None
        if ending.code != StatusCode.OK:
            raise _failure(ending)
        if len(self._answers) != 1:
            raise ChannelError(StatusCode.INTERNAL, f"{len(self._answers)} answers instead of one")
        return self._answers[0]


class ConnectionStream(ByteStream):
    """A call in both directions."""

    deadline = inf

    def __init__(self, connection: Connection, stream: Stream) -> None:
        self._connection = connection
        self._stream = stream
        self._incoming: deque[bytes] = deque()
        self._news = trio.Event()
        self._ending: ChannelError | None = None

    def send(self, message: bytes) -> None:
        """Implement `ByteStream.send`."""
        self._connection.send(self._stream, message)

    async def receive(self) -> bytes:
        """Implement `ByteStream.receive`."""
        await trio.lowlevel.checkpoint()
        while not self._incoming:
            if self._ending is not None:
                raise self._ending
            await self._news.wait()
        message = self._incoming.popleft()
        self._connection.consumed(self._stream, message)
        return message

    def cancel(self) -> None:
        """End the call."""
        self._connection.cancel(self._stream)

    def deliver(self, message: bytes) -> None:
        """Keep a message until it is received."""
        self._incoming.append(message)
        self._notify()

    def end(self, ending: StreamEnded) -> None:
        """Note how the stream ended."""
        is_ok = ending.code == StatusCode.OK
        self._ending = ChannelError(StatusCode.OK, "the server ended the stream") if is_ok else _failure(ending)
        self._notify()

    def _notify(self) -> None:
        if not self._news.is_set():
            news, self._news = self._news, trio.Event()
            news.set()


def _failure(ending: StreamEnded) -> ChannelError:
    return ChannelError(ending.code, ending.details, never_sent=ending.never_sent)


def _described(error: trio.BrokenResourceError) -> str:
    return f"the connection broke: {error.__cause__ or error}"
