"""Opening a coordinator: arguments, environment, metrics, inspection."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra import Call, Inspector, SessionLostError, UnavailableError, open_coordinator
from etcd_infra._etcd.background import open_background
from etcd_infra.testing import FaultyBackend, MemoryEtcd
from tests.conftest import open_infra

VARIABLES = ("ENDPOINTS", "NAMESPACE", "USERNAME", "PASSWORD", "CACERT", "CERT", "KEY", "TRANSPORT", "NODE_ID")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Start without any of the library's variables."""
    for variable in VARIABLES:
        monkeypatch.delenv(f"ETCD_INFRA_{variable}", raising=False)
    monkeypatch.delenv("POD_NAME", raising=False)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((), {}, ValueError, "ETCD_INFRA_ENDPOINTS"),
        (("",), {}, ValueError, "ETCD_INFRA_ENDPOINTS"),
        (("ftp://host",), {}, ValueError, "ftp://host"),
        ((7,), {}, TypeError, "7"),
        (("memory://",), {"ttl": 0}, ValueError, "0"),
        (("memory://",), {"ttl": True}, TypeError, "True"),
        (("memory://",), {"ttl": 1.5}, TypeError, "1.5"),
        (("memory://",), {"namespace": "x" * 600}, ValueError, "600"),
        (("memory://",), {"namespace": 7}, TypeError, "7"),
        (("http://127.0.0.1:1",), {"transport": "carrier pigeon"}, ValueError, "carrier pigeon"),
        (("https://127.0.0.1:1,http://127.0.0.1:2",), {}, ValueError, "http://"),
        (("http://127.0.0.1:1",), {"password": "p"}, ValueError, "password"),
        (("http://127.0.0.1:1",), {"call_timeout": 0}, ValueError, "0"),
        ((MemoryEtcd(),), {"call_timeout": 1.0}, TypeError, "call_timeout"),
    ],
)
async def test_bad_input(arguments, options, error, says):
    """Each bad argument is refused on entering, before anything is sent, with the value in the text."""
    with pytest.raises(error, match=says), trio.fail_after(1):
        async with open_coordinator(*arguments, **options):
            pytest.fail("opened")


async def test_memory_url_is_a_fresh_store_each_time():
    """Two coordinators on `memory://` do not see each other."""
    async with open_coordinator("memory://") as one, open_coordinator("memory://") as two:
        async with one.lock("job"), two.lock("job"):
            assert 1 == len(await one.inspect("sessions"))


async def test_environment_names_everything(monkeypatch):
    """Endpoints, namespace and node id come from the environment; arguments win over it."""
    monkeypatch.setenv("ETCD_INFRA_ENDPOINTS", "memory://")
    monkeypatch.setenv("ETCD_INFRA_NAMESPACE", "from/env")
    monkeypatch.setenv("ETCD_INFRA_NODE_ID", "me")
    async with open_coordinator() as infra:
        assert ("from/env", "me") == (infra.namespace, infra.node_id)
    async with open_coordinator(namespace="mine", node_id="you") as infra:
        assert ("mine", "you") == (infra.namespace, infra.node_id)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TRANSPORT", "carrier-pigeon"),
        ("USERNAME", "root"),
        ("PASSWORD", "secret"),
        ("CACERT", "ca.pem"),
        ("CERT", "c"),
        ("KEY", "k"),
    ],
)
async def test_environment_is_never_silently_ignored(monkeypatch, variable, value):
    """What the environment asks for and can not be done raises; a secret is not in the text."""
    monkeypatch.setenv("ETCD_INFRA_ENDPOINTS", "http://127.0.0.1:1")
    monkeypatch.setenv(f"ETCD_INFRA_{variable}", value)
    with pytest.raises(ValueError, match=r"support|goes with|secured") as caught:
        async with open_coordinator():
            pytest.fail("opened")
    assert "secret" not in str(caught.value)


