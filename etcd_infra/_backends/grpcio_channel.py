"""
A channel over the grpcio package: the only place where `grpc` is imported and where its threads meet Trio.

House rules. The synchronous API only: `grpc.aio` breaks when event loops run in several threads. This module
is imported when a backend is entered and not before: `import grpc` takes longer than all of ours. Foreign
threads may touch nothing but `_Inbox.post`; everything else runs in the Trio thread. No gRPC call may block
the Trio thread.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc as untyped_grpc
import trio

from etcd_infra._backends.channel import ByteStream, Channel, ChannelError, Metadata
from etcd_infra._backends.home import Home
from etcd_infra._backends.status import StatusCode

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from etcd_infra._backends.tls import TlsConfig

grpc: Any = untyped_grpc
"""It comes without type information."""

_CLOSE_SECONDS: Final = 2.0
_LOOK_AGAIN_SECONDS: Final = 0.001
_READ_AHEAD: Final = 64

# etcd: its server refuses pings more often than every 5 s (GOAWAY "too_many_pings"). 10 s and 4 s find a dead
# connection within 15 s. Back-off up to 1 s: grpcio's default of 120 s was still asleep 31 to 49 s after the
# network was back.
_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    # Newer releases wait this long (a minute by default) for a ping's answer, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", 4_000),
    # etcd: pings on a connection without calls are answered by GOAWAY "too_many_pings" after 30 s, and grpcio
    # doubles its interval then. A call on a dead idle connection starts the pings, and has its own deadline.
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # One connection per channel: otherwise two backends of a process share fate and back-off.
    ("grpc.use_local_subchannel_pool", 1),
    # A coordination service is not reached through a web proxy by accident of the environment.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
)

# The load balancer's and the resolver's words, before a call is given to a connection.
_NEVER_SENT: Final = ("failed to connect to all addresses", "errors resolving ", "DNS resolution failed")


class _Inbox:
    """
    The one way from foreign threads into the Trio thread, in batches.

    Invariant: whatever was posted is run by a drain that begins after the post: `_drain` lowers the flag
    before it looks at the queue, `post` looks at the flag after it has filled the queue.
    """

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._posts: deque[Callable[[], None]] = deque()
        self._pending = False

    def post(self, action: Callable[[], None]) -> None:
        """Have `action` run in the Trio thread; from any thread."""
        self._posts.append(action)
        if not self._pending:
            self._pending = True
            try:
                self._token.run_sync_soon(self._drain)
            except trio.RunFinishedError:
                # Race: the program is over; nobody waits for this any more.
                self._posts.clear()

    def _drain(self) -> None:
        self._pending = False
        while self._posts:
            self._posts.popleft()()


class _Waiter:
    """One task that waits for one call."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = trio.lowlevel.current_task()

    def wake(self) -> None:
        """Let the task go on, unless it was cancelled meanwhile."""
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    def abandon(self) -> None:
        """The task does not wait any more."""
        self._task = None


