"""The gateway's channel against a scripted server: order, pieces, errors after 200, hanging up, threads."""

from __future__ import annotations

import json
import os
import threading
import warnings
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing

from etcd_infra import OutcomeUnknownError, UnavailableError, open_etcd
from etcd_infra._backends import gateway_watch, wire
from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.endpoints import Endpoint
from etcd_infra._backends.gateway import GatewayChannel
from etcd_infra._backends.status import StatusCode
from etcd_infra._etcd.model import KeyRange, WatchRequest
from tests.helpers.scripted_http import chunked, hanging, open_http, whole

WATCH = "/etcdserverpb.Watch/Watch"
RANGE = "/etcdserverpb.KV/Range"
TXN = "/etcdserverpb.KV/Txn"
KEEP_ALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"
HEADER = {"header": {"revision": "7"}}
K = KeyRange.one(b"k")


@asynccontextmanager
async def channel_to(server, dial_timeout=1.0):
    """Open a channel."""
    channel = GatewayChannel(Endpoint("127.0.0.1", server.port), dial_timeout=dial_timeout, tls=None)
    try:
        yield channel
    finally:
        with trio.fail_after(3):
            await channel.aclose()


def created(watch_id):
    """Answer a creation."""
    return json.dumps({"result": {**HEADER, "watch_id": str(watch_id), "created": True}}).encode() + b"\n"


def event(watch_id, revision, value=b"dg=="):
    """Tell of a put."""
    kv = {"key": "aw==", "value": value.decode(), "mod_revision": str(revision)}
    answer = {"header": {"revision": str(revision)}, "watch_id": str(watch_id), "events": [{"kv": kv}]}
    return json.dumps({"result": answer}).encode() + b"\n"


def create(watch_id):
    """Ask for a watch."""
    return wire.encode_watch_create(WatchRequest(K), watch_id)


def in_pieces(data, size):
    """Cut it."""
    return [data[at : at + size] for at in range(0, len(data), size)]


# ── watches ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 7, 700, 10**9])
async def test_a_watch_in_any_pieces(size):
    """One document per chunk, a part of one, or several: the answers are the same."""
    told = created(1) + b"".join(event(1, revision, b"x" * 400) for revision in range(2, 12))
    async with (
        open_http(watch=chunked(*in_pieces(told, size), hang=True)) as server,
        channel_to(server) as channel,
    ):
        async with channel.stream(WATCH, metadata=wire.HAS_LEADER) as stream:
            stream.send(create(1))
            answers = [wire.decode_watch(await stream.receive())[1] for _ in range(11)]
    assert answers[0].created
    assert [*range(2, 12)] == [answer.events[0].revision for answer in answers[1:]]
    assert {"true"} == {server.requests[-1][2]["grpc-metadata-hasleader"]}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"grpc_code": 14, "http_code": 503, "message": "etcdserver: no leader"}, StatusCode.UNAVAILABLE),
        ({"code": 16, "message": "etcdserver: invalid auth token"}, StatusCode.UNAUTHENTICATED),
    ],
)
async def test_error_after_the_head_ends_the_stream(error, code):
    """An answer with status 200 that says an error and ends cleanly is that error, in either shape."""
    told = created(1) + json.dumps({"error": error}).encode()
    async with open_http(watch=chunked(told)) as server, channel_to(server) as channel:
        async with channel.stream(WATCH) as stream:
            stream.send(create(1))
            assert wire.decode_watch(await stream.receive())[1].created
            with pytest.raises(ChannelError) as caught:
                await stream.receive()
    assert (code, error["message"]) == (caught.value.code, caught.value.details)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (chunked(created(1)), StatusCode.OK),
        (chunked(created(1), created(1)[:20]), StatusCode.INTERNAL),
        (whole(b"<html>busy</html>", "503 Service Unavailable"), StatusCode.UNAVAILABLE),
        (whole(b'{"code":7,"message":"etcdserver: permission denied"}', "403 Forbidden"), 7),
    ],
    ids=["a clean end", "a cut document", "a proxy's page", "etcd's refusal"],
)
async def test_end_of_a_watch_ends_the_stream(script, code):
    """However one watch ends, the stream does, so that its watches are created anew."""
    async with open_http(watch=script) as server, channel_to(server) as channel:
        async with channel.stream(WATCH) as stream:
            stream.send(create(1))
            with pytest.raises(ChannelError) as caught:
                while True:
                    await stream.receive()
    assert code == caught.value.code


