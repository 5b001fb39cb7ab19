"""Elections on real servers: beside `etcdctl`, between processes that are killed, on clusters that break."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import asynccontextmanager

import pytest
import trio

from etcd_infra import LeadershipLostError, open_coordinator, open_etcd
from etcd_infra.abc import KeyRange, Range
from etcd_infra.testing import EtcdCluster, EtcdServer, find_etcd, open_proxy
from tests.helpers.etcds import crash_safe_etcd, etcd_programs, etcdctl_beside, every_etcd
from tests.helpers.proving.ground import Show, prove

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]

LINE = KeyRange.prefix(b"ns/election/job/")


@asynccontextmanager
async def etcdctl(program, server, *arguments):
    """Run `etcdctl` for the length of a block."""
    command = [etcdctl_beside(program), f"--endpoints={server.endpoint}", *arguments]
    process = await trio.lowlevel.open_process(command, stdout=-1, env={**os.environ, "ETCDCTL_API": "3"})
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            process.terminate()
            await process.wait()


async def said(process, text):
    """Wait until a process has printed a text; return all that it printed."""
    printed = b""
    while text not in printed:
        received = await process.stdout.receive_some()
        assert received, f"it ended after {printed!r}"
        printed += received
    return printed


@every_etcd()
async def test_etcdctl_sees_follows_and_competes(program):
    """`etcdctl elect -l` shows our proposals; `etcdctl elect` waits behind our leader, and ours behind it."""
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        election = infra.election("job")

        async def lead(task_status) -> None:
            async with election.lead(b"ours") as leadership:
                task_status.started(leadership)
                await trio.sleep_forever()

        with trio.fail_after(30):
            async with (
                etcdctl(program, server, "elect", "-l", "ns/election/job") as listener,
                trio.open_nursery() as nursery,
            ):
                leadership = await nursery.start(lead)
                await said(listener, b"ours")
                await leadership.proclaim(b"ours, later")
                await said(listener, b"ours, later")
                async with etcdctl(program, server, "elect", "ns/election/job", "theirs") as rival:
                    while (await infra.backend.range(Range(LINE, count_only=True))).count < 2:
                        await trio.sleep(0.05)
                    state = await election.status()
                    assert (infra.node_id, leadership.term) == (state.leader_id, state.term)
                    await election.step_down()
                    await said(rival, b"theirs")
                    await said(listener, b"theirs")


@every_etcd()
async def test_ours_waits_behind_etcdctl(program):
    """A foreign leader is reported by its lease, its proposal is seen, and its end elects ours."""
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        election = infra.election("job")
        with trio.fail_after(30):
            async with etcdctl(program, server, "elect", "ns/election/job", "theirs") as rival:
                await said(rival, b"theirs")
                async with election.observe() as leaders:
                    foreign = await anext(leaders)
                    assert b"theirs" == foreign.value
                    assert foreign.leader_id == (await election.status()).leader_id
                    led = trio.Event()

                    async def campaign() -> None:
                        async with election.lead(b"ours") as leadership:
                            assert leadership.term > foreign.term
                            led.set()

                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(campaign)
                        await trio.sleep(0.5)
                        assert not led.is_set()
                        rival.send_signal(signal.SIGINT)
                        await led.wait()


CANDIDATE = """
import sys, trio
from etcd_infra import open_coordinator

async def main(endpoints, ttl):
    async with open_coordinator(endpoints, namespace="ns", ttl=int(ttl)) as infra:
        async with infra.election("job").lead() as leadership:
            print(leadership.term, flush=True)
            await trio.sleep_forever()

trio.run(main, *sys.argv[1:])
"""


async def killed_leader(endpoints, ttl):
    """Start a process that leads, kill it, and return when."""
    command = [sys.executable, "-c", CANDIDATE, endpoints, str(ttl)]
    process = await trio.lowlevel.open_process(command, stdout=-1)
    try:
        assert await process.stdout.receive_some()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
    return trio.current_time()


@pytest.mark.parametrize(
    ("kills", "with_leader_change"),
    [
        (3, False),
        pytest.param(15, False, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
        pytest.param(6, True, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
    ids=["thrice", "many", "while the raft leader changes"],
)
async def test_hand_over_after_a_kill(kills, with_leader_change):
    """
    A leader is killed with SIGKILL: the next one leads within TTL + 1.5 s; 2 TTL + 3 s if raft's leader changes.

    On a cluster of three.
    """
    ttl = 3
    took = []
    async with EtcdCluster(3) as cluster:
        endpoints = ",".join(member.endpoint for member in cluster.members)
        async with open_coordinator(endpoints, namespace="ns", ttl=ttl) as infra:
            for _ in range(kills):
                killed_at = await killed_leader(endpoints, ttl)
                if with_leader_change:
                    await trio.sleep(1)
                    await cluster.move_leader()
                async with infra.election("job").lead():
                    took.append(trio.current_time() - killed_at)
    print(f"\nhand-over after SIGKILL, TTL {ttl} s: {sorted(round(one, 2) for one in took)}")
    assert max(took) <= (2 * ttl + 3 if with_leader_change else ttl + 1.5)


async def test_black_holed_leader_is_told_before_its_key_goes():
    """A leader behind a black hole has finished while its key still exists; the next one's term is larger."""
    async with EtcdServer() as server, open_proxy(server.endpoint) as proxy:
        async with open_etcd(server.endpoint) as backend, open_coordinator(backend, namespace="ns") as two:
            async with open_coordinator(proxy.endpoint, namespace="ns", ttl=5, call_timeout=1.0) as one:
                with trio.fail_after(40):
                    with pytest.raises(LeadershipLostError):
                        async with one.election("job").lead() as leadership:
                            proxy.black_hole()
                            try:
                                await trio.sleep_forever()
                            finally:
                                with trio.CancelScope(shield=True):
                                    assert (await backend.range(Range(LINE, count_only=True))).count
                    async with two.election("job").lead() as next_one:
                        assert next_one.term > leadership.term
                proxy.heal()


@pytest.mark.parametrize(
    ("broken_seconds", "rounds"),
    [(8, 20), pytest.param(30, 50, marks=[pytest.mark.slow, pytest.mark.timeout(300)])],
    ids=["for a moment", "for half a minute"],
)
async def test_processes_campaign_while_everything_breaks(tmp_path, broken_seconds, rounds):
    """
    Processes lead in turns, killed, frozen and cut off, on a cluster that is being broken.

    Held against etcd's own history: one leader at a time whose fence is accepted, terms grow, no stale write is
    accepted, no place comes back, everybody gets through, and nothing is left.
    """
    program = crash_safe_etcd() or etcd_programs()[0]
    safe = crash_safe_etcd() is not None
    show = Show(
        processes=4,
        rounds=rounds,
        locks=2,
        broken_seconds=broken_seconds,
        kills_members=safe,
        pace=0.4,
        ttl=2,
        patience=60,
        of="election",
    )
    with trio.fail_after(broken_seconds + 120):
        outcome = await prove(program, tmp_path, show)
    print(f"\n{program}: {outcome}")
    assert [] == outcome.wrong[:20], f"the logs are in {tmp_path}"
    assert 4 * rounds <= outcome.granted
    assert 5 <= outcome.under_fault["any"]
