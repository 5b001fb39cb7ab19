"""Etcd over gRPC against a real server: connections, threads, failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial

import pytest
import trio

from etcd_infra._backends import wire
from etcd_infra._backends.grpcio_channel import GrpcioChannel
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    KeyRange,
    LeaseRenewal,
    LeaseTimeToLive,
    Put,
    Range,
    Txn,
    WatchRequest,
)
from etcd_infra.errors import (
    CompactedError,
    ForkedError,
    FutureRevisionError,
    InvalidRequestError,
    LeaseExistsError,
    LeaseNotFoundError,
    OutcomeUnknownError,
    UnavailableError,
)
from etcd_infra.testing import EtcdServer, TcpProxy, find_etcd, open_proxy

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]

KEY = KeyRange.one(b"k")


@pytest.fixture
async def server():
    """A server of its own for each test."""
    async with EtcdServer(extra_args=["--heartbeat-interval=20", "--election-timeout=200"]) as running:
        yield running


@pytest.fixture
async def backend(server, open_etcd):
    """A backend to that server."""
    async with open_etcd(server.endpoint) as opened:
        yield opened


async def eventually(condition, seconds=5.0):
    """Wait until a condition holds."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.01)


async def until_it_works(call, seconds=10.0):
    """Repeat a call that finds etcd unavailable; return the answer and the seconds that it took."""
    began = trio.current_time()
    with trio.fail_after(seconds):
        while True:
            try:
                return await call(), trio.current_time() - began
            except (UnavailableError, OutcomeUnknownError):
                await trio.sleep(0.02)


# ── the ten verbs ───────────────────────────────────────────────────────────────────────────────


async def test_verbs_answer_as_etcd_does(backend, server):
    """Every verb works over the wire, and refusals come as their own errors."""
    first = await backend.put(b"k", b"v")
    assert (await backend.get(b"k")).value == b"v"
    done = await backend.txn(
        Txn(
            (Compare.modified_at(b"k", first),),
            (Put(b"k", b"w", prev_kv=True), Range(KEY), Txn(success=(DeleteRange(KeyRange.one(b"x")),))),
        )
    )
    assert done.succeeded
    assert done.results[0].prev_kv.value == b"v"
    assert done.results[1].kvs[0].value == b"w"
    assert done.results[2].results[0].deleted == 0
    with pytest.raises(FutureRevisionError):
        await backend.get(b"k", revision=1000)
    assert await backend.compact(done.revision) == done.revision
    with pytest.raises(CompactedError):
        await backend.compact(1)
    with pytest.raises(CompactedError):
        await backend.get(b"k", revision=1)
    with pytest.raises(InvalidRequestError, match="key is not provided"):
        await backend.put(b"", b"")
    with pytest.raises(InvalidRequestError, match="too large"):
        await backend.put(b"k", bytes(1_600_000))
    with pytest.raises(InvalidRequestError, match="larger than max"):
        await backend.put(b"k", bytes(2_300_000))
    status = await backend.status()
    assert (status.version, status.leader, status.revision) == (server.version, status.member, done.revision)


async def test_leases_answer_as_etcd_does(backend):
    """Grant, renew, ask, list and revoke; a lease that is not there is 0, -1 and an error."""
    granted = await backend.lease_grant(30, lease=77)
    assert (granted.lease, granted.ttl) == (77, 30)
    with pytest.raises(LeaseExistsError):
        await backend.lease_grant(30, lease=77)
    await backend.put(b"k", b"v", lease=77)
    assert (await backend.lease_keep_alive(77)).ttl == 30
    left = await backend.lease_time_to_live(77, keys=True)
    assert (left.granted_ttl, left.keys, 28 <= left.ttl <= 30) == (30, (b"k",), True)
    assert await backend.lease_list() == (77,)
    gone = await backend.lease_revoke(77)

    assert await backend.lease_keep_alive(77) == LeaseRenewal(77, 0, gone)
    assert await backend.lease_time_to_live(77) == LeaseTimeToLive(77, -1, revision=gone)
    with pytest.raises(LeaseNotFoundError):
        await backend.lease_revoke(77)
    with pytest.raises(LeaseNotFoundError):
        await backend.put(b"k", b"v", lease=77)
    with pytest.raises(InvalidRequestError, match="TTL"):
        await backend.lease_grant(9_000_000_001)


