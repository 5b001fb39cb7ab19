"""`etcd-infra run` on a real etcd: a command lives as long as what it runs under, and not a moment more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from etcd_infra import open_coordinator, open_etcd
from etcd_infra._inspect import gate as gate_program
from etcd_infra.abc import KeyRange
from etcd_infra.testing import EtcdServer, find_etcd
from tests.integration.test_server import is_alive

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]

LINE = KeyRange.prefix(b"lock/job/")
STUBBORN = 'trap "" TERM; sleep 60 & echo $$ $!; wait; wait'
"""Names itself and what it started; neither heeds SIGTERM (a child inherits that it is ignored)."""
POLITE = 'trap "echo asked; exit 5" TERM; echo $$ $$; while true; do sleep 0.05; done'


@asynccontextmanager
async def running(server, *arguments):
    """Run `etcd-infra run …`, and kill it at the end if need be."""
    command = [sys.executable, "-m", "etcd_infra", "run", *arguments]
    environment = os.environ | {"ETCD_INFRA_ENDPOINTS": server.endpoint}
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    with trio.fail_after(30):
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()


async def line_of(stream):
    """Read one line."""
    text = b""
    while not text.endswith(b"\n"):
        received = await stream.receive_some(1)
        assert received, f"the stream ended after {text!r}"
        text += received
    return text.decode().strip()


async def rest_of(stream):
    """Read to the end."""
    return b"".join([chunk async for chunk in stream])


async def pids_of(process):
    """Read the two process ids that a command named first."""
    return [int(pid) for pid in (await line_of(process.stdout)).split()]


async def gone(pids):
    """Wait until none of the processes lives."""
    while any(map(is_alive, pids)):
        await trio.sleep(0.01)


async def finished(server, *arguments):
    """Run to the end; return exit code, output and errors."""
    environment = os.environ | {"ETCD_INFRA_ENDPOINTS": server.endpoint}
    done = await trio.run_process(
        [sys.executable, "-m", "etcd_infra", "run", *arguments],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env=environment,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("under", ["--lock", "--elect"])
async def test_command_runs_under_what_it_names(under):
    """It sees its own token, ends the whole with its own exit code, and nothing of it stays in line."""
    script = "echo $ETCD_INFRA_FENCING_TOKEN $ETCD_INFRA_FENCE; exit 7"
    async with EtcdServer() as server, open_coordinator(server.endpoint) as infra:
        code, output, errors = await finished(server, under, "job", "--", "sh", "-c", script)
        assert 7 == code, errors
        token, fence = output.split(maxsplit=1)
        assert f'"token":{token}' in fence
        async with infra.lock("job") as hold:
            assert hold.token > int(token)
        assert (await infra.election("job").status()).leader_id is None

        code, _, _ = await finished(server, under, "job", "--", "sh", "-c", "kill -9 $$")
        assert 128 + 9 == code


async def test_refusals_have_exit_codes_of_their_own():
    """Held and not to be waited for: 75. No such program: 127; one that can not run: 126; wrong arguments: 2."""
    async with EtcdServer() as server, open_coordinator(server.endpoint) as infra:
        async with infra.lock("job"):
            code, _, errors = await finished(server, "--lock", "job", "--no-wait", "--", "true")
            assert 75 == code
            assert "job" in errors
        assert 127 == (await finished(server, "--lock", "job", "--", "no-such-program"))[0]
        assert 126 == (await finished(server, "--lock", "job", "--", str(Path.cwd())))[0]
        assert 0 == (await finished(server, "--lock", "job", "--no-wait", "--", "true"))[0]
        for wrong in (
            ("--", "true"),
            ("--lock", "a", "--elect", "b", "--", "true"),
            ("--elect", "b", "--no-wait", "--", "true"),
            ("--lock", "a", "--grace", "-1", "--", "true"),
            ("--lock", "a", "--ttl", "0", "--", "true"),
            ("--lock", "", "--", "true"),
            ("--lock", "a"),
        ):
            code, _, errors = await finished(server, *wrong)
            assert 2 == code, wrong
            assert "Traceback" not in errors


async def test_signals_reach_the_command():
    """SIGTERM to us is SIGTERM to the command, whose own exit code is ours."""
    async with EtcdServer() as server, running(server, "--lock", "job", "--", "sh", "-c", POLITE) as process:
        await pids_of(process)
        process.terminate()
        assert "asked" == await line_of(process.stdout)
        assert 5 == await process.wait()


async def test_waiting_ends_with_a_signal():
    """SIGTERM while it waits leaves the line at once, and the command never runs."""
    async with EtcdServer() as server, open_coordinator(server.endpoint) as infra:
        async with infra.lock("job"):
            async with running(server, "--lock", "job", "--", "echo", "ran") as process:
                while not (await infra.lock("job").inspect()).queue:
                    await trio.sleep(0.02)
                process.terminate()
                assert 128 + signal.SIGTERM == await process.wait()
                assert b"" == await process.stdout.receive_some()
            assert () == (await infra.lock("job").inspect()).queue


async def test_loss_asks_the_command_to_end():
    """When the lock's key is deleted the command is told so, and the exit code is LOST, not its own."""
    async with EtcdServer() as server, open_etcd(server.endpoint) as backend:
        async with running(server, "--lock", "job", "--", "sh", "-c", POLITE) as process:
            await pids_of(process)
            await backend.delete(LINE)
            assert "asked" == await line_of(process.stdout)
            assert 76 == await process.wait()
            assert b"lost" in await rest_of(process.stderr)


