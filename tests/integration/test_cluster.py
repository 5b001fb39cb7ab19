"""The launcher of a real cluster, and the proxies between it and its clients."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from etcd_infra import (
    CompactedError,
    EtcdError,
    OutcomeUnknownError,
    StorageFullError,
    UnavailableError,
    open_etcd,
)
from etcd_infra.abc import KeyRange
from etcd_infra.testing import EtcdCluster, EtcdServer, find_etcd, open_proxy
from tests.integration.test_server import is_alive

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]


async def until_it_works(call):
    """Repeat a call until etcd answers."""
    with trio.fail_after(20):
        while True:
            try:
                return await call()
            except EtcdError:
                await trio.sleep(0.05)


async def test_cluster_has_one_leader_that_can_be_moved():
    """Every member agrees on the leader; after a move it is the one that was chosen."""
    async with EtcdCluster(3) as cluster:
        leader = await cluster.leader()
        others = [member for member in cluster.members if member is not leader]
        for chosen in (others[1], None, leader):
            moved_to = await cluster.move_leader(chosen)
            assert chosen in {None, moved_to}
            assert moved_to is await cluster.leader()
            ids = set()
            for member in cluster.members:
                async with open_etcd(member.endpoint) as backend:
                    ids.add((await backend.status()).leader)
            assert 1 == len(ids)


async def test_paused_leader_is_replaced_and_comes_back():
    """While the leader is paused another member leads, and what is written then is there afterwards."""
    async with EtcdCluster(3) as cluster, open_etcd(cluster.endpoints, call_timeout=1.0) as backend:
        leader = await cluster.leader()
        leader.pause()
        with trio.fail_after(10):
            assert leader is not await cluster.leader()
        await until_it_works(lambda: backend.put(b"k", b"v"))
        leader.resume()
        async with open_etcd(leader.endpoint) as alone:
            found = await until_it_works(lambda: alone.get(b"k"))
            assert b"v" == found.value


async def test_killed_member_comes_back_with_its_data():
    """A member that was killed and started again serves what was written before and meanwhile."""
    async with EtcdCluster(3) as cluster, open_etcd(cluster.endpoints) as backend:
        await backend.put(b"before", b"1")
        victim = cluster.members[0]
        await victim.kill()
        await until_it_works(lambda: backend.put(b"meanwhile", b"2"))
        await victim.restart()
        async with open_etcd(victim.endpoint) as alone:
            for key, value in ((b"before", b"1"), (b"meanwhile", b"2")):
                found = await until_it_works(lambda key=key: alone.get(key))
                assert value == found.value


async def test_partitioned_member_is_silent_to_clients_only():
    """Behind a partition a member answers nobody, still belongs to the cluster, and answers after `heal`."""
    async with EtcdCluster(3) as cluster, open_etcd(cluster.endpoints[0], call_timeout=0.5) as backend:
        await backend.put(b"k", b"1")
        cluster.partition(cluster.members[0])
        with pytest.raises((OutcomeUnknownError, UnavailableError)):
            await backend.put(b"k", b"2")
        async with open_etcd(cluster.members[0].endpoint) as direct:
            await direct.put(b"k", b"3")
        cluster.heal()
        assert await until_it_works(lambda: backend.get(b"k"))


async def test_road_is_cut_by_itself():
    """A client on a road of its own is cut off while the others go on."""
    async with EtcdCluster(1) as cluster, cluster.open_road() as (proxy,):
        async with open_etcd(proxy.endpoint, call_timeout=0.5) as one, open_etcd(cluster.endpoints) as two:
            await one.get(b"k")
            proxy.black_hole()
            with pytest.raises(UnavailableError):
                await one.get(b"k")
            await two.put(b"k", b"v")
            proxy.heal()
            assert await until_it_works(lambda: one.get(b"k"))


async def test_compaction_takes_the_history():
    """After `compact` a read before that revision is refused."""
    async with EtcdCluster(1) as cluster, open_etcd(cluster.endpoints) as backend:
        first = await backend.put(b"k", b"1")
        last = await backend.put(b"k", b"2")
        assert last == await cluster.compact()
        with pytest.raises(CompactedError):
            await backend.get(b"k", revision=first)
        with pytest.raises(RuntimeError, match="compacted"):
            await cluster.compact(first)


async def test_small_quota_is_soon_used_up():
    """With a quota of 256 KiB putting 64 KiB again and again is refused soon, and deleting still works."""
    async with EtcdCluster(1, quota_bytes=256 * 1024) as cluster, open_etcd(cluster.endpoints) as backend:
        with pytest.raises(StorageFullError):
            for number in range(20):
                await backend.put(b"%d" % number, bytes(64 * 1024))
                # etcd: compares with the size at its last commit to the disk, every tenth of a second.
                await trio.sleep(0.11)
        await backend.delete(KeyRange.everything())


async def test_short_and_etcds_own_election_timeout_decide_the_shortest_ttl():
    """The shortest TTL is one second in a quick cluster, and two at etcd's own timing."""
    for election_timeout, ttl in ((0.3, 1), (1.0, 2)):
        async with EtcdCluster(1, election_timeout=election_timeout) as cluster:
            async with open_etcd(cluster.endpoints) as backend:
                assert ttl == (await backend.lease_grant(1)).ttl