async def test_answers_beyond_four_mebibytes_arrive(backend):
    """A limit like grpcio's own of 4 MiB does not apply, neither to reads nor to writes that answer much."""
    for number in range(6):
        await backend.put(b"big/%d" % number, bytes(1024 * 1024))
    found = await backend.range(Range(KeyRange.prefix(b"big/")))
    deleted = await backend.txn(Txn(success=(DeleteRange(KeyRange.prefix(b"big/"), prev_kv=True),)))

    assert sum(len(kv.value) for kv in found.kvs) == 6 * 1024 * 1024
    assert deleted.results[0].deleted == 6


# ── threads and processes ───────────────────────────────────────────────────────────────────────


async def test_nothing_is_left_after_the_block(server, open_etcd):
    """Calls, streams and threads end with the block, also when calls are in flight."""
    before = set(threading.enumerate())
    async with open_etcd(server.endpoint) as backend, trio.open_nursery() as nursery:
        async with backend.watch(KEY), backend.watch(KEY, coordination=True):
            for _ in range(20):
                nursery.start_soon(backend.put, b"k", b"v")
            await backend.put(b"k", b"v")
        server.pause()
        for _ in range(20):
            nursery.start_soon(backend.get, b"k")
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    # Trio keeps a worker thread for ten seconds after its work.
    idle = "Trio thread"
    await eventually(
        lambda: all(thread.name.startswith(idle) for thread in set(threading.enumerate()) - before), 2.0
    )


@pytest.mark.slow
async def test_stream_over_grpcio_ends_with_its_threads(server):
    """
    When a stream's block is left, no thread of the call is left, however much it still had to send.

    A program that ends while such a thread is about to take the call's lock waits for that lock for ever.
    """
    create = wire.encode_watch_create(WatchRequest(KEY), 0)
    channel = GrpcioChannel(server.endpoint.removeprefix("http://"), dial_timeout=2.0)
    for _ in range(20):
        before = set(threading.enumerate())
        async with channel.stream("/etcdserverpb.Watch/Watch") as stream:
            for _ in range(500):
                stream.send(create)
            await stream.receive()
        # One more is the channel's own: it ends when the channel has no calls.
        assert 1 >= len(set(threading.enumerate()) - before)
    await channel.aclose()


async def test_block_ends_soon_while_etcd_is_silent(server, open_etcd):
    """Leaving takes no longer than moments when the server does not answer any more."""
    async with open_etcd(server.endpoint) as backend, backend.watch(KEY):
        server.pause()
        began = time.monotonic()
    assert time.monotonic() - began < 1.0


async def test_closed_backend_says_so(server, open_etcd):
    """A backend that is used after its block is a mistake of the caller."""
    async with open_etcd(server.endpoint) as backend:
        await backend.get(b"k")
    with pytest.raises(trio.ClosedResourceError):
        await backend.get(b"k")


async def test_cancelled_call_is_cancelled_on_the_wire(server, transport, open_etcd):
    """A call that its caller gave up is gone from the connection, and the next one is not behind it."""
    async with open_etcd(server.endpoint) as backend:
        await backend.get(b"k")
        channel = backend._endpoints.channel(0)
        calls = {
            "grpcio": lambda: channel._calls,
            "http2": lambda: channel._connection._calls,
            "gateway": lambda: channel._under_way,
        }[transport]()
        # One call is always there: the stream that the watches will need. The gateway has none without a watch.
        idle = 0 if transport == "gateway" else 1
        await eventually(lambda: len(calls) == idle, 1.0)
        server.pause()
        with trio.move_on_after(0.1) as scope:
            await backend.get(b"k")
        assert scope.cancelled_caught
        await eventually(lambda: len(calls) == idle, 1.0)
        server.resume()
        assert await backend.get(b"k") is None


