"""The launcher of a real etcd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from etcd_infra import TlsConfig
from etcd_infra.testing import server as server_module
from etcd_infra.testing.server import EtcdServer, find_etcd, free_ports

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_server_is_healthy_inside_its_block_and_gone_after_it():
    """Inside the block the endpoint accepts connections; after it the process and its directory are gone."""
    async with EtcdServer() as server:
        pid, directory = server.pid, server._directory
        host, port = server.endpoint.removeprefix("http://").split(":")
        await (await trio.open_tcp_stream(host, int(port))).aclose()
        assert is_alive(pid)
        assert server.version.startswith("3.")
        assert int(port) < 32768

    assert not is_alive(pid)
    assert not directory.exists()


async def test_server_is_reaped_when_its_block_is_cancelled():
    """A cancelled block leaves no process, not even a paused one."""
    with trio.CancelScope() as scope:
        async with EtcdServer() as server:
            server.pause()
            scope.cancel()
            await trio.sleep_forever()

    assert not is_alive(server.pid)


async def test_restart_keeps_the_endpoint():
    """After a kill, `restart` brings the server back at the same endpoint as another process."""
    async with EtcdServer() as server:
        before = (server.endpoint, server.pid)
        await server.kill()
        await server.restart()
        assert before[0] == server.endpoint
        assert before[1] != server.pid


async def test_failed_start_shows_the_end_of_the_log():
    """A server that ends at once is reported with what it said."""
    with pytest.raises(RuntimeError, match="no-such-flag"):
        async with EtcdServer(extra_args=["--no-such-flag"]):
            pass


def test_ports_chosen_together_differ(monkeypatch):
    """The members of a cluster never get one port twice, not even if there are hardly more than are asked for."""
    monkeypatch.setattr(server_module, "_PORTS", range(20_100, 20_120))
    for _ in range(50):
        assert 8 == len(set(free_ports(8)))


def test_tls_needs_a_certificate():
    """A server without a certificate of its own can not serve TLS: nothing is silently plain."""
    with pytest.raises(ValueError, match="certificate"):
        EtcdServer(tls=TlsConfig())


def test_server_dies_with_its_parent():
    """The kernel kills the server when the test process is killed."""
    program = (
        "import trio\n"
        "from etcd_infra.testing.server import EtcdServer\n"
        "async def main():\n"
        "    async with EtcdServer() as server:\n"
        "        print(server.pid, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        assert is_alive(server)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    for _ in range(200):
        if not is_alive(server):
            break
        trio.run(trio.sleep, 0.01)
    assert not is_alive(server)
