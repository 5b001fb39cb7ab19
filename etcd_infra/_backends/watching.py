"""
All watches of a backend on two gRPC streams: one for ordinary watches, one for coordination.

A stream that breaks, for whatever reason, is opened again elsewhere, and each watch is created anew where its
cursor stands, so that a consumer sees every revision once. Waiters for locks have a stream of their own: a
burst of someone's events must not stand between a release and the next owner.

House rules. Answers to creations come in the order of the creations: that is how they are matched, since a
refused one carries no usable id. Ids are chosen here, from 1, and never used twice on one stream, so that
events that were under way when a watch was canceled find nobody. One task per stream reads and dispatches;
it never waits for a consumer.

Source: etcd `server/etcdserver/api/v3rpc/watch.go`, `client/v3/watch.go`.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._backends import wire
from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.home import Home
from etcd_infra._backends.status import StatusCode, refusal
from etcd_infra._backends.watch_buffer import BufferedWatch
from etcd_infra._policy.backoff import delay
from etcd_infra.errors import (
    AccessDeniedError,
    EtcdError,
    InvalidAnswerError,
    StoreResetError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from etcd_infra._backends.channel import ByteStream
    from etcd_infra._backends.endpoints import Endpoints
    from etcd_infra._backends.watch_cursor import WatchCursor
    from etcd_infra._etcd.backend import WatchStream
    from etcd_infra._etcd.background import Background
    from etcd_infra._etcd.model import WatchResponse

_WATCH: Final = "/etcdserverpb.Watch/Watch"
# A stream that lived this long was a good one: its end is not the same outage as the one before.
_GOOD_SECONDS: Final = 1.0
_log = logging.getLogger("etcd_infra.watch")


class Watching:
    """
    The watches of one backend.

    Args:
        endpoints: The members.
        nursery: Where the streams are served.
        read_revision: A linearizable read of the store's revision.
        draw: A random number in [0, 1), for back-off.
        patience: Seconds that a member may take to answer a creation.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        nursery: trio.Nursery | Background,
        *,
        read_revision: Callable[[], Awaitable[int]],
        draw: Callable[[], float],
        patience: float,
    ) -> None:
        def multiplexer() -> _Multiplexer:
            return _Multiplexer(endpoints, nursery, read_revision=read_revision, draw=draw, patience=patience)

        self._home = Home()
        self._ordinary = multiplexer()
        self._coordination = multiplexer()

    def leave(self, endpoint: int) -> None:
        """Go elsewhere with what is on a member that failed other calls, if there is a better one."""
        self._ordinary.leave(endpoint)
        self._coordination.leave(endpoint)

    def keep_stream(self) -> None:
        """
        Have one stream open although nobody watches yet: called whenever a member answered.

        etcd: pings on a connection without calls are an offence, so without a stream a connection that died
        is noticed by the next call only. (And grpcio would start a thread for each call then.)
        """
        self._coordination.keep_open()

    @asynccontextmanager
    async def open(self, cursor: WatchCursor, *, coordination: bool) -> AsyncGenerator[WatchStream]:
        """Create a watch where `cursor` stands; wait until a server has; cancel it in the end."""
        self._home.check()
        multiplexer = self._coordination if coordination else self._ordinary
        watch = BufferedWatch(cursor, multiplexer.add)
        multiplexer.add(watch)
        try:
            await watch.wait_created()
            yield watch
        finally:
            multiplexer.discard(watch)