def in_a_child(use):
    """Fork; run `use` in the child, in a Trio run of its own; return whether it returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: "forking with threads", our point
        child = os.fork()
    if not child:  # pragma: no cover - the child's coverage is not collected
        code = 1
        try:
            signal.set_wakeup_fd(-1)  # the parent's run has one, and Trio would warn
            trio.run(use)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


async def test_forked_child_is_told(backend):
    """In a forked child every use of the parent's backend raises; the parent and its watch go on."""

    async def use():
        with pytest.raises(ForkedError), trio.fail_after(5):
            await backend.get(b"k")
        with pytest.raises(ForkedError), trio.fail_after(5):
            async with backend.watch(KEY):
                pass

    async with backend.watch(KEY) as batches:
        assert await trio.to_thread.run_sync(in_a_child, use)
        await backend.put(b"k", b"v")
        assert b"v" == (await batches.receive()).events[0].kv.value
    assert (await backend.get(b"k")).value == b"v"


async def test_forked_child_has_a_connection_of_its_own(backend, server, open_etcd):
    """A child opens its own backend beside the parent's open one."""

    async def use():
        with trio.fail_after(10):
            async with open_etcd(server.endpoint) as own, own.watch(KEY) as batches:
                await own.put(b"k", b"child's")
                assert b"child's" == (await batches.receive()).events[0].kv.value

    await backend.put(b"k", b"parent's")
    assert await trio.to_thread.run_sync(in_a_child, use)
    assert b"child's" == (await backend.get(b"k")).value


async def test_ipv6(server, open_etcd):
    """An address of version 6 stands in brackets; calls and watches go there."""
    proxy = TcpProxy(server.endpoint, "http://[::1]")
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, proxy.serve, 0, host="::1"))
        port = listener.socket.getsockname()[1]
        async with open_etcd(f"http://[::1]:{port}") as backend, backend.watch(KEY) as batches:
            await backend.put(b"k", b"six")
            assert b"six" == (await batches.receive()).events[0].kv.value
        nursery.cancel_scope.cancel()


