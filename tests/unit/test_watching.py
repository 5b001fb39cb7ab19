"""Watches over a channel, with every answer of the server in the test's hand."""

from __future__ import annotations

from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio

from etcd_infra._backends import watch_buffer
from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.endpoints import Endpoint, Endpoints
from etcd_infra._backends.rpc import RpcBackend
from etcd_infra._backends.status import StatusCode
from etcd_infra._backends.wire_schema import MESSAGES
from etcd_infra._etcd.model import KeyRange, WatchBatch
from etcd_infra.errors import (
    AccessDeniedError,
    CompactedError,
    EtcdError,
    InvalidRequestError,
    StoreResetError,
    UnavailableError,
)
from tests.helpers.scripted_channel import ScriptedChannel

KEY = KeyRange.one(b"k")
DENIED = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"


class RenewingChannel(ScriptedChannel):
    """A channel whose next stream has a new token."""

    renews_access = True


@asynccontextmanager
async def opened(endpoints=1, *, channel=ScriptedChannel):
    """A backend over scripted channels, which come with it."""
    channels = [channel() for _ in range(endpoints)]
    holder = Endpoints([Endpoint("h", n) for n in range(endpoints)], lambda endpoint: channels[endpoint.port])
    async with trio.open_nursery() as nursery:
        yield RpcBackend(holder, nursery, call_timeout=5.0, draw=lambda: 0.5), *channels
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def watching(backend, channel, *, stream=None, revision=1, **options):
    """A watch that was created on a stream (the next one unless it is given): watch, stream, id."""
    async with trio.open_nursery() as nursery:
        entered, leave = trio.Event(), trio.Event()
        box = []

        async def hold():
            async with backend.watch(KEY, **options) as watch:
                box.append(watch)
                entered.set()
                await leave.wait()

        nursery.start_soon(hold)
        stream = stream or await channel.next_stream()
        request = await stream.next_request()
        stream.answer(request.watch_id, revision=revision, created=True)
        await entered.wait()
        try:
            yield box[0], stream, request.watch_id
        finally:
            leave.set()


def revisions(batch):
    """The revisions of a batch's events."""
    return [event.revision for event in batch.events]


async def test_watches_share_a_stream_and_have_ids_of_their_own(autojump_clock):
    """Ordinary watches go over one stream under different ids; coordination has a stream of its own."""
    async with opened() as (backend, channel), watching(backend, channel) as (_, stream, first):
        async with watching(backend, channel, stream=stream) as (_, _, second):
            assert (first, second) == (1, 2)
        async with watching(backend, channel, coordination=True) as (_, other, third):
            assert other is not stream
            assert third == 1
        assert [metadata for _, _, _, metadata in channel.calls] == [(("hasleader", "true"),)] * 2


async def test_watch_is_cancelled_on_the_server_and_its_id_never_used_again(autojump_clock):
    """Leaving a watch cancels it there; late events of its id find nobody."""
    async with opened() as (backend, channel), watching(backend, channel) as (watch, stream, first):
        async with watching(backend, channel, stream=stream) as (_, _, second):
            pass
        assert (await stream.next_request()).watch_id == second
        stream.put(second, 7)
        stream.put(first, 8)
        assert revisions(await watch.receive()) == [8]
        async with watching(backend, channel, stream=stream) as (_, _, third):
            assert third == 3


@pytest.mark.parametrize("refused_id", [-1, 0])
@pytest.mark.parametrize(
    ("reason", "expected"),
    [(DENIED, AccessDeniedError), ("mvcc: watcher range is empty", InvalidRequestError), ("odd", EtcdError)],
)
async def test_refused_creation_raises_on_entering(refused_id, reason, expected, autojump_clock):
    """An answer that is created and canceled, under whatever id, is the error of the oldest creation."""
    async with opened() as (backend, channel), watching(backend, channel) as (healthy, stream, healthy_id):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _():
                with pytest.raises(expected):
                    async with backend.watch(KEY):
                        pass

            await stream.next_request()
            stream.answer(refused_id, created=True, canceled=True, cancel_reason=reason)
        assert not stream.has_request(), "there is nothing to cancel"
        stream.put(healthy_id, 9)
        assert revisions(await healthy.receive()) == [9]


