"""
The roads to etcd beside other clients' own, in one run on one server: calls, and the delivery of watches.

Their runs are interleaved, so that what the machine does besides hits all alike, and the result is a ratio.
Run it with ``just bench-transports``; ``--help`` tells the rest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
from functools import partial

import trio
from racing import OURS, add_options, install, quantile, race, version

from etcd_infra.testing import EtcdServer

ROADS = ("http2", "grpcio", "gateway")
PURE_PYTHON = {"aetcd", "etcetra"}
# No client: what one caller costs at least.
FLOOR = "blocking-socket"


async def run(python: str, peer: str, endpoint: str, mode: str, tasks: int, seconds: float) -> dict | None:
    """Let one racer race once."""
    call = partial(race, python, "transports", peer, endpoint, mode, tasks, seconds, seconds=seconds)
    return await trio.to_thread.run_sync(call)


class Racers:
    """Our roads and the peers: a name, and what is run for it."""

    def __init__(self, pythons: dict[str, str], endpoint: str, options: argparse.Namespace) -> None:
        self._endpoint = endpoint
        self._options = options
        self._racers = {road: (pythons[OURS], OURS, f"{road} ") for road in ROADS}
        self._racers |= {peer: (python, peer, "") for peer, python in pythons.items() if peer != OURS}
        self.clients = list(self._racers)
        self._racers[FLOOR] = (pythons[OURS], FLOOR, "")

    async def race(self, what: str, tasks: int, names: list[str]) -> dict[str, list[dict]]:
        """Let them race, in turns; return each one's runs."""
        runs: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(self._options.rounds):
            for name, results in runs.items():
                python, peer, prefix = self._racers[name]
                result = await run(python, peer, self._endpoint, prefix + what, tasks, self._options.seconds)
                if result is not None:
                    results.append(result)
        return runs


def medians(runs: dict[str, list[dict]], of: str) -> dict[str, float]:
    """Return the median of a figure for each racer that finished."""
    return {name: statistics.median(run[of] for run in each) for name, each in runs.items() if each}


async def calls(racers: Racers, counts: list[int]) -> None:
    """Put and get with few and many tasks."""
    goals = []
    print("| what | tasks | road or client | rate | median | p99 | CPU per call | http2 is |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for what in ("put", "get"):
        for tasks in counts:
            names = [*racers.clients, FLOOR] if tasks == 1 else racers.clients
            runs = await racers.race(what, tasks, names)
            rates, cpu = medians(runs, "rate"), medians(runs, "cpu_per_cycle")
            for name, each in runs.items():
                if name not in rates:
                    print(f"| {what} | {tasks} | {name} | failed | | | | |")
                    continue
                samples = sorted(sample for run in each for sample in run["samples"])
                ratio = "" if name == "http2" else f"{rates['http2'] / rates[name]:.1f}×"
                print(
                    f"| {what} | {tasks} | {name} | {rates[name]:.0f}/s | {quantile(samples, 0.5) * 1000:.2f} ms "
                    f"| {quantile(samples, 0.99) * 1000:.2f} ms | {cpu[name] * 1e6:.0f} µs | {ratio} |",
                    flush=True,
                )
            goals.append((what, tasks, rates, cpu))
    print()
    for what, tasks, rates, cpu in goals:
        peers = {name: rate for name, rate in rates.items() if name not in {*ROADS, FLOOR}}
        pure = [rate for name, rate in peers.items() if name in PURE_PYTHON]
        if peers and pure:
            print(
                f"{what}, {tasks} tasks: http2 {rates['http2'] / max(peers.values()):.2f}× the best client, "
                f"{rates['http2'] / max(pure):.2f}× the best in Python alone; "
                f"{cpu['http2'] / cpu['grpcio']:.2f} of grpcio's CPU per call"
                + (f", a blocking socket {cpu[FLOOR] / cpu['grpcio']:.2f}" if FLOOR in cpu else "")
            )


async def watches(racers: Racers, peers: list[str]) -> None:
    """Deliver events to one watcher, and to a thousand."""
    print("\n| watchers | road or client | events | CPU per event |\n| --- | --- | --- | --- |")
    for watchers in (1, 1000):
        names = [*ROADS, *(["aetcd"] if watchers == 1 and "aetcd" in peers else [])]
        runs = await racers.race("watch", watchers, names)
        rates, cpu = medians(runs, "rate"), medians(runs, "cpu_per_cycle")
        for name in names:
            figures = f"{rates[name]:.0f}/s | {cpu[name] * 1e6:.0f} µs" if name in rates else "failed | "
            print(f"| {watchers} | {name} | {figures} |", flush=True)


async def main(options: argparse.Namespace) -> None:
    os.environ["BENCH_PYTHON"] = sys.executable
    pythons = install(options.peers, options.environments)
    async with EtcdServer() as server:
        print(f"etcd {server.version}, one member, {platform.machine()}, Python {platform.python_version()}")
        names = {peer: version(peer, python) for peer, python in pythons.items() if peer != OURS}
        names[OURS] = importlib.metadata.version("etcd-infra")
        print(", ".join(f"{peer} {number}" for peer, number in names.items()))
        print(f"{options.rounds} rounds of {options.seconds} s each, interleaved\n")
        racers = Racers(pythons, server.endpoint, options)
        await calls(racers, [int(count) for count in options.tasks.split(",")])
        await watches(racers, options.peers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, ["aetcd", "etcetra", "etcd-client-py"])
    trio.run(main, parser.parse_args())
