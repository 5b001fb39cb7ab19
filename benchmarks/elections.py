"""
Elections and the kinds of locks beside others: how long a hand-over takes, and how many there are per second.

etcetra uses etcd's own lock service; kazoo runs on a ZooKeeper, if the distribution's is installed. Run it with
``just bench-elections``; ``--help`` tells the rest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from racing import OURS, add_options, command_of, environment, install, quantile, race, version

from etcd_infra.testing import EtcdServer

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = ("lock", "election", "semaphore", "rwlock", "multi-lock")
THEIRS = {"etcetra": ("lock",), "kazoo": ("lock", "election", "semaphore", "rwlock")}
JARS = Path("/usr/share/java")
TTL = 3


@contextmanager
def zookeeper() -> Iterator[str | None]:
    """Run a throw-away ZooKeeper on the loopback; None if there is none to run."""
    if not (JARS / "zookeeper.jar").exists():
        yield None
        return
    with tempfile.TemporaryDirectory() as data, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = Path(data) / "zoo.cfg"
        # A tick of half a second allows for sessions as short as ours.
        config.write_text(
            f"tickTime=500\ndataDir={data}\nclientPort={port}\nclientPortAddress=127.0.0.1\n"
            "admin.enableServer=false\nmaxClientCnxns=0\n"
        )
        main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        server = subprocess.Popen(
            ["java", "-cp", f"{JARS}/*", main, str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until_open(port)
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def wait_until_open(port: int) -> None:
    """Wait until somebody accepts connections."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(port)


def turns(pythons: dict[str, str], endpoints: dict[str, str], options: argparse.Namespace) -> None:
    """Race for turns: one table row for each kind and client."""
    print("| kind | client | hand-overs | median | p99 | CPU per turn | most/least | ours is |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind in KINDS:
        racing = [peer for peer in pythons if peer == OURS or kind in THEIRS[peer]]
        runs: dict[str, list[dict]] = {peer: [] for peer in racing}
        for _ in range(options.rounds):
            for peer in racing:
                arguments = (endpoints[peer], kind, options.waiters + 1, options.seconds)
                result = race(pythons[peer], "elections", peer, *arguments, seconds=options.seconds)
                if result is not None:
                    runs[peer].append(result)
        rates = {peer: statistics.median(run["rate"] for run in of) for peer, of in runs.items() if of}
        for peer, of in runs.items():
            show(kind, peer, of, rates)


def show(kind: str, peer: str, runs: list[dict], rates: dict[str, float]) -> None:
    """Print one row."""
    if not runs:
        print(f"| {kind} | {peer} | failed | | | | | |")
        return
    samples = sorted(sample for run in runs for sample in run["samples"])
    fairness = max(run["most"] / max(1, run["least"]) for run in runs)
    cpu = statistics.median(run["cpu_per_cycle"] for run in runs)
    ratio = "" if peer == OURS or OURS not in rates else f"{rates[OURS] / rates[peer]:.1f}×"
    print(
        f"| {kind} | {peer} | {rates[peer]:.0f}/s | {quantile(samples, 0.5) * 1000:.2f} ms "
        f"| {quantile(samples, 0.99) * 1000:.2f} ms | {cpu * 1e6:.0f} µs | {fairness:.1f} | {ratio} |"
    )


class Line:
    """Processes that stand for leader, one of which leads."""

    def __init__(self, python: str, peer: str, endpoint: str) -> None:
        self._command = command_of(python, "elections", peer, endpoint, "stand", 1, 1)
        self._leader = self._start()
        self._wait_leads(self._leader)
        self._next = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=environment())

    @staticmethod
    def _wait_leads(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "leads", "it never led"

    def hand_over(self, how: signal.Signals) -> float:
        """End the leader by a signal; return the seconds until the next one leads."""
        # Long enough to start and to stand in line.
        time.sleep(2)
        began = time.perf_counter()
        self._leader.send_signal(how)
        self._wait_leads(self._next)
        took = time.perf_counter() - began
        self._leader.wait(30)
        self._leader, self._next = self._next, self._start()
        return took

    def close(self) -> None:
        """End all."""
        for process in (self._leader, self._next):
            process.kill()
            process.wait()


def hand_overs(pythons: dict[str, str], endpoints: dict[str, str], options: argparse.Namespace) -> None:
    """Let leaders go and be killed: one table row for each client."""
    print("\n| client | graceful, median | most | killed, median | most |")
    print("| --- | --- | --- | --- | --- |")
    for peer, python in pythons.items():
        line = Line(python, peer, endpoints[peer])
        try:
            graceful = [line.hand_over(signal.SIGTERM) for _ in range(options.hand_overs)]
            killed = [line.hand_over(signal.SIGKILL) for _ in range(options.hand_overs)]
        finally:
            line.close()
        print(
            f"| {peer} | {statistics.median(graceful) * 1000:.1f} ms | {max(graceful) * 1000:.1f} ms "
            f"| {statistics.median(killed):.2f} s | {max(killed):.2f} s |"
        )


async def main(options: argparse.Namespace) -> None:
    pythons = install(options.peers, options.environments)
    with zookeeper() as ensemble:
        async with EtcdServer() as server:
            if ensemble is None and pythons.pop("kazoo", None):
                print("no ZooKeeper here (Debian's package is called zookeeper): kazoo does not take part")
            endpoints = {peer: ensemble if peer == "kazoo" else server.endpoint for peer in pythons}
            print(
                f"etcd {server.version}, one member, {platform.machine()}, Python {platform.python_version()}"
            )
            names = {peer: version(peer, python) for peer, python in pythons.items() if peer != OURS}
            names[OURS] = importlib.metadata.version("etcd-infra")
            print(", ".join(f"{peer} {number}" for peer, number in names.items()))
            print(f"{options.rounds} rounds of {options.seconds} s, {options.waiters} waiters; TTL {TTL} s\n")
            await trio.to_thread.run_sync(turns, pythons, endpoints, options)
            await trio.to_thread.run_sync(hand_overs, pythons, endpoints, options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, list(THEIRS))
    parser.add_argument("--waiters", type=int, default=16)
    parser.add_argument("--hand-overs", type=int, default=5)
    trio.run(main, parser.parse_args())
