"""A channel whose server is the test itself: it sees each request and says each answer."""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from math import inf

import trio

from etcd_infra._backends.channel import ByteStream, Channel, ChannelError
from etcd_infra._backends.status import StatusCode
from etcd_infra._backends.wire_schema import MESSAGES


class ScriptedStream(ByteStream):
    """One stream of watches, seen from the server."""

    def __init__(self):
        self._requests_in, self._requests = trio.open_memory_channel(inf)
        self._answers, self._answers_out = trio.open_memory_channel(inf)
        self._broken = trio.Event()
        self.is_open = True

    # ── the client's side ──

    def send(self, message):
        """Hand a request to the test."""
        self._requests_in.send_nowait(MESSAGES["WatchRequest"].FromString(message))

    async def receive(self):
        """Wait for what the test says."""
        answer = await self._answers_out.receive()
        if isinstance(answer, ChannelError):
            raise answer
        return answer

    # ── the test's side ──

    async def next_request(self):
        """Wait for the client's next request: a `create_request` or a `cancel_request`."""
        with trio.fail_after(60):
            request = await self._requests.receive()
        return getattr(request, request.WhichOneof("request"))

    def has_request(self):
        """Whether the client has sent something that the test has not seen."""
        return self._requests.statistics().current_buffer_used > 0

    def answer(self, watch_id, *, revision=1, **fields):
        """Say a WatchResponse."""
        header = MESSAGES["ResponseHeader"](revision=revision)
        message = MESSAGES["WatchResponse"](header=header, watch_id=watch_id, **fields)
        self._answers.send_nowait(message.SerializeToString())

    def put(self, watch_id, *revisions, key=b"k", value=b"v", fragment=False, header=None):
        """Say that `key` was written at each of the revisions."""
        events = [
            MESSAGES["Event"](kv=MESSAGES["KeyValue"](key=key, value=value, mod_revision=revision))
            for revision in revisions
        ]
        self.answer(watch_id, revision=header or revisions[-1], events=events, fragment=fragment)

    def say(self, message):
        """Say any bytes."""
        self._answers.send_nowait(message)

    def break_off(self, code=StatusCode.UNAVAILABLE, details="Socket closed"):
        """End the stream."""
        self._answers.send_nowait(ChannelError(code, details))


class ScriptedChannel(Channel):
    """A channel to a test."""

    def __init__(self):
        self._streams_in, self._streams = trio.open_memory_channel(inf)
        self.calls = []
        self.answers = deque()
        self.closed = 0

    async def unary(self, method, request, /, *, time_limit, metadata=()):
        """Note the call; give the next answer: bytes, an exception, or a float of seconds to wait before it."""
        self.calls.append((method, request, time_limit, metadata))
        await trio.lowlevel.checkpoint()
        answer = self.answers.popleft()
        if isinstance(answer, float):
            await trio.sleep(answer)
            answer = self.answers.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer

    @asynccontextmanager
    async def stream(self, method, /, *, metadata=()):
        """Hand a new stream to the test."""
        self.calls.append((method, b"", inf, metadata))
        stream = ScriptedStream()
        self._streams_in.send_nowait(stream)
        try:
            yield stream
        finally:
            stream.is_open = False

    async def aclose(self):
        """Count."""
        self.closed += 1

    async def next_stream(self):
        """Wait until the client opens a stream."""
        with trio.fail_after(60):
            return await self._streams.receive()