@pytest.mark.parametrize("kept", [False, True])
async def test_nothing_is_left_when_the_block_is_cancelled(tmp_path, kept):
    """A cancelled block leaves no process, paused or not, no directory and no listener; logs stay if asked."""
    with trio.CancelScope() as scope:
        async with EtcdCluster(3, log_directory=tmp_path if kept else None) as cluster:
            cluster.members[1].pause()
            scope.cancel()
            await trio.sleep_forever()

    assert scope.cancelled_caught
    assert [False] * 3 == [is_alive(member.pid) for member in cluster.members]
    assert [False] * 3 == [member._directory.exists() for member in cluster.members]
    for proxy in cluster.proxies:
        with pytest.raises(OSError):
            await trio.open_tcp_stream("127.0.0.1", int(proxy.endpoint.rsplit(":", 1)[1]))
    assert (["m0.log", "m1.log", "m2.log"] if kept else []) == sorted(path.name for path in tmp_path.iterdir())


async def test_start_that_is_cancelled_leaves_nothing():
    """Cancelling while members start ends those that run already."""
    cluster = EtcdCluster(3)
    with trio.move_on_after(0.15) as scope:
        async with cluster:
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert [False] * 3 == [is_alive(member.pid) for member in cluster.members]


async def test_member_that_does_not_start_is_reported_bare(tmp_path, monkeypatch):
    """The failure of one member is raised as it is, and the directory that one is in is not touched."""
    monkeypatch.chdir(tmp_path)
    precious = tmp_path / "precious"
    precious.touch()
    with pytest.raises(FileNotFoundError, match="no etcd program"):
        async with EtcdCluster(3, binary="/no/such/etcd"):
            pass
    with pytest.raises(RuntimeError, match="no-such-flag"):
        async with EtcdCluster(1, extra_args=["--no-such-flag"]):
            pass
    assert precious.exists()


@pytest.mark.parametrize("wrong", [{"size": 0}, {"election_timeout": 0.01}, {"election_timeout": 51.0}])
def test_nonsense_is_refused(wrong):
    """A cluster without members, and an election timeout that etcd would refuse, are refused at the call."""
    with pytest.raises(ValueError, match=r"\d"):
        EtcdCluster(**wrong)


# ── proxies ─────────────────────────────────────────────────────────────────────────────────────


async def echo(stream):
    """Send back what comes."""
    async for data in stream:
        await stream.send_all(data)


