"""
What users do, on an etcd in containers; and the container fixtures that ship for their own tests.

They run where `ETCD_INFRA_TEST_IMAGE` names an image: an engine that does not answer then is a failure.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack

import pytest
import trio

from etcd_infra import FencedError, StateChange, StateSnapshot, open_coordinator
from etcd_infra.testing import EtcdContainer, EtcdContainerCluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("ETCD_INFRA_TEST_IMAGE"), reason="ETCD_INFRA_TEST_IMAGE names no image"
    ),
]


@pytest.fixture(params=["http2", "grpcio", "gateway"])
def transport(request):
    """Name the road."""
    return request.param


async def test_story_on_one_container(transport):
    """Locks exclude and fence, a leader is elected, state and its watch agree, transactions commit."""
    async with EtcdContainer() as etcd, AsyncExitStack() as stack:
        one, two = [
            await stack.enter_async_context(
                open_coordinator(etcd.endpoint, namespace="story", transport=transport)
            )
            for _ in range(2)
        ]
        async with one.lock("job") as first:
            async with two.lock("job").attempt() as none:
                assert none is None
            await one.state.set("last", first.token, fence=first.fence)
        async with two.lock("job") as second:
            assert second.token > first.token
            with pytest.raises(FencedError):
                await one.state.set("last", 0, fence=first.fence)

        async with one.state.watch(prefix="") as watch:
            snapshot = await anext(watch)
            assert isinstance(snapshot, StateSnapshot)
            assert first.token == snapshot.entries["last"].value
            await two.state.set("last", 1)
            change = await anext(watch)
            assert isinstance(change, StateChange)
            assert ("last", 1) == (change.key, change.entry.value)

        async with one.election("leader").lead(b"one"):
            async with two.election("leader").observe() as leaders:
                assert b"one" == (await anext(leaders)).value

        counter = one.counter("jobs")
        async with trio.open_nursery() as nursery:
            for infra in (one, two):
                for _ in range(10):
                    nursery.start_soon(infra.counter("jobs").add, 1)
        assert 20 == await counter.get()


async def test_session_outlives_a_container_that_is_restarted(transport):
    """A lock is still held, and its fence still good, when etcd was killed and came back within the TTL."""
    async with (
        EtcdContainer() as etcd,
        open_coordinator(etcd.endpoint, ttl=20, transport=transport) as infra,
        infra.lock("job") as hold,
    ):
        await trio.to_thread.run_sync(etcd.kill)
        await trio.to_thread.run_sync(etcd.restart)
        with trio.fail_after(15):
            await infra.state.set("k", 1, fence=hold.fence)
        assert await infra.lock("job").validate(hold.fence)


async def test_story_on_three_containers_while_one_is_stopped(transport):
    """Two clients hand a lock to and fro on a cluster of which one member stands still, and one is gone later."""
    async with EtcdContainerCluster(3) as cluster, AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(open_coordinator(cluster.endpoints, ttl=10, transport=transport))
            for _ in range(2)
        ]
        tokens = []
        busy = 0

        async def take_turns(infra):
            nonlocal busy
            for _ in range(10):
                async with infra.lock("job") as hold:
                    busy += 1
                    assert 1 == busy
                    await infra.state.set("turn", hold.token, fence=hold.fence)
                    tokens.append(hold.token)
                    await trio.sleep(0.05)
                    busy -= 1

        async def do_harm():
            first, second, _ = cluster.members
            await trio.to_thread.run_sync(first.pause)
            await trio.sleep(2)
            await trio.to_thread.run_sync(first.resume)
            await trio.to_thread.run_sync(first.wait_until_healthy)
            await trio.to_thread.run_sync(second.kill)
            await trio.sleep(1)
            await trio.to_thread.run_sync(second.restart)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(do_harm)
                for infra in clients:
                    nursery.start_soon(take_turns, infra)
        assert 20 == len(tokens)
        assert sorted(set(tokens)) == tokens


def test_plain_block_needs_no_trio():
    """A test without Trio starts a container, too; it is gone after the block, and its port free."""
    with EtcdContainer(extra_args=["--max-txn-ops=5"]) as etcd:
        container = etcd.get_wrapped_container()
        assert "running" == container.status or container.reload() or "running" == container.status
    import docker.errors

    with pytest.raises(docker.errors.NotFound):
        container.reload()


def test_container_that_can_not_start_is_said():
    """A flag that etcd does not know is said at once, with the log that shows it; no container is left."""
    with pytest.raises(RuntimeError, match="no-such-flag"), EtcdContainer(extra_args=["--no-such-flag"]):
        pass


def test_fixtures_choose_containers(pytester):
    """With an image named, the fixtures for server, cluster and coordinator run in containers."""
    pytester.makepyfile(
        """
        import pytest
        from etcd_infra import open_etcd
        from etcd_infra.testing import EtcdContainer, EtcdContainerCluster

        def test_server(etcd_infra_server):
            assert isinstance(etcd_infra_server, EtcdContainer)

        @pytest.mark.trio
        async def test_cluster(etcd_infra_cluster):
            assert isinstance(etcd_infra_cluster, EtcdContainerCluster)
            async with open_etcd(etcd_infra_cluster.endpoints) as etcd:
                await etcd.put(b"k", b"v")

        @pytest.mark.trio
        async def test_coordinator(etcd_infra_coordinator):
            async with etcd_infra_coordinator.lock("job") as hold:
                assert hold.token
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning").assert_outcomes(
        passed=3
    )