async def test_consumer_that_left_before_the_answer_is_cancelled_when_it_comes(autojump_clock):
    """A watch abandoned before its creation was answered is cancelled as soon as it is."""
    async with opened() as (backend, channel), watching(backend, channel) as (watch, stream, first):
        with trio.move_on_after(1):
            async with backend.watch(KEY):
                pytest.fail("nobody answered")
        abandoned = (await stream.next_request()).watch_id
        assert not stream.has_request()
        stream.answer(abandoned, created=True)
        stream.put(abandoned, 5)
        stream.put(first, 6)
        assert revisions(await watch.receive()) == [6]
        assert (await stream.next_request()).watch_id == abandoned


async def test_watch_resumes_after_the_last_revision_it_got(autojump_clock):
    """After a break each watch is made anew at its own cursor, and says so in its place."""
    async with (
        opened() as (backend, channel),
        watching(backend, channel, start_revision=3) as (watch, stream, id_),
    ):
        stream.put(id_, 3, 4, header=99)
        stream.break_off()
        assert revisions(await watch.receive()) == [3, 4]
        again = await channel.next_stream()
        request = await again.next_request()
        assert request.start_revision == 5
        again.answer(request.watch_id, revision=6, created=True)
        again.put(request.watch_id, 5)
        assert await watch.receive() == WatchBatch(6, created=True)
        assert watch.created_revision == 6
        assert revisions(await watch.receive()) == [5]


async def test_watch_from_now_resumes_after_its_creation(autojump_clock):
    """A watch from now that got no event goes on after the revision of its creation."""
    async with opened() as (backend, channel), watching(backend, channel, revision=41) as (watch, stream, _):
        stream.break_off()
        again = await channel.next_stream()
        request = await again.next_request()
        assert (request.start_revision, watch.created_revision) == (42, 41)


async def test_coordination_watch_starts_from_now_each_time(autojump_clock):
    """A coordination watch asks for no history when it is made anew."""
    async with (
        opened() as (backend, channel),
        watching(backend, channel, revision=41, coordination=True) as (
            watch,
            stream,
            _,
        ),
    ):
        stream.break_off()
        again = await channel.next_stream()
        request = await again.next_request()
        assert request.start_revision == 0
        again.answer(request.watch_id, revision=50, created=True)
        assert await watch.receive() == WatchBatch(50, created=True)


async def test_half_a_revision_is_never_delivered(autojump_clock):
    """Fragments are joined; those of a broken stream are forgotten and come again."""
    async with opened() as (backend, channel), watching(backend, channel) as (watch, stream, id_):
        stream.put(id_, 2)
        stream.put(id_, 3, fragment=True)
        stream.break_off()
        assert revisions(await watch.receive()) == [2]
        again = await channel.next_stream()
        request = await again.next_request()
        assert request.start_revision == 3
        again.answer(request.watch_id, created=True, revision=3)
        again.put(request.watch_id, 3, fragment=True)
        again.put(request.watch_id, 3)
        assert (await watch.receive()).created
        assert revisions(await watch.receive()) == [3, 3]


async def test_fragments_are_asked_for(autojump_clock):
    """Every watch asks for fragments, so that no answer grows without bound."""
    async with opened() as (backend, channel), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _():
            async with backend.watch(KEY, prev_kv=True, no_put=True, no_delete=True, progress_notify=True):
                pass

        request = await (await channel.next_stream()).next_request()
        assert request.fragment
        assert (request.prev_kv, list(request.filters), request.progress_notify) == (True, [0, 1], True)
        nursery.cancel_scope.cancel()