def test_backends_of_several_threads_do_not_meet(transport):
    """Two Trio runs in two threads use etcd at once, and both end."""
    program = """
import sys, threading, trio
from etcd_infra._backends.opening import open_etcd
from etcd_infra.testing import EtcdServer

async def work(endpoint, name):
    async with open_etcd(endpoint, transport=sys.argv[1]) as backend:
        for _ in range(50):
            await backend.put(name, b"v")

async def main():
    async with EtcdServer() as server:
        threads = [threading.Thread(target=trio.run, args=(work, server.endpoint, name)) for name in (b"a", b"b")]
        for thread in threads: thread.start()
        while any(thread.is_alive() for thread in threads): await trio.sleep(0.01)
        async with open_etcd(server.endpoint) as backend:
            assert [(await backend.get(name)).version for name in (b"a", b"b")] == [50, 50]

trio.run(main)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program, transport], check=False, timeout=60)
    assert done.returncode == 0


# ── failures ────────────────────────────────────────────────────────────────────────────────────


async def test_nobody_there_is_unavailable_at_once(server, open_etcd):
    """A refused connection is certainly not applied, for writes too, and costs no waiting."""
    async with open_etcd(server.endpoint) as backend:
        await server.kill()
        began = trio.current_time()
        with pytest.raises(UnavailableError):
            await backend.put(b"k", b"v")
        assert trio.current_time() - began < 1.0


async def test_name_that_does_not_resolve_is_unavailable(open_etcd):
    """A host that does not exist has got no request."""
    async with open_etcd("no-such-host.invalid:2379") as backend:
        with pytest.raises(UnavailableError):
            await backend.put(b"k", b"v")


async def test_mute_listener_is_unavailable_within_the_dial_timeout(server, open_etcd):
    """An endpoint that accepts and says nothing has certainly got no request."""
    async with open_proxy(server.endpoint) as mute, open_etcd(mute.endpoint, dial_timeout=0.5) as backend:
        mute.black_hole()
        began = trio.current_time()
        with pytest.raises(UnavailableError):
            await backend.put(b"k", b"v")
        assert trio.current_time() - began < 1.5


async def test_lost_answer_is_unknown_and_the_write_was_applied(server, open_etcd):
    """A write whose answer was swallowed is unknown, names its key, and did happen."""
    async with open_proxy(server.endpoint) as proxy, open_etcd(proxy.endpoint, call_timeout=0.5) as backend:
        await backend.get(b"k")
        proxy.swallow_answers()
        with pytest.raises(OutcomeUnknownError) as caught:
            await backend.put(b"k", b"v")
        assert caught.value.keys == (b"k",)
        proxy.heal()
        found, seconds = await until_it_works(lambda: backend.get(b"k"))
        assert found.value == b"v"
        assert seconds < 3.0


async def test_reset_connection_is_unknown_for_a_write_in_flight(server, open_etcd):
    """A write under way when the connection is reset is unknown; the next call works at once."""
    async with (
        open_proxy(server.endpoint) as proxy,
        open_etcd(proxy.endpoint) as backend,
        trio.open_nursery() as nursery,
    ):
        await backend.get(b"k")
        proxy.hold_answers()

        @nursery.start_soon
        async def _():
            with pytest.raises(OutcomeUnknownError):
                await backend.put(b"k", b"v")

        await trio.sleep(0.1)
        proxy.reset()
        proxy.heal()
        _, seconds = await until_it_works(lambda: backend.get(b"k"))
        assert seconds < 3.0


async def test_recovery_after_an_outage_is_quick(server, open_etcd):
    """Some seconds without a server do not delay the first success after it is back."""
    async with open_etcd(server.endpoint) as backend:
        await backend.get(b"k")
        await server.stop()
        with trio.move_on_after(4):
            while True:
                with pytest.raises((UnavailableError, OutcomeUnknownError)):
                    await backend.get(b"k")
                await trio.sleep(0.1)
        await server.restart()
        _, seconds = await until_it_works(lambda: backend.get(b"k"))
        assert seconds < 3.0


async def test_silent_member_is_left_for_one_that_answers(server, open_etcd):
    """With one member stopped, calls and keep-alives go on through the other within the call time-out."""
    async with (
        open_proxy(server.endpoint) as mute,
        open_etcd([mute.endpoint, server.endpoint], dial_timeout=0.5, call_timeout=1.0) as backend,
    ):
        mute.black_hole()
        _, seconds = await until_it_works(lambda: backend.get(b"k"))
        assert seconds < 2.0
        granted, _ = await until_it_works(lambda: backend.lease_grant(10))
        for _ in range(4):
            renewal, seconds = await until_it_works(lambda: backend.lease_keep_alive(granted.lease))
            assert renewal.ttl == 10
            assert seconds < 1.5


async def test_member_stopped_under_its_connection_is_left(server, open_etcd):
    """A member that stops answering on an open connection costs one call time-out, not more."""
    async with (
        EtcdServer() as other,
        open_etcd([server.endpoint, other.endpoint], call_timeout=0.5) as backend,
    ):
        await backend.put(b"k", b"v")
        server.pause()
        found, seconds = await until_it_works(lambda: backend.get(b"k"))
        assert found is None
        assert seconds < 1.5


async def test_shared_process_does_not_share_connections(server, open_etcd):
    """Two backends of one process have connections of their own: a reset of one does not touch the other."""
    async with (
        open_proxy(server.endpoint) as proxy,
        open_etcd(proxy.endpoint) as one,
        open_etcd(proxy.endpoint) as two,
    ):
        await one.get(b"k")
        await two.get(b"k")
        assert proxy.accepted == 2