async def test_creations_are_answered_in_their_order():
    """The second watch's answers are kept until the first one has its own."""
    first_may_begin = trio.Event()

    async def script(connection, body):
        watch_id = int(json.loads(body)["create_request"]["watch_id"])
        if watch_id == 1:
            await first_may_begin.wait()
        await chunked(created(watch_id), event(watch_id, 8), hang=True)(connection, body)

    async with open_http(watch=script) as server, channel_to(server) as channel:
        async with channel.stream(WATCH) as stream:
            stream.send(create(1))
            stream.send(create(2))
            with trio.move_on_after(0.2) as scope:
                await stream.receive()
            assert scope.cancelled_caught
            first_may_begin.set()
            answers = [wire.decode_watch(await stream.receive()) for _ in range(4)]
    assert [1, 2] == [watch_id for watch_id, answer in answers if answer.created]
    assert {1, 2} == {watch_id for watch_id, answer in answers if answer.events}


async def test_cancel_hangs_up_and_the_others_go_on():
    """Canceling a watch ends its connection; leaving the block ends them all."""

    async def script(connection, body):
        watch_id = int(json.loads(body)["create_request"]["watch_id"])
        await chunked(created(watch_id), hang=True)(connection, body)

    async with open_http(watch=script) as server, channel_to(server) as channel:
        async with channel.stream(WATCH) as stream:
            for watch_id in (1, 2, 3):
                stream.send(create(watch_id))
                await stream.receive()
            stream.send(wire.encode_watch_cancel(2))
            stream.send(wire.encode_watch_cancel(9))
            with trio.fail_after(2):
                while server.hung_up < 1:
                    await trio.sleep(0.01)
        with trio.fail_after(2):
            while server.hung_up < 3:
                await trio.sleep(0.01)


async def test_refused_creation_hangs_up():
    """Nobody cancels what was refused, so its connection is ended here; the stream and its other watches go on."""

    async def script(connection, body):
        watch_id = int(json.loads(body)["create_request"]["watch_id"])
        answer = {**HEADER, "watch_id": "-1", "created": True, "canceled": True, "cancel_reason": "no"}
        told = created(watch_id) if watch_id == 1 else json.dumps({"result": answer}).encode() + b"\n"
        await chunked(told, hang=True)(connection, body)

    async with open_http(watch=script) as server, channel_to(server) as channel:
        async with channel.stream(WATCH) as stream:
            for watch_id in (1, 2, 3):
                stream.send(create(watch_id))
            answers = [wire.decode_watch(await stream.receive())[1] for _ in range(3)]
            assert [False, True, True] == [answer.canceled for answer in answers]
            with trio.fail_after(2):
                while server.hung_up < 2:
                    await trio.sleep(0.01)
            with trio.move_on_after(0.2) as scope:
                await stream.receive()
            assert scope.cancelled_caught


async def test_member_that_hangs_is_noticed_by_a_question(monkeypatch):
    """A member that accepts connections and answers nothing any more ends the stream, if there are watches."""
    monkeypatch.setattr(gateway_watch, "_PING_SECONDS", 0.1)
    monkeypatch.setattr(gateway_watch, "_PONG_SECONDS", 0.1)
    async with open_http(watch=chunked(created(1), hang=True)) as server, channel_to(server) as channel:
        async with channel.stream(WATCH) as stream:
            stream.send(create(1))
            await stream.receive()
            with trio.move_on_after(0.5):
                await stream.receive()
            asked = [path for _, path, _, _ in server.requests].count("/version")
            assert asked > 2
            server.scripts["/version"] = hanging
            with trio.fail_after(2), pytest.raises(ChannelError) as caught:
                await stream.receive()
    assert StatusCode.UNAVAILABLE == caught.value.code


# ── calls ───────────────────────────────────────────────────────────────────────────────────────


async def call(channel, method=RANGE, time_limit=2.0):
    """Make a call with an empty request."""
    return await channel.unary(method, b"", time_limit=time_limit)


async def test_renewals_do_not_wait_behind_calls():
    """With as many calls as threads, and more, all of them stuck, a lease is renewed at once."""
    renewed = json.dumps({"result": {**HEADER, "ID": "5", "TTL": "30"}}).encode()
    async with open_http(kv__range=hanging, lease__keepalive=whole(renewed)) as server:
        async with channel_to(server) as channel, trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(call, channel)
            await trio.sleep(0.3)
            with trio.fail_after(0.5):
                answer = await call(channel, KEEP_ALIVE)
            assert 30 == wire.decode_lease_keep_alive(answer, 5).ttl
            nursery.cancel_scope.cancel()


async def test_cancelled_call_keeps_no_thread():
    """A caller that gives up ends the connection, and the thread that waited for an answer ends with it."""
    async with open_http(kv__range=hanging) as server, channel_to(server) as channel:
        before = {thread for thread in threading.enumerate() if " from " in thread.name}
        with trio.move_on_after(0.2):
            await call(channel)
        with trio.fail_after(1):
            while {thread for thread in threading.enumerate() if " from " in thread.name} - before:
                await trio.sleep(0.01)
            while server.hung_up < 1:
                await trio.sleep(0.01)