async def test_loss_kills_what_does_not_listen():
    """After the grace the whole group is killed, also what the command had started."""
    arguments = ("--lock", "job", "--grace", "0.3", "--", "sh", "-c", STUBBORN)
    async with EtcdServer() as server, open_etcd(server.endpoint) as backend:
        async with running(server, *arguments) as process:
            pids = await pids_of(process)
            await backend.delete(LINE)
            assert 76 == await process.wait()
            await gone(pids)


async def test_nothing_that_the_command_started_outlives_the_lock():
    """A background process that the command leaves behind is ended before the lock is given back."""
    arguments = ("--lock", "job", "--grace", "0.3", "--", "sh", "-c", 'trap "" TERM; sleep 60 & echo $$ $!')
    async with EtcdServer() as server, running(server, *arguments) as process:
        pids = await pids_of(process)
        assert 0 == await process.wait()
        await gone(pids)


async def test_command_does_not_outlive_a_supervisor_that_is_killed():
    """Without its supervisor nobody would renew the lock or notice its loss: the command dies with it."""
    async with EtcdServer() as server, running(server, "--lock", "job", "--", "sh", "-c", STUBBORN) as process:
        pids = await pids_of(process)
        process.kill()
        with trio.fail_after(2):
            await gone(pids)


async def test_command_does_not_start_without_a_supervisor():
    """Killed after it made the process and before anybody guards it, the supervisor leaves nothing that runs."""
    reading, writing = os.pipe()
    gate = await trio.lowlevel.open_process(
        [sys.executable, "-I", gate_program.__file__, str(reading), "echo", "ran"],
        stdout=subprocess.PIPE,
        pass_fds=(reading,),
    )
    os.close(reading)
    os.close(writing)
    assert b"" == await rest_of(gate.stdout)
    assert 126 == await gate.wait()


async def test_command_does_not_outlive_the_lease_of_a_frozen_supervisor():
    """While the supervisor is stopped the command dies, by TTL and grace; resumed, it tells of the loss."""
    arguments = ("--lock", "job", "--ttl", "2", "--grace", "0.5", "--", "sh", "-c", STUBBORN)
    async with EtcdServer() as server, open_coordinator(server.endpoint) as infra:
        async with running(server, *arguments) as process:
            pids = await pids_of(process)
            process.send_signal(signal.SIGSTOP)
            with trio.fail_after(2 + 0.5 + 1):
                await gone(pids)
            async with infra.lock("job"):
                process.send_signal(signal.SIGCONT)
                assert 76 == await process.wait()


async def test_waiting_outlives_a_lost_session():
    """Whoever was frozen in line for longer than the TTL stands in line again afterwards, and runs in the end."""
    arguments = ("--lock", "job", "--ttl", "2", "--", "echo", "ran")

    async def wait_for_queue(infra, length):
        while len((await infra.lock("job").inspect()).queue) != length:
            await trio.sleep(0.02)

    async with EtcdServer() as server, open_coordinator(server.endpoint) as infra:
        hold = await infra.lock("job").acquire()
        async with running(server, *arguments) as process:
            await wait_for_queue(infra, 1)
            process.send_signal(signal.SIGSTOP)
            await wait_for_queue(infra, 0)
            process.send_signal(signal.SIGCONT)
            await wait_for_queue(infra, 1)
            await hold.release()
            assert "ran" == await line_of(process.stdout)
            assert 0 == await process.wait()


async def test_command_ends_when_its_warden_is_gone():
    """Nobody but the warden guards the command while we are frozen: without it the command does not go on."""
    async with EtcdServer() as server:
        async with running(server, "--lock", "job", "--", "sh", "-c", POLITE) as process:
            command, _ = await pids_of(process)
            (warden,) = [pid for pid in children_of(process.pid) if pid != command]
            os.kill(warden, signal.SIGKILL)
            assert "asked" == await line_of(process.stdout)
            assert 76 == await process.wait()


def children_of(pid):
    """The process ids of a process's children."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid
    ]