async def test_requested_progress_is_ignored_and_periodic_progress_moves_the_cursor(autojump_clock):
    """Progress under id -1 moves nothing; a watch's own does, and is delivered, once the next one came."""
    async with opened() as (backend, channel), watching(backend, channel) as (watch, stream, id_):
        stream.answer(-1, revision=1000)
        stream.answer(id_, revision=20)
        stream.answer(id_, revision=30)
        assert await watch.receive() == WatchBatch(20)
        stream.break_off()
        request = await (await channel.next_stream()).next_request()
        assert request.start_revision == 21


async def test_compaction_is_told_once_the_buffer_is_empty_and_the_watch_is_not_made_again(autojump_clock):
    """A canceled watch delivers what it has, then its error each time it is asked; it is not created again."""
    async with opened() as (backend, channel), watching(backend, channel) as (watch, stream, id_):
        stream.put(id_, 2)
        stream.answer(id_, revision=0, canceled=True, compact_revision=9)
        await trio.testing.wait_all_tasks_blocked()
        assert revisions(await watch.receive()) == [2]
        for _ in range(2):
            with pytest.raises(CompactedError) as caught:
                await watch.receive()
            assert caught.value.compact_revision == 9
        stream.break_off()
        await trio.sleep(10)
        assert len(channel.calls) == 1


async def test_first_retry_is_made_at_once_and_the_next_ones_wait(autojump_clock):
    """A stream that served a while is opened again at once; one that breaks again waits longer each time."""
    async with opened() as (backend, channel), watching(backend, channel) as (_, stream, _):
        await trio.sleep(5)
        stream.break_off()
        began = trio.current_time()
        times = []
        for _ in range(8):
            again = await channel.next_stream()
            times.append(trio.current_time() - began)
            again.break_off()
        waits = [later - earlier for earlier, later in pairwise(times)]

        assert times[0] == 0
        assert waits == sorted(waits)
        assert 0 < waits[0] < 0.1
        assert waits[-1] <= 1.0


async def test_answering_stream_clears_its_endpoint(autojump_clock):
    """An endpoint whose stream answers again is well: its next rest is a short one."""
    async with opened() as (backend, channel), watching(backend, channel) as (_, stream, _):
        for _ in range(3):
            stream, _ = await reconnect(channel, stream, revision=2)  # noqa: PLW2901
        await trio.testing.wait_all_tasks_blocked()
        assert backend._endpoints.policy._failures == [0]


async def test_broken_stream_moves_to_another_endpoint(autojump_clock):
    """The stream that follows a break goes to another member."""
    async with opened(2) as (backend, one, two), watching(backend, one) as (watch, stream, _):
        stream.break_off()
        again = await two.next_stream()
        request = await again.next_request()
        again.answer(request.watch_id, created=True, revision=3)
        assert (await watch.receive()).created


async def test_member_that_does_not_answer_a_creation_is_left(autojump_clock):
    """A member that keeps silent about a creation for the call time-out is left for another one."""
    async with opened(2) as (backend, one, two), watching(backend, one) as (watch, stream, id_):
        await trio.sleep(100)
        stream.put(id_, 7)
        assert revisions(await watch.receive()) == [7]
        async with trio.open_nursery() as nursery:
            began = trio.current_time()

            @nursery.start_soon
            async def _():
                async with backend.watch(KEY):
                    nursery.cancel_scope.cancel()

            await stream.next_request()
            again = await two.next_stream()
            assert trio.current_time() - began == 5.0
            starts = {}
            for _ in range(2):
                request = await again.next_request()
                starts[request.start_revision] = request.watch_id
                again.answer(request.watch_id, created=True, revision=7)
        assert set(starts) == {0, 8}