async def test_connections_are_kept_and_an_ended_one_is_not_used():
    """Calls one after the other share a connection; one that the server ended costs no failure."""
    async with open_http(kv__range=whole(b"{}")) as server, channel_to(server) as channel:
        for _ in range(3):
            await call(channel)
        server.scripts["/v3/kv/range"] = closing
        await call(channel)
        await trio.sleep(0.05)
        server.scripts["/v3/kv/range"] = whole(b"{}")
        await call(channel)


async def closing(connection, _):
    """Answer, and hang up without a word of warning."""
    await connection.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    await connection.aclose()


@pytest.mark.parametrize(
    "script",
    [
        whole(b"{}", "307 Temporary Redirect"),
        whole(b"<html>502</html>", "502 Bad Gateway"),
        whole(b"no JSON"),
        whole(b"[]"),
        whole(b'{"code":14,"message":"etcdserver: request timed out"}', "503 Service Unavailable"),
    ],
    ids=["redirect", "proxy", "no JSON", "no object", "timed out"],
)
async def test_answer_that_proves_nothing_leaves_a_write_unknown(script):
    """A write that was answered by anything but etcd's refusal or consent may have been applied."""
    async with open_http(kv__put=script) as server, open_etcd(server.endpoint, transport="gateway") as etcd:
        with pytest.raises(OutcomeUnknownError):
            await etcd.put(b"k", b"v")


@pytest.mark.parametrize(
    "version",
    [
        whole(b"[]"),
        whole(b"{}"),
        whole(b'{"etcdserver":5}'),
        whole(b"", "502 Bad Gateway"),
        whole(b"x"),
        hanging,
    ],
)
async def test_write_is_not_sent_before_the_api_is_found(version):
    """Whoever does not say which etcd it is has certainly got no request."""
    async with open_http(kv__put=hanging) as server:
        server.scripts["/version"] = version
        async with open_etcd(server.endpoint, transport="gateway", dial_timeout=0.3) as etcd:
            with pytest.raises(UnavailableError):
                await etcd.put(b"k", b"v")
    assert {"/version"} == {path for _, path, _, _ in server.requests}


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "zwölf.invalid"])
async def test_name_that_is_none_is_unavailable(host):
    """What can not be a host's name has got no request, and no watch; nothing foreign is raised."""
    channel = GatewayChannel(Endpoint(host, 2379), dial_timeout=float("inf"), tls=None)
    with pytest.raises(ChannelError) as caught:
        await call(channel)
    assert caught.value.never_sent
    with pytest.raises(ChannelError):
        async with gateway_watch.Caller(Endpoint(host, 2379), dial_timeout=1.0, tls=None).ask("GET", "/", {}):
            pass
    await channel.aclose()


async def test_nothing_is_taken_from_the_environment(monkeypatch, tmp_path):
    """Proxies and passwords of the environment are not for a coordination service."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login alice password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with open_http(kv__range=whole(b"{}")) as server, channel_to(server) as channel:
        await call(channel)
    assert not any("authorization" in headers for _, _, headers, _ in server.requests)


async def test_call_out_of_time_says_whether_it_was_sent():
    """In the queue for a thread it was not, on the wire it was."""
    async with open_http(kv__range=whole(b"{}")) as server, channel_to(server) as channel:
        await call(channel)
        server.scripts["/v3/kv/range"] = hanging
        outcomes = []

        async def ask(time_limit):
            with pytest.raises(ChannelError) as caught:
                await call(channel, time_limit=time_limit)
            outcomes.append(caught.value.never_sent)

        async with trio.open_nursery() as nursery:
            for _ in range(32):
                nursery.start_soon(ask, 1.5)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(8):
                nursery.start_soon(ask, 0.5)
    assert [False] * 32 + [True] * 8 == sorted(outcomes)


async def test_child_leaves_its_parents_calls_alone():
    """Closing in a forked child breaks nothing off: the sockets are the parent's, too."""
    async with open_http(kv__range=whole(b"{}")) as server, channel_to(server) as channel:
        await call(channel)
        asked, go_on = trio.Event(), trio.Event()

        async def slowly(*request):
            asked.set()
            await go_on.wait()
            await whole(b"{}")(*request)

        server.scripts["/v3/kv/range"] = slowly
        answers = []

        async def ask():
            answers.append(await call(channel))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await asked.wait()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: "forking with threads"
                child = os.fork()
            if not child:  # pragma: no cover - the child's coverage is not collected
                with suppress(BaseException):
                    channel.aclose().send(None)
                os._exit(0)
            await trio.to_thread.run_sync(os.waitpid, child, 0)
            go_on.set()
        assert 1 == len(answers)