async def open_echo(nursery):
    """Start a server that sends back what comes; return where it listens."""
    (listener,) = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
    return f"http://127.0.0.1:{listener.socket.getsockname()[1]}"


async def dial(proxy):
    """Connect to a proxy."""
    return await trio.open_tcp_stream("127.0.0.1", int(proxy.endpoint.rsplit(":", 1)[1]))


async def is_silent(stream):
    """Whether nothing comes for a fifth of a second."""
    with trio.move_on_after(0.2) as scope:
        await stream.receive_some()
    return scope.cancelled_caught


@pytest.mark.parametrize("verb", ["black_hole", "hold_requests", "hold_answers"])
async def test_what_is_held_back_comes_after_healing(verb):
    """A black hole in either direction keeps bytes back, and delivers them all when it heals."""
    async with trio.open_nursery() as nursery:
        async with open_proxy(await open_echo(nursery)) as proxy, await dial(proxy) as stream:
            await stream.send_all(b"a")
            assert b"a" == await stream.receive_some()
            getattr(proxy, verb)()
            await stream.send_all(b"b")
            assert await is_silent(stream)
            proxy.heal()
            assert b"b" == await stream.receive_some()
        nursery.cancel_scope.cancel()


async def test_held_requests_do_not_reach_the_server_and_held_answers_do():
    """`hold_requests` keeps the server ignorant; `hold_answers` and `swallow_answers` do not."""
    async with EtcdServer() as server, open_etcd(server.endpoint) as direct:
        for verb, key, applied in (
            ("hold_requests", b"a", False),
            ("hold_answers", b"b", True),
            ("swallow_answers", b"c", True),
        ):
            async with open_proxy(server.endpoint) as proxy:
                async with open_etcd(proxy.endpoint, call_timeout=0.5) as backend:
                    await backend.get(b"k")
                    getattr(proxy, verb)()
                    with pytest.raises(OutcomeUnknownError):
                        await backend.put(key, b"v")
            assert applied == (await direct.get(key) is not None), verb


async def test_swallowed_bytes_never_come():
    """What was swallowed is counted, and its connection is reset by `heal`; others go on."""
    async with trio.open_nursery() as nursery:
        async with open_proxy(await open_echo(nursery)) as proxy:
            async with await dial(proxy) as hurt, await dial(proxy) as other:
                proxy.swallow_answers()
                await hurt.send_all(b"abc")
                assert await is_silent(hurt)
                assert 3 == proxy.swallowed_bytes
                proxy.heal()
                with pytest.raises(trio.BrokenResourceError):
                    await hurt.receive_some()
                await other.send_all(b"d")
                assert b"d" == await other.receive_some()
        nursery.cancel_scope.cancel()


async def test_reset_and_refusal():
    """`reset` breaks what there is, `refuse` what comes as well, until `heal`."""
    async with trio.open_nursery() as nursery:
        async with open_proxy(await open_echo(nursery)) as proxy:
            async with await dial(proxy) as stream:
                await stream.send_all(b"a")
                assert b"a" == await stream.receive_some()
                proxy.reset()
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            proxy.refuse()
            async with await dial(proxy) as stream:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            proxy.heal()
            async with await dial(proxy) as stream:
                await stream.send_all(b"b")
                assert b"b" == await stream.receive_some()
            assert 3 == proxy.accepted
        nursery.cancel_scope.cancel()


async def test_delay_is_a_lower_bound_in_either_direction():
    """With a delay of a tenth of a second there and back takes two of them, and none after `heal`."""
    async with trio.open_nursery() as nursery:
        async with open_proxy(await open_echo(nursery)) as proxy, await dial(proxy) as stream:
            proxy.delay(0.1)
            for least, most in ((0.2, 1.0), (0.0, 0.15)):
                began = trio.current_time()
                await stream.send_all(b"a")
                assert b"a" == await stream.receive_some()
                assert least <= trio.current_time() - began < most
                proxy.heal()
        nursery.cancel_scope.cancel()