async def test_pods_name_is_the_node_id(monkeypatch, autojump_clock):
    """In Kubernetes the node id is the pod's name and a random suffix, so that restarts differ."""
    monkeypatch.setenv("POD_NAME", "web-0")
    ids = set()
    for seed in range(3):
        async with open_coordinator("memory://", random=random.Random(seed)) as infra:
            ids.add(infra.node_id)
    assert 3 == len(ids)
    assert all(node_id.startswith("web-0-") for node_id in ids)


async def test_passed_backend_stays_open(etcd, autojump_clock):
    """Leaving the coordinator leaves a backend that was passed in as it was."""
    async with open_infra(etcd):
        pass
    assert await etcd.put(b"k", b"v")


async def test_observer_sees_each_call(etcd, autojump_clock):
    """The observer is told of each call with its verb, its duration and its error."""
    calls: list[Call] = []
    faulty = FaultyBackend(etcd)
    async with open_infra(faulty, observer=calls.append) as infra:
        faulty.delay_next(0.5)
        async with infra.lock("job"):
            pass
    assert ["lease_grant", "txn", "txn", "txn", "lease_revoke"] == [call.verb for call in calls]
    assert 0.5 == pytest.approx(calls[2].duration, abs=0.01)
    assert all(call.error is None for call in calls)


async def test_refused_calls_are_tried_again(etcd, autojump_clock):
    """A call that was certainly not applied is repeated by itself, for five seconds."""
    faulty = FaultyBackend(etcd)
    async with open_infra(faulty) as infra:
        for _ in range(3):
            faulty.refuse_next()
        assert await infra.backend.put(b"k", b"v")
        for _ in range(100):
            faulty.refuse_next()
        began = trio.current_time()
        with pytest.raises(UnavailableError):
            await infra.backend.put(b"k", b"v")
        assert 3 <= trio.current_time() - began <= 5
        faulty.forget_faults()


async def test_metrics_have_the_source_documents_fields(etcd, autojump_clock):
    """Every field of the source document is there, in snake case, and writes are timed truly."""
    faulty = FaultyBackend(etcd)
    async with open_infra(faulty) as infra:
        assert {
            "node_id",
            "is_leader",
            "connected_nodes",
            "lock_acquisitions",
            "lock_releases",
            "lock_conflicts",
            "state_operations",
            "messages_sent",
            "messages_received",
            "last_sync_timestamp",
            "average_sync_latency",
        } == set(infra.metrics())
        await trio.sleep(1)
        for _ in range(9):
            faulty.delay_next(1)
            await infra.backend.put(b"k", b"v")
        metrics = infra.metrics()
        assert 0.9 == pytest.approx(metrics["average_sync_latency"], abs=0.01)
        assert trio.current_time() == pytest.approx(metrics["last_sync_timestamp"], abs=0.01)


async def test_inspector_describes_sessions_leases_and_health(etcd, autojump_clock):
    """Sessions, leases and health are read without a session of one's own."""
    async with open_infra(etcd, seed=1) as one, open_infra(etcd, seed=2), one.lock("a/b"):
        inspector = Inspector(etcd, "test")
        before = etcd.store.revision
        sessions = await inspector.inspect("sessions")
        leases = await inspector.inspect("leases")
        health = await inspector.inspect("health")
        locks = await inspector.inspect("locks")
        assert before == etcd.store.revision
    assert ["node-1", "node-2"] == [info.node_id for info in sessions]
    assert f"{one.session.lease.id:x}" == sessions[0].lease
    assert ("a/b", "node-1") == (locks[0].name, locks[0].holder)
    # Each session has its key and a writer slot; the lock stands on the first one's lease.
    assert {4, 2} == {len(lease.keys) + (lease.lease == sessions[0].lease) for lease in leases}
    assert health.healthy
    assert before == health.revision