class GrpcioChannel(Channel):
    """
    A connection by grpcio to one endpoint.

    Args:
        target: "host:port", as grpcio understands it.
        dial_timeout: Seconds for one attempt to connect. It should end before the deadlines of calls, so that
            a server that accepts and says nothing is known to have got no request.
        tls: How to secure connections, with what its files hold now; None: not at all.

    Raises:
        OSError: a file can not be read.
    """

    def __init__(self, target: str, *, dial_timeout: float, tls: TlsConfig | None = None) -> None:
        self._home = Home()
        self._inbox = _Inbox()
        self._calls: set[Any] = set()
        self._no_calls = trio.Event()
        self._unary: dict[str, Any] = {}
        self._closed = False
        # What we call the dial timeout is grpcio's minimal back-off: the time given to one attempt.
        options = (*_OPTIONS, ("grpc.min_reconnect_backoff_ms", max(1, round(dial_timeout * 1000))))
        if tls is None:
            self._channel: Any = grpc.insecure_channel(target, options=options)
        else:
            named = (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()
            self._channel = grpc.secure_channel(target, _credentials(tls), options=(*options, *named))

    async def unary(
        self, method: str, request: bytes, /, *, time_limit: float, metadata: Metadata = ()
    ) -> bytes:
        """Implement `Channel.unary`."""
        self._check_usable()
        multicallable = self._unary.get(method)
        if multicallable is None:
            multicallable = self._unary[method] = self._channel.unary_unary(method)
        call = multicallable.future(request, timeout=time_limit, metadata=metadata)
        await self._wait_done(call)
        if call.code() is not grpc.StatusCode.OK:
            raise _failure(call)
        return call.result()

    @asynccontextmanager
    async def stream(self, method: str, /, *, metadata: Metadata = ()) -> AsyncGenerator[ByteStream]:
        """Implement `Channel.stream`."""
        self._check_usable()
        stream = _GrpcioStream(self._channel.stream_stream(method), metadata, self._inbox)
        self._calls.add(stream)
        stream.start(partial(self._forget, stream))
        try:
            yield stream
        finally:
            stream.cancel()
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                await stream.wait_ended()

    async def aclose(self) -> None:
        """Implement `Channel.aclose`."""
        if self._closed or not self._home.is_here:
            return
        self._closed = True
        for call in tuple(self._calls):
            call.cancel()
        with trio.move_on_after(_CLOSE_SECONDS, shield=True):
            if self._calls:
                await self._no_calls.wait()
        # grpcio's close waits for its calls; with none left it is quick, otherwise it may not hold us up.
        if self._calls:
            threading.Thread(target=self._channel.close, name="etcd-infra close", daemon=True).start()
        else:
            self._channel.close()

    def _check_usable(self) -> None:
        self._home.check()
        if self._closed:
            raise trio.ClosedResourceError("this connection to etcd was closed")

    async def _wait_done(self, call: Any) -> None:
        waiter = _Waiter()
        self._calls.add(call)

        def finished() -> None:
            self._forget(call)
            waiter.wake()

        def abort(_: object) -> trio.lowlevel.Abort:
            waiter.abandon()
            call.cancel()
            return trio.lowlevel.Abort.SUCCEEDED

        # Race: if the call is done already, grpcio calls back at once, in this thread; `post` does not mind.
        call.add_done_callback(partial(_ignoring_argument, partial(self._inbox.post, finished)))
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _forget(self, call: Any) -> None:
        self._calls.discard(call)
        if self._closed and not self._calls:
            self._no_calls.set()


class _GrpcioStream(ByteStream):
    """
    One call in both directions: grpcio's thread sends, one thread of ours reads.

    Invariants: `_ending` is set by the last thing that the reader thread posts. `_ended` is set when both that
    has been run and grpcio's thread for answers has done with the call.

    A program that ends while one of these threads is about to take or to release the call's lock waits for that
    lock for ever: so who leaves waits for all of them.
    """

    def __init__(self, multicallable: Any, metadata: Metadata, inbox: _Inbox) -> None:
        self._inbox = inbox
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._incoming: deque[bytes] = deque()
        self._room = threading.Semaphore(_READ_AHEAD)
        self._news = trio.Event()
        self._ending: ChannelError | None = None
        self._ended = trio.Event()
        self._cancelled = False
        self._on_end: Callable[[], None] | None = None
        self._sender: threading.Thread | None = None
        self._call = multicallable(self._requests(), metadata=metadata)
        self._in_use = 2
        done = partial(inbox.post, self._release)
        if not self._call.add_callback(done):
            done()
        self._reader = threading.Thread(target=self._read, name="etcd-infra stream reader", daemon=True)

    def start(self, on_end: Callable[[], None]) -> None:
        """Begin to read; `on_end` is called once, when the call is over."""
        self._on_end = on_end
        self._reader.start()

    def send(self, message: bytes) -> None:
        """Implement `ByteStream.send`."""
        self._outgoing.put(message)

    async def receive(self) -> bytes:
        """Implement `ByteStream.receive`."""
        await trio.lowlevel.checkpoint()
        while not self._incoming:
            if self._ending is not None:
                raise self._ending
            await self._news.wait()
        self._room.release()
        return self._incoming.popleft()

    def cancel(self) -> None:
        """End the call and both threads."""
        self._cancelled = True
        self._outgoing.put(None)
        self._call.cancel()
        self._room.release()

    async def wait_ended(self) -> None:
        """Wait until neither the reader thread nor grpcio's threads have anything more to do."""
        await self._ended.wait()
        # No event tells: these are not our threads, or tell before they end.
        while self._sender is None or self._sender.is_alive() or self._reader.is_alive():  # noqa: ASYNC110
            await trio.sleep(_LOOK_AGAIN_SECONDS)

    def _requests(self) -> Iterator[bytes]:
        # Runs in grpcio's thread for requests.
        self._sender = threading.current_thread()
        yield from iter(self._outgoing.get, None)

    def _read(self) -> None:
        try:
            for message in self._call:
                # Back-pressure: what nobody takes stays in the connection's flow-control window.
                self._room.acquire()
                if self._cancelled:
                    break
                self._inbox.post(partial(self._arrived, message))
            ending = ChannelError(StatusCode.OK, "the server ended the stream")
        except grpc.RpcError:
            ending = _failure(self._call)
        self._inbox.post(partial(self._end, ending))

    def _arrived(self, message: bytes) -> None:
        self._incoming.append(message)
        self._notify()

    def _end(self, ending: ChannelError) -> None:
        self._outgoing.put(None)
        self._ending = ending
        self._notify()
        self._release()

    def _release(self) -> None:
        self._in_use -= 1
        if not self._in_use:
            self._ended.set()
            if self._on_end is not None:
                self._on_end()

    def _notify(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()


def _ignoring_argument(action: Callable[[], None], _: object) -> None:
    action()


def _credentials(tls: TlsConfig) -> Any:
    tls.context()  # grpcio takes what does not fit together without a word, and never gets a connection
    files = [None if name is None else Path(name).read_bytes() for name in (tls.ca, tls.key, tls.cert)]
    return grpc.ssl_channel_credentials(*files)


def _failure(call: Any) -> ChannelError:
    code = StatusCode(call.code().value[0])
    details = call.details() or ""
    # etcd: of 1,821 calls that failed with the first text none was applied; it is the load balancer's word
    # for a call that no connection was found for.
    never_sent = code is StatusCode.UNAVAILABLE and details.startswith(_NEVER_SENT)
    return ChannelError(code, details, never_sent=never_sent)