class _Multiplexer:
    """One gRPC stream, opened when it is first needed, and the watches on it."""

    def __init__(
        self,
        endpoints: Endpoints,
        nursery: trio.Nursery | Background,
        *,
        read_revision: Callable[[], Awaitable[int]],
        draw: Callable[[], float],
        patience: float,
    ) -> None:
        self._endpoints = endpoints
        self._nursery = nursery
        self._read_revision = read_revision
        self._draw = draw
        self._patience = patience
        self._watches: set[BufferedWatch] = set()
        self._by_id: dict[int, BufferedWatch] = {}
        self._unanswered: deque[tuple[float, BufferedWatch]] = deque()
        self._suspects: set[BufferedWatch] = set()
        self._stream: ByteStream | None = None
        self._endpoint = 0
        self._last_id = 0
        self._receiving = trio.CancelScope()
        self._demand = trio.Event()
        self._is_running = False
        self._is_closed = False

    def add(self, watch: BufferedWatch) -> None:
        """Have a watch created where its cursor stands, now or as soon as there is a stream."""
        if self._is_closed:
            raise trio.ClosedResourceError("this connection to etcd was closed")
        self._watches.add(watch)
        if self._stream is not None:
            self._create(self._stream, watch)
        self._serve()

    def keep_open(self) -> None:
        """Have a stream, if there is none, for as long as it lasts."""
        if self._stream is None and not self._demand.is_set() and not self._is_closed:
            self._serve()

    def _serve(self) -> None:
        self._demand.set()
        if not self._is_running:
            self._is_running = True
            self._nursery.start_soon(self._run)

    def discard(self, watch: BufferedWatch) -> None:
        """Forget a watch, and cancel it on the server."""
        self._watches.discard(watch)
        if watch.stream_id is not None:
            self._by_id.pop(watch.stream_id, None)
            if self._stream is not None:
                self._stream.send(wire.encode_watch_cancel(watch.stream_id))
            watch.stream_id = None

    def leave(self, endpoint: int) -> None:
        """End the stream if it goes to `endpoint` and another one is well."""
        if self._stream is None or self._endpoint != endpoint:
            return
        policy, now = self._endpoints.policy, trio.current_time()
        better = policy.choose(now)
        if better != endpoint and policy.is_well(better, now):
            # A stopped member is silent on streams, too: pings would find that out much later.
            self._receiving.cancel()

    # ── the stream ──────────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        failures = 0
        try:
            while True:
                await self._demand.wait()
                began = trio.current_time()
                await self._serve_until_it_breaks()
                # The first try after a break is made at once: mostly one member is gone and others live.
                if not self._watches:
                    self._demand = trio.Event()
                failures = 0 if trio.current_time() - began >= _GOOD_SECONDS else failures + 1
                if failures:
                    await trio.sleep(delay(failures - 1, self._draw()))
        finally:
            self._is_closed = True
            for watch in self._watches:
                watch.fail(trio.ClosedResourceError("this connection to etcd was closed"))

    async def _serve_until_it_breaks(self) -> None:
        policy = self._endpoints.policy
        endpoint = policy.choose(trio.current_time())
        try:
            async with self._endpoints.channel(endpoint).stream(_WATCH, metadata=wire.HAS_LEADER) as stream:
                self._begin(stream, endpoint)
                while True:
                    message = await self._receive(stream)
                    policy.succeeded(endpoint)
                    self._dispatch(stream, message)
        except (ChannelError, InvalidAnswerError) as error:
            _log.info("a watch stream to %s ended: %s", self._endpoints.name(endpoint), error)
            if isinstance(error, ChannelError) and not error.blames_endpoint:
                self._deny(error)
            else:
                policy.failed(endpoint, trio.current_time())
        finally:
            self._end()

    def _deny(self, error: ChannelError) -> None:
        """Fail all watches if the server refuses who we are."""
        denial = refusal(error.code, error.details)
        if isinstance(denial, AccessDeniedError):
            for watch in tuple(self._watches):
                self._fail(watch, AccessDeniedError(str(denial)))

    def _begin(self, stream: ByteStream, endpoint: int) -> None:
        self._stream = stream
        self._endpoint = endpoint
        self._last_id = 0
        for watch in self._watches:
            self._create(stream, watch)

    def _end(self) -> None:
        self._stream = None
        self._by_id.clear()
        self._unanswered.clear()
        for watch in self._watches:
            watch.stream_id = None

    async def _receive(self, stream: ByteStream) -> bytes:
        with trio.CancelScope(deadline=self._answer_due()) as self._receiving:
            return await stream.receive()
        raise ChannelError(StatusCode.DEADLINE_EXCEEDED, "the member keeps silent")

    def _answer_due(self) -> float:
        return self._unanswered[0][0] + self._patience if self._unanswered else inf

    def _create(self, stream: ByteStream, watch: BufferedWatch) -> None:
        self._last_id += 1
        self._unanswered.append((trio.current_time(), watch))
        stream.send(wire.encode_watch_create(watch.cursor.request(), self._last_id))
        self._receiving.deadline = self._answer_due()

    # ── its answers ─────────────────────────────────────────────────────────────────────────────

    def _dispatch(self, stream: ByteStream, message: bytes) -> None:
        watch_id, response = wire.decode_watch(message)
        if response.created:
            watch = self._match_creation(stream, watch_id, is_refused=response.canceled)
        else:
            # etcd: a progress answer for the whole stream has id -1 and lies on old servers (#15220); events
            # of a watch that was canceled have an id of the past. Both find nobody here.
            watch = self._by_id.get(watch_id)
        if watch is not None:
            self._feed(watch, response)

    def _match_creation(self, stream: ByteStream, watch_id: int, *, is_refused: bool) -> BufferedWatch | None:
        if not self._unanswered:
            raise InvalidAnswerError("a watch was created that nobody asked for")
        _, watch = self._unanswered.popleft()
        if watch not in self._watches:
            # Race: the consumer left before the answer came.
            if not is_refused:
                stream.send(wire.encode_watch_cancel(watch_id))
            return None
        # etcd: the id of a refused creation is -1, or 0 on 3.5.1, and belongs to nobody.
        if not is_refused:
            self._by_id[watch_id] = watch
            watch.stream_id = watch_id
        return watch

    def _feed(self, watch: BufferedWatch, response: WatchResponse) -> None:
        try:
            batch = watch.cursor.feed(response)
        except UnavailableError as error:
            # The member can not serve watches now: take them all elsewhere.
            raise ChannelError(StatusCode.UNAVAILABLE, str(error)) from error
        except AccessDeniedError as error:
            if self._endpoints.channel(self._endpoint).renews_access and not watch.is_denied:
                # etcd: an expired token reads as "permission denied" on 3.5.1: believe it from a new one only.
                watch.is_denied = True
                raise ChannelError(StatusCode.ABORTED, f"access is renewed after: {error}") from error
            self._fail(watch, error)
            return
        except EtcdError as error:
            self._fail(watch, error)
            return
        watch.is_denied = False
        if batch is None:
            return
        watch.deliver(batch)
        if response.created and watch.cursor.may_be_reset:
            self._suspect(watch)
        if watch.is_full:
            watch.suspended = True
            self.discard(watch)

    def _fail(self, watch: BufferedWatch, error: EtcdError) -> None:
        # The server has forgotten it, or will be told so.
        self.discard(watch)
        watch.fail(error)

    # ── was the store reset? ────────────────────────────────────────────────────────────────────

    def _suspect(self, watch: BufferedWatch) -> None:
        if not self._suspects:
            self._nursery.start_soon(self._confirm)
        self._suspects.add(watch)

    async def _confirm(self) -> None:
        """
        Find out whether a member lags or the store was reset.

        A watch that waits for a revision that a restored store will reach in a month is silent until then.
        """
        attempt = 0
        while self._suspects:
            # Race: only what was seen before the read began can be held against its answer.
            seen = {watch: watch.seen_revision for watch in self._suspects}
            try:
                revision = await self._read_revision()
            except EtcdError:
                await trio.sleep(delay(attempt, self._draw()))
                attempt += 1
            else:
                self._suspects -= seen.keys()
                self._judge(seen, revision)
            self._suspects &= self._watches

    def _judge(self, seen: dict[BufferedWatch, int], revision: int) -> None:
        for watch, seen_revision in seen.items():
            if watch in self._watches and revision < seen_revision:
                fact = f"the store is at revision {revision}, and was at {seen_revision} before"
                self._fail(watch, StoreResetError(fact))