async def test_member_that_fails_calls_loses_the_stream_too(autojump_clock):
    """A member that does not answer a call is left by the watches at once, if there is a better one."""
    lost = ChannelError(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    async with opened(2) as (backend, one, two), watching(backend, one) as (watch, _, _):
        one.answers += [lost]
        with pytest.raises(UnavailableError):
            await backend.get(b"k")
        again = await two.next_stream()
        request = await again.next_request()
        again.answer(request.watch_id, created=True, revision=3)
        assert (await watch.receive()).created

        two.answers += [lost]
        with pytest.raises(UnavailableError):
            await backend.get(b"k")
        await trio.testing.wait_all_tasks_blocked()
        assert again.is_open, "all members rest, so there is no better one"


async def test_unavailable_reason_takes_all_watches_elsewhere(autojump_clock):
    """A member that cancels a watch because it has no leader loses the whole stream."""
    async with opened(2) as (backend, one, two), watching(backend, one) as (watch, stream, id_):
        stream.answer(id_, canceled=True, cancel_reason="etcdserver: no leader")
        again = await two.next_stream()
        request = await again.next_request()
        again.answer(request.watch_id, created=True, revision=3)
        assert (await watch.receive()).created


@pytest.mark.parametrize("garbage", [b"\xff\xff", b"\x58"])
async def test_garbage_ends_the_stream_and_not_the_watch(garbage, autojump_clock):
    """Bytes that are no answer are a broken stream: the watch goes on elsewhere."""
    async with opened(2) as (backend, one, two), watching(backend, one) as (watch, stream, _):
        stream.say(garbage)
        again = await two.next_stream()
        request = await again.next_request()
        again.answer(request.watch_id, created=True, revision=3)
        assert (await watch.receive()).created


async def test_creation_that_nobody_asked_for_breaks_the_stream(autojump_clock):
    """An answer to no request is not believed."""
    async with opened() as (backend, channel), watching(backend, channel) as (_, stream, _):
        stream.answer(77, created=True)
        await channel.next_stream()
        assert not stream.is_open


# ── back-pressure ───────────────────────────────────────────────────────────────────────────────


async def test_slow_consumer_is_taken_off_and_put_back_where_it_stopped(monkeypatch, autojump_clock):
    """A full watch is cancelled and, once it was drained, created anew exactly after its last batch."""
    monkeypatch.setattr(watch_buffer, "MAX_EVENTS", 3)
    async with (
        opened() as (backend, channel),
        watching(backend, channel) as (slow, stream, slow_id),
        watching(backend, channel, stream=stream) as (quick, _, quick_id),
    ):
        for revision in range(2, 9):
            stream.put(slow_id, revision)
            stream.put(quick_id, revision)
        assert [revisions(await quick.receive()) for _ in range(7)] == [[r] for r in range(2, 9)]
        assert (await stream.next_request()).watch_id == slow_id
        assert [revisions(await slow.receive()) for _ in range(3)] == [[2], [3], [4]]
        assert not stream.has_request()

        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _():
                assert await slow.receive() == WatchBatch(8, created=True)
                assert revisions(await slow.receive()) == [5, 6]

            request = await stream.next_request()
            assert request.start_revision == 5
            stream.answer(request.watch_id, created=True, revision=8)
            stream.put(request.watch_id, 5, 6)


async def test_big_events_fill_a_buffer_too(monkeypatch, autojump_clock):
    """Bytes count as well as events."""
    monkeypatch.setattr(watch_buffer, "MAX_BYTES", 1000)
    async with opened() as (backend, channel), watching(backend, channel) as (watch, stream, id_):
        stream.put(id_, 2, value=bytes(2000))
        assert (await stream.next_request()).watch_id == id_
        assert revisions(await watch.receive()) == [2]


async def test_unread_progress_fills_a_buffer_too(monkeypatch, autojump_clock):
    """A batch without events takes room as well."""
    monkeypatch.setattr(watch_buffer, "MAX_EVENTS", 3)
    async with opened() as (backend, channel), watching(backend, channel) as (watch, stream, id_):
        for revision in range(2, 6):
            stream.answer(id_, revision=revision)
        assert (await stream.next_request()).watch_id == id_
        assert [await watch.receive() for _ in range(3)] == [WatchBatch(revision) for revision in range(2, 5)]


async def test_cancelled_receive_of_a_drained_watch_asks_once(monkeypatch, autojump_clock):
    """A consumer that gives up and comes back does not have its watch created twice."""
    monkeypatch.setattr(watch_buffer, "MAX_EVENTS", 1)
    async with opened() as (backend, channel), watching(backend, channel) as (watch, stream, id_):
        stream.put(id_, 2)
        await stream.next_request()
        await watch.receive()
        for _ in range(2):
            with trio.move_on_after(1):
                await watch.receive()
        assert (await stream.next_request()).start_revision == 3
        assert not stream.has_request()


async def test_full_watch_is_not_made_anew_with_the_stream(monkeypatch, autojump_clock):
    """A stream that breaks while a consumer is behind does not bring its watch back before it has caught up."""
    monkeypatch.setattr(watch_buffer, "MAX_EVENTS", 1)
    async with (
        opened() as (backend, channel),
        watching(backend, channel) as (slow, stream, slow_id),
        watching(backend, channel, stream=stream),
    ):
        stream.put(slow_id, 2)
        await stream.next_request()
        stream.break_off()
        again = await channel.next_stream()
        await again.next_request()
        await trio.testing.wait_all_tasks_blocked()
        assert not again.has_request()
        assert revisions(await slow.receive()) == [2]


async def test_flapping_stream_does_not_fill_the_buffer(monkeypatch, autojump_clock):
    """Creations that nobody has looked at yet are told once, as the last one."""
    monkeypatch.setattr(watch_buffer, "MAX_EVENTS", 3)
    async with opened() as (backend, channel), watching(backend, channel) as (watch, stream, _):
        id_ = 0
        for revision in range(10, 20):
            stream, id_ = await reconnect(channel, stream, revision=revision)  # noqa: PLW2901
        stream.put(id_, 30)
        await trio.testing.wait_all_tasks_blocked()
        assert await watch.receive() == WatchBatch(19, created=True)
        assert revisions(await watch.receive()) == [30]


# ── was the store reset? ────────────────────────────────────────────────────────────────────────


def range_answer(revision):
    """A RangeResponse at a revision."""
    return MESSAGES["RangeResponse"](header=MESSAGES["ResponseHeader"](revision=revision)).SerializeToString()


async def reconnect(channel, stream, *, revision):
    """Break the stream, and answer the creation on the next one at `revision`."""
    stream.break_off()
    again = await channel.next_stream()
    request = await again.next_request()
    again.answer(request.watch_id, created=True, revision=revision)
    return again, request.watch_id


async def test_reset_store_is_told(autojump_clock):
    """A store whose linearizable revision went back ends the watch with an error."""
    async with opened() as (backend, channel), watching(backend, channel, revision=41) as (watch, stream, _):
        channel.answers += [
            ChannelError(StatusCode.UNAVAILABLE, "etcdserver: leader changed"),
            range_answer(11),
        ]
        await reconnect(channel, stream, revision=11)
        assert (await watch.receive()).created
        with pytest.raises(StoreResetError, match=r"11.*41"):
            await watch.receive()
        reads = [
            MESSAGES["RangeRequest"].FromString(sent) for method, sent, *_ in channel.calls if "Range" in method
        ]
        assert [(read.serializable, read.count_only) for read in reads] == [(False, True)] * 2


async def test_lagging_member_is_no_reset(autojump_clock):
    """A member that is only behind is believed to catch up."""
    async with opened() as (backend, channel), watching(backend, channel, revision=41) as (watch, stream, _):
        channel.answers += [range_answer(41)]
        again, id_ = await reconnect(channel, stream, revision=11)
        assert (await watch.receive()).created
        await trio.sleep(1)
        again.put(id_, 42)
        assert revisions(await watch.receive()) == [42]


async def test_revision_that_was_only_asked_for_is_no_proof(autojump_clock):
    """A start in the future was never seen, so a store below it was not reset."""
    async with (
        opened() as (backend, channel),
        watching(backend, channel, start_revision=1000) as (
            watch,
            stream,
            _,
        ),
    ):
        channel.answers += [range_answer(5)]
        again, id_ = await reconnect(channel, stream, revision=5)
        assert (await watch.receive()).created
        await trio.sleep(1)
        again.put(id_, 1000)
        assert revisions(await watch.receive()) == [1000]


# ── the end ─────────────────────────────────────────────────────────────────────────────────────


async def test_watch_does_not_outlive_its_backend(autojump_clock):
    """A consumer that still waits when the backend ends is told so, and no watch can be opened after it."""
    async with trio.open_nursery() as nursery, opened() as (backend, channel):
        box = []

        async def consume():
            async with backend.watch(KEY) as watch:
                box.append(watch)
                with pytest.raises(trio.ClosedResourceError):
                    await watch.receive()

        nursery.start_soon(consume)
        stream = await channel.next_stream()
        stream.answer((await stream.next_request()).watch_id, created=True)
        await trio.testing.wait_all_tasks_blocked()
        assert box
    with pytest.raises(trio.ClosedResourceError):
        async with backend.watch(KEY):
            pass


@pytest.mark.parametrize(
    ("range_", "options"),
    [
        (KeyRange(b""), {}),
        (KeyRange(b"b", b"a"), {}),
        (KeyRange(b"a", b"a"), {}),
        (KEY, {"start_revision": -1}),
    ],
)
async def test_watch_that_a_server_would_misunderstand_is_refused(range_, options, autojump_clock):
    """An empty key, an empty range and a negative revision never reach a server."""
    async with opened() as (backend, channel):
        with pytest.raises(ValueError, match="watch"):
            backend.watch(range_, **options)
        assert not channel.calls


@pytest.mark.parametrize("believed", [False, True])
async def test_denial_is_believed_from_a_new_stream_only(believed, autojump_clock):
    """Where a new stream has a new token, a denied watch is created once more there, and others lose nothing."""
    async with (
        opened(channel=RenewingChannel) as (backend, channel),
        watching(backend, channel) as (healthy, stream, healthy_id),
        trio.open_nursery() as nursery,
    ):
        outcomes = []

        async def enter():
            try:
                async with backend.watch(KEY):
                    outcomes.append("entered")
            except AccessDeniedError as error:
                outcomes.append(error)

        nursery.start_soon(enter)
        request = await stream.next_request()
        stream.put(healthy_id, 5)
        stream.answer(request.watch_id, created=True, canceled=True, cancel_reason=DENIED)
        renewed = await channel.next_stream()
        requests = [await renewed.next_request() for _ in range(2)]
        starts = {request.start_revision: request.watch_id for request in requests}
        assert {6, 0} == set(starts)
        for request in requests:
            denied = believed and request.start_revision == 0
            fields = {"canceled": True, "cancel_reason": DENIED} if denied else {}
            renewed.answer(request.watch_id, revision=5, created=True, **fields)
        await trio.testing.wait_all_tasks_blocked()
        assert [AccessDeniedError if believed else str] == [type(outcome) for outcome in outcomes]
        renewed.put(starts[6], 6)
        assert [5, 6] == [revision for _ in range(3) for revision in revisions(await healthy.receive())]


async def test_wrong_password_fails_every_watch(autojump_clock):
    """When a stream is refused for who we are, nobody waits for a watch for ever."""
    wrong = ChannelError(
        StatusCode.INVALID_ARGUMENT, "etcdserver: authentication failed, invalid user ID or password"
    )
    async with opened() as (backend, channel):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _():
                with pytest.raises(AccessDeniedError, match="invalid user ID"):
                    async with backend.watch(KEY):
                        pass

            (await channel.next_stream()).break_off(wrong.code, wrong.details)
