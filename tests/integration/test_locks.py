"""Locks on real servers, beside `etcdctl`, and between processes that are killed, frozen and cut off."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from etcd_infra import LockLostError, open_coordinator, open_etcd
from etcd_infra.abc import KeyRange, Range
from etcd_infra.testing import EtcdCluster, EtcdServer, find_etcd, open_proxy
from tests.helpers.etcds import etcdctl_beside, every_etcd

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]

LINE = KeyRange.prefix(b"ns/lock/job/")


@asynccontextmanager
async def etcdctl_lock(etcdctl, server):
    """Hold `ns/lock/job` by `etcdctl lock`; the block begins when it says that it is locked."""
    command = [etcdctl, f"--endpoints={server.endpoint}", "lock", "ns/lock/job"]
    process = await trio.lowlevel.open_process(command, stdout=-1, env={**os.environ, "ETCDCTL_API": "3"})
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            process.terminate()
            await process.wait()


async def said_its_key(process):
    """Wait for the line in which `etcdctl lock` names its key."""
    text = b""
    while b"\n" not in text:
        text += await process.stdout.receive_some()
    return text.split(b"\n")[0]


@every_etcd()
async def test_etcdctl_and_python_exclude_each_other(program):
    """`etcdctl lock` waits behind a Python holder, and a Python waiter behind `etcdctl lock`."""
    etcdctl = etcdctl_beside(program)
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        with trio.fail_after(30):
            hold = await infra.lock("job").acquire()
            async with etcdctl_lock(etcdctl, server) as process:
                while not (await infra.lock("job").inspect()).queue:
                    await trio.sleep(0.05)
                with trio.move_on_after(0.5) as waiting:
                    await said_its_key(process)
                assert waiting.cancelled_caught, "etcdctl was granted a lock that Python held"
                await hold.release()
                key = await said_its_key(process)
                assert key in LINE

                async with infra.lock("job").attempt() as refused:
                    assert refused is None
                granted = trio.Event()

                async def wait() -> None:
                    async with infra.lock("job") as mine:
                        assert mine.token > hold.token
                        granted.set()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait)
                    while not (await infra.lock("job").inspect()).queue:
                        await trio.sleep(0.05)
                    await trio.sleep(0.5)
                    assert not granted.is_set(), "Python was granted a lock that etcdctl held"
                    process.terminate()
                    await granted.wait()


async def test_operators_deletion_is_noticed_within_a_second():
    """A lock key that is deleted by hand ends the hold within a second."""
    async with EtcdServer() as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        with pytest.raises(LockLostError), trio.fail_after(20):
            async with infra.lock("job") as hold:
                await trio.sleep(1)
                deleted_at = trio.current_time()
                await infra.backend.delete(KeyRange.one(hold.fence.proof[0].range.key))
                await trio.sleep_forever()
        assert trio.current_time() - deleted_at < 1


async def test_black_holed_holder_is_told_before_its_key_goes():
    """A holder behind a black hole is cancelled while its key still exists, and the next one is granted after."""
    async with EtcdServer() as server, open_proxy(server.endpoint) as proxy:
        async with open_etcd(server.endpoint) as backend, open_coordinator(backend, namespace="ns") as two:
            async with open_coordinator(proxy.endpoint, namespace="ns", ttl=5, call_timeout=1.0) as one:
                with trio.fail_after(40):
                    with pytest.raises(LockLostError):
                        async with one.lock("job") as hold:
                            proxy.black_hole()
                            try:
                                await trio.sleep_forever()
                            finally:
                                with trio.CancelScope(shield=True):
                                    assert await two.lock("job").validate(hold.fence)
                    async with two.lock("job") as next_hold:
                        assert next_hold.token > hold.token
                proxy.heal()


WORKER = """
import sys, trio
from etcd_infra import open_coordinator
from etcd_infra.abc import Put, Range, KeyRange, Txn

async def main(endpoint, rounds):
    async with open_coordinator(endpoint, namespace="ns", ttl=10) as infra:
        for _ in range(int(rounds)):
            async with infra.lock("job") as hold:
                seen = await infra.backend.get(b"ns/state/count")
                count = int(seen.value) + 1 if seen else 1
                write = Txn(hold.fence.proof, (Put(b"ns/state/count", b"%d" % count),))
                assert (await infra.backend.txn(write)).succeeded
                print(hold.token, count, flush=True)

