"""Watches over gRPC against a real server: nothing is lost or told twice, whatever breaks."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra._backends import watch_buffer
from etcd_infra._etcd.model import KeyRange
from etcd_infra.errors import CompactedError, OutcomeUnknownError, StoreResetError, UnavailableError
from etcd_infra.testing import EtcdCluster, EtcdServer, find_etcd, open_proxy

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]

PREFIX = KeyRange.prefix(b"w/")
QUICK = ["--heartbeat-interval=20", "--election-timeout=200"]


@pytest.fixture
async def server():
    """A server of its own for each test."""
    async with EtcdServer(extra_args=QUICK) as running:
        yield running


async def put(backend, key, value=b"v"):
    """Put until it is certain that it was done; return a revision at or after it."""
    while True:
        try:
            return await backend.put(key, value)
        except (UnavailableError, OutcomeUnknownError):
            await trio.sleep(0.05)


async def collect(watch, last):
    """Receive up to revision `last`; return the revisions of all events, and how often it was created anew."""
    revisions, creations = [], 0
    with trio.fail_after(30):
        while not revisions or revisions[-1] < last:
            batch = await watch.receive()
            creations += batch.created
            revisions += [event.revision for event in batch.events]
    return revisions, creations


async def test_watch_from_a_revision_and_from_now(server, open_etcd):
    """A start is inclusive; from now means after the revision of the creation."""
    async with open_etcd(server.endpoint) as backend:
        first = await backend.put(b"w/a", b"1")
        async with (
            backend.watch(PREFIX, start_revision=first) as past,
            backend.watch(PREFIX) as present,
        ):
            assert present.created_revision == first
            second = await backend.put(b"w/a", b"2")
            assert await collect(past, second) == ([first, second], 0)
            assert await collect(present, second) == ([second], 0)


def keeps_promises(version):
    """Whether a killed server of this version still has every write that it acknowledged (#14370)."""
    numbers = tuple(map(int, version.split(".")))
    return (3, 4, 21) <= numbers < (3, 5) or numbers >= (3, 5, 5)


@pytest.mark.parametrize("is_killed", [False, True], ids=["restart", "kill"])
async def test_nothing_is_lost_over_restarts_and_resets(server, is_killed, open_etcd):
    """Across a server that restarts and connections that are reset every revision comes once, in order."""
    if is_killed and not keeps_promises(server.version):
        pytest.skip(f"etcd {server.version} may lose acknowledged writes when it is killed")
    chaos = random.Random(1)
    async with (
        open_proxy(server.endpoint) as proxy,
        open_etcd(proxy.endpoint, call_timeout=1.0) as backend,
        open_etcd(server.endpoint, call_timeout=1.0) as writer,
        backend.watch(PREFIX) as watch,
        trio.open_nursery() as nursery,
    ):
        first = watch.created_revision + 1
        last = trio.Event()
        box = []

        @nursery.start_soon
        async def _():
            for number in range(300):
                box.append(await put(writer, b"w/%d" % number))
                await trio.sleep(0.003)
            last.set()

        for _ in range(6):
            await trio.sleep(chaos.uniform(0.02, 0.2))
            proxy.reset()
        if is_killed:
            await server.kill()
        await server.restart()
        proxy.reset()
        await last.wait()
        revisions, creations = await collect(watch, box[-1])

    assert revisions == list(range(first, box[-1] + 1))
    assert creations >= 2


async def test_big_revision_is_delivered_whole(server, open_etcd):
    """A revision of six deletes with 1 MiB each in `prev_kv` comes in fragments and is one batch."""
    async with open_etcd(server.endpoint) as backend, backend.watch(PREFIX, prev_kv=True) as watch:
        for number in range(6):
            last = await backend.put(b"w/%d" % number, bytes(1024 * 1024))
        await collect(watch, last)
        await backend.delete(PREFIX)
        batch = await watch.receive()

    assert [len(event.prev_kv.value) for event in batch.events] == [1024 * 1024] * 6
    assert {event.revision for event in batch.events} == {batch.revision}


async def test_long_history_is_caught_up_over_a_reset(server, open_etcd):
    """A catch-up of 2,501 revisions that is cut in the middle loses none of them."""
    async with open_proxy(server.endpoint) as proxy, open_etcd(proxy.endpoint) as backend:
        first = await backend.put(b"w/0", b"v")

        async def fill(numbers):
            for number in numbers:
                await backend.put(b"w/%d" % number, b"v")

        async with trio.open_nursery() as nursery:
            for lane in range(50):
                nursery.start_soon(fill, range(lane, 2500, 50))
        async with backend.watch(PREFIX, start_revision=first) as watch:
            head = (await watch.receive()).revision
            proxy.reset()
            revisions, _ = await collect(watch, first + 2500)

    assert revisions == list(range(head + 1, first + 2501))


async def test_compaction_while_disconnected_is_told_once(server, open_etcd):
    """History that went while the watch was away is CompactedError, and the watch is over."""
    async with (
        open_proxy(server.endpoint) as proxy,
        open_etcd(proxy.endpoint) as backend,
        open_etcd(server.endpoint) as other,
        backend.watch(PREFIX) as watch,
    ):
        proxy.refuse()
        for _ in range(3):
            last = await other.put(b"w/a", b"v")
        await other.compact(last)
        proxy.heal()
        with trio.fail_after(10):
            assert (await watch.receive()).created
            with pytest.raises(CompactedError) as caught:
                await watch.receive()
        assert caught.value.compact_revision == last


async def test_slow_consumer_stalls_nobody_and_loses_nothing(server, monkeypatch, open_etcd):
    """A watch that nobody reads holds up no other on its stream, and has every revision when it is read."""
    monkeypatch.setattr(watch_buffer, "MAX_EVENTS", 20)
    async with (
        open_etcd(server.endpoint) as backend,
        backend.watch(PREFIX) as slow,
        backend.watch(PREFIX) as quick,
    ):
        first = slow.created_revision + 1
        for number in range(200):
            last = await backend.put(b"w/%d" % number, b"v")
            assert (await quick.receive()).revision == last
        assert len(slow._batches) <= 20
        revisions, _ = await collect(slow, last)

    assert revisions == list(range(first, last + 1))


async def test_five_hundred_watches_come_and_go(server, open_etcd):
    """Many watches share one stream; each sees its own key only."""
    async with open_etcd(server.endpoint) as backend:

        async def wait_for(number):
            async with backend.watch(KeyRange.one(b"w/%d" % number), coordination=True) as watch:
                started.append(number)
                batch = await watch.receive()
                assert [event.key for event in batch.events] == [b"w/%d" % number]

        started = []
        async with trio.open_nursery() as nursery:
            for number in range(500):
                nursery.start_soon(wait_for, number)
            with trio.fail_after(20):
                while len(started) < 500:
                    await trio.sleep(0.01)
                for number in range(500):
                    await backend.put(b"w/%d" % number, b"v")


async def test_wiped_store_is_told(open_etcd):
    """A server that comes back without its data ends the watch with StoreResetError."""
    async with EtcdServer(extra_args=QUICK) as before, EtcdServer(extra_args=QUICK) as after:
        async with open_proxy(before.endpoint) as proxy, open_etcd(proxy.endpoint) as backend:
            for _ in range(5):
                await backend.put(b"w/a", b"v")
            async with backend.watch(PREFIX) as watch:
                proxy.upstream = after.endpoint
                proxy.reset()
                with trio.fail_after(10):
                    assert (await watch.receive()).created
                    with pytest.raises(StoreResetError):
                        await watch.receive()


# ── members that are silent ─────────────────────────────────────────────────────────────────────


@pytest.mark.slow
async def test_stopped_member_is_noticed_by_pings(server, open_etcd):
    """An idle watch on a member that was stopped under it is made anew elsewhere within 15 seconds."""
    async with EtcdCluster(3, election_timeout=0.5) as cluster:
        members = cluster.members
        endpoints = [member.endpoint for member in members]
        async with open_etcd(endpoints, dial_timeout=1.0) as backend, backend.watch(PREFIX) as watch:
            members[0].pause()
            began = trio.current_time()
            with trio.fail_after(20):
                assert (await watch.receive()).created
            assert trio.current_time() - began < 15.5
            last = await put(backend, b"w/a")
            assert (await watch.receive()).revision == last


@pytest.mark.slow
async def test_member_without_quorum_ends_the_stream(open_etcd):
    """A watch on a member that lost the quorum is not silent: it is made anew when there is a leader again."""
    async with EtcdCluster(3, election_timeout=0.5) as cluster:
        members = cluster.members
        async with open_etcd(members[0].endpoint, call_timeout=1.0) as backend, backend.watch(PREFIX) as watch:
            for member in members[1:]:
                member.pause()
            await trio.sleep(6)
            with pytest.raises((UnavailableError, OutcomeUnknownError)):
                await backend.put(b"w/a", b"v")
            assert await backend.get(b"w/a", serializable=True) is None
            for member in members[1:]:
                member.resume()
            with trio.fail_after(5):
                assert (await watch.receive()).created


@pytest.mark.slow
async def test_lease_outlives_a_leader_that_pauses(open_etcd):
    """Renewals that rotate over the members keep a short lease alive while the leader is stopped for 6 s."""
    async with EtcdCluster(3, election_timeout=1.0) as cluster:
        endpoints = [member.endpoint for member in cluster.members]
        async with open_etcd(endpoints, dial_timeout=0.5, call_timeout=0.8) as backend:
            granted = await backend.lease_grant(4)
            (await cluster.leader()).pause()
            began = last = trio.current_time()
            longest = 0.0
            while trio.current_time() - began < 6:
                try:
                    renewal = await backend.lease_keep_alive(granted.lease)
                except UnavailableError:
                    continue
                assert renewal.ttl == granted.ttl
                longest, last = max(longest, trio.current_time() - last), trio.current_time()
                await trio.sleep(0.3)
            assert longest < granted.ttl