async def test_inspector_describes_elections_and_members(etcd, autojump_clock):
    """Who leads, by which term and proposal, who waits, who is there with which metadata."""
    async with (
        open_infra(etcd.node("one"), seed=1) as one,
        open_infra(etcd.node("two"), seed=2) as two,
        trio.open_nursery() as nursery,
        two.members("web").register({"zone": "b"}),
        one.election("web").lead(b"hello\xff") as leadership,
    ):

        async def wait() -> None:
            async with two.election("web").lead():
                pass

        nursery.start_soon(wait)
        await trio.sleep(1)
        (election,) = await one.inspect("elections")
        assert (election,) == await one.inspect("elections", "web")
        assert ("web", "node-1", leadership.term) == (election.name, election.leader, election.term)
        assert ("hello\\xff", ("node-2",), ("node-1", "node-2")) == (
            election.proposal,
            election.queue,
            election.members,
        )
        assert 25 <= election.ttl <= 30
        members = await one.inspect("members", "web")
        assert members == await one.inspect("members")
        assert [("web", "node-1", "{}"), ("web", "node-2", "{}")] == [
            (member.group, member.node_id, member.meta) for member in members
        ]
        assert () == await one.inspect("members", "nobody")
        (nobody,) = await one.inspect("elections", "nobody")
        assert nobody.leader is None


@pytest.mark.parametrize(
    ("kind", "name"), [("nonsense", None), ("leases", "x"), ("health", "x"), ("Locks", None)]
)
async def test_inspecting_what_is_not_there(etcd, autojump_clock, kind, name):
    """Unknown kinds, and names where there are none, are ValueErrors."""
    with pytest.raises(ValueError, match=kind):
        await Inspector(etcd).inspect(kind, name)


async def test_unreachable_etcd_is_unhealthy(etcd, autojump_clock):
    """Health says why, and never raises for etcd's sake."""
    node = etcd.node("one")
    node.partition()
    health = await Inspector(node).health()
    assert not health.healthy
    assert health.error


async def test_foreign_keys_do_not_confuse_the_inspector(etcd, autojump_clock):
    """A place without our JSON, and a session key with rubbish in it, are shown as well as can be."""
    granted = await etcd.lease_grant(30, lease=0xABC)
    await etcd.put(b"test/lock/job/abc", b"", lease=granted.lease)
    await etcd.put(b"test/session/abc", b"{", lease=granted.lease)
    await etcd.put(b"test/lock/", b"stray")
    inspector = Inspector(etcd, "test")
    (lock,) = await inspector.locks()
    assert ("job", "lease abc", None) == (lock.name, lock.holder, lock.acquired_at)
    assert ["?"] == [info.node_id for info in await inspector.sessions()]


async def test_failed_background_task_ends_the_body_bare():
    """A failing background task cancels the body, and its exception leaves alone and unwrapped."""

    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with open_background() as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()


async def test_two_failed_background_tasks_leave_as_a_group():
    """Two failures leave together."""
    ready = trio.Event()

    async def fail() -> None:
        await ready.wait()
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        async with open_background() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(fail)
            await trio.testing.wait_all_tasks_blocked()
            ready.set()
            await trio.sleep_forever()


async def test_outer_cancellation_passes_through(autojump_clock):
    """A cancelled body ends its background, and the cancellation reaches the scope it belongs to."""
    ended = []

    async def serve() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(True)

    with trio.move_on_after(1) as scope:
        async with open_background() as nursery:
            nursery.start_soon(serve)
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert [True] == ended


async def test_session_between_two_sessions(etcd, autojump_clock):
    """While a lost session is being replaced, `session` raises or shows a lost one, and health is false."""
    async with open_infra(etcd.node("one")) as infra:
        first = infra.session
        first.lose(SessionLostError("gone"))
        assert not infra.is_healthy()
        with pytest.raises(SessionLostError):
            infra.session.check()
        with trio.fail_after(10):
            async with infra.lock("job"):
                assert infra.session is not first