trio.run(main, *sys.argv[1:])
"""


async def test_processes_take_turns():
    """Four processes increment a plain value 40 times each under one lock: nothing is lost, tokens grow."""
    lines: list[tuple[int, int]] = []

    async def work(endpoint) -> None:
        done = await trio.run_process([sys.executable, "-c", WORKER, endpoint, "40"], capture_stdout=True)
        lines.extend(tuple(map(int, line.split())) for line in done.stdout.splitlines())

    async with EtcdServer() as server:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(work, server.endpoint)
        async with open_etcd(server.endpoint) as backend:
            assert b"160" == (await backend.get(b"ns/state/count")).value
            assert () == (await backend.lease_list())
    lines.sort()
    assert list(range(1, 161)) == [count for _, count in lines]
    assert 160 == len({token for token, _ in lines})


@pytest.mark.slow
async def test_frozen_process_can_not_write():
    """The demo, without its show: a killed and a frozen holder are overtaken, a stale write is refused."""
    command = [sys.executable, "-m", "etcd_infra", "demo"]
    with trio.fail_after(60):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    text = done.stdout.decode()
    assert 0 == done.returncode, text + done.stderr.decode()
    assert "every invariant held" in text
    assert "1 stale write(s) refused by etcd" in text


@pytest.mark.parametrize("runs", [1, pytest.param(12, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
async def test_late_copies_through_a_paused_member_never_come_back(runs):
    """
    A join is sent through a member that is paused, and given up; the member wakes up and forwards it.

    No key appears after the caller was told that the line is left, in any run, and a refused attempt never
    takes the lock.
    """
    async with (
        EtcdCluster(3, election_timeout=0.5) as cluster,
        open_etcd(cluster.members[2].endpoint) as observer,
    ):
        for run in range(runs):
            await one_late_run(cluster.members, observer, b"job-%d" % run, refused=run % 2 == 1)


async def one_late_run(members, observer, name, *, refused) -> None:
    line = KeyRange.prefix(b"ns/lock/" + name + b"/")
    first_two = [members[0].endpoint, members[1].endpoint]
    async with open_coordinator(first_two, namespace="ns", ttl=30, call_timeout=0.5) as infra:
        lock = infra.lock(name.decode())
        foreign = await observer.put(line.key + b"somebody", b"") if refused else 0
        members[0].pause()
        try:
            with trio.move_on_after(0.3 if not refused else 20):
                if refused:
                    async with lock.attempt() as hold:
                        assert hold is None
                else:
                    # Another member may be quick enough: then it is taken, and given back.
                    await (await lock.acquire()).release()
            await trio.sleep(2.5)
            told_at = await revision(observer)
        finally:
            members[0].resume()
        if foreign:
            await observer.delete(KeyRange.one(line.key + b"somebody"))
        await trio.sleep(1.5)
        with trio.fail_after(10):
            last = await observer.put(b"end", b"")
            async with observer.watch(KeyRange.everything(), start_revision=told_at + 1) as batches:
                async for batch in batches:
                    late = [event for event in batch.events if event.key in line and not event.is_delete]
                    assert not late
                    if batch.events and batch.revision >= last:
                        break
        async with lock as hold:
            assert hold.token


async def revision(backend) -> int:
    return (await backend.range(Range(KeyRange.one(b"none"), count_only=True))).revision


async def run_cli(*arguments, **options):
    return await trio.run_process(
        [sys.executable, "-m", "etcd_infra", *arguments],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        **options,
    )


async def test_command_line_on_a_real_etcd():
    """`inspect` shows a held lock as a table and as JSON, `health` is 0 with an etcd and 1 without."""
    async with EtcdServer() as server, open_coordinator(server.endpoint, namespace="my ns") as infra:
        async with infra.lock("a/b") as hold:
            options = ("--endpoints", server.endpoint, "--namespace", "my ns")
            done = await run_cli("inspect", "locks", *options, "-o", "json")
            (lock,) = json.loads(done.stdout)
            assert ("a/b", infra.node_id, hold.token) == (lock["name"], lock["holder"], lock["token"])
            done = await run_cli("inspect", "locks", "a/b", *options, "-o", "json")
            assert lock["token"] == json.loads(done.stdout)["token"]
            done = await run_cli("inspect", *options)
            assert 0 == done.returncode
            for word in (b"locks", b"sessions", b"leases", b"health", b"a/b", server.endpoint.encode()):
                assert word in done.stdout
            done = await run_cli("health", "--endpoints", server.endpoint)
            assert 0 == done.returncode, done.stderr
            done = await run_cli(
                "inspect", "locks", env={**os.environ, "ETCD_INFRA_ENDPOINTS": server.endpoint}
            )
            assert b"locks: none" in done.stdout
    done = await run_cli("health", "--endpoints", server.endpoint, "--timeout", "1")
    assert 1 == done.returncode
    assert b"unhealthy" in done.stderr
    for wrong in (["inspect", "leases", "x"], ["inspect", "nonsense"], ["health", "--endpoints", "ftp://x"]):
        done = await run_cli(*wrong)
        assert 2 == done.returncode, wrong
        assert b"Traceback" not in done.stderr


@pytest.fixture
def heeded_sigint():
    """Let children be interrupted although a shell's background job, like a nohup, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_sigint")
async def test_dev_server_runs_until_interrupted():
    """`dev-server` says where it answers, and goes away, with its etcd, at SIGINT."""
    command = [sys.executable, "-m", "etcd_infra", "dev-server"]
    with trio.fail_after(40):
        process = await trio.lowlevel.open_process(command, stdout=-1, stderr=-1)
        text = b""
        while b"Ctrl-C" not in text:
            text += await process.stdout.receive_some()
        endpoint = text.split(b" answers at ")[1].split(b";")[0].decode()
        async with open_etcd(endpoint) as backend:
            assert await backend.put(b"k", b"v")
        process.send_signal(signal.SIGINT)
        assert 0 == await process.wait()
        done = await run_cli("health", "--endpoints", endpoint)
        assert 1 == done.returncode


async def test_examples_run_on_a_real_etcd():
    """Each example of the documentation that takes endpoints runs on a real etcd, too."""
    examples = Path(__file__).parents[2] / "docs" / "examples"
    async with EtcdServer() as server:
        environment = {**os.environ, "ETCD_INFRA_ENDPOINTS": server.endpoint}
        for name in ("one_lock.py", "nightly.py"):
            done = await trio.run_process(
                [sys.executable, examples / name], env=environment, capture_stdout=True
            )
            assert done.stdout.strip()
