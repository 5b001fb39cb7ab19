"""
State and counters beside other clients of etcd, in one run on one server.

*add*: all tasks add to one counter; the peers compare and set in a loop. *get*, *set*: every task has a key of its
own. Runs are interleaved; what counts is the ratio. Run it with ``just
bench-state``; ``--help`` tells the rest.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from functools import partial

import trio
from racing import OURS, add_options, install, quantile, race, version

from etcd_infra.testing import EtcdServer

PROCESSES = 8
# More ways of our own, for the price of what we promise.
ALSO = {
    "add": ("without slots", "bare add"),
    "set": ("without slots", "bare set"),
    "get": ("serializable, as etcetra's", "stale get"),
}


async def run(options: argparse.Namespace, runner: tuple, endpoint: str, *arguments: object) -> dict | None:
    """Let one peer race once."""
    python, peer, mode = runner
    seconds = options.seconds
    mode_and_more = (endpoint, mode, arguments[0], seconds, *arguments[1:])
    call = partial(race, python, "state", peer, *mode_and_more, seconds=seconds)
    return await trio.to_thread.run_sync(call)


async def run_together(options: argparse.Namespace, runner: tuple, endpoint: str, tasks: int) -> dict | None:
    """Let one peer race in several processes at once; report the sum, and the luckiest beside the unluckiest."""
    reports: list[dict | None] = []

    async def one(begins_at: float) -> None:
        reports.append(await run(options, runner, endpoint, tasks, begins_at))

    async with trio.open_nursery() as nursery:
        begins_at = time.time() + 5
        for _ in range(PROCESSES):
            nursery.start_soon(one, begins_at)
    done = [report for report in reports if report]
    if len(done) < PROCESSES:
        return None
    return {
        "rate": sum(report["rate"] for report in done),
        "samples": sorted(sample for report in done for sample in report["samples"]),
        "cpu_per_cycle": statistics.mean(report["cpu_per_cycle"] for report in done),
        "least": min(report["count"] for report in done),
        "most": max(report["count"] for report in done),
    }


def show(what: str, client: str, runs: list[dict], ours: float) -> float:
    """Print a row of the table; return the rate."""
    if not runs:
        print(f"| {what} | {client} | failed | | | | | |", flush=True)
        return 0.0
    rate = statistics.median(run["rate"] for run in runs)
    samples = sorted(sample for run in runs for sample in run["samples"])
    fairness = max(run["most"] / max(1, run["least"]) for run in runs)
    cpu = statistics.median(run["cpu_per_cycle"] for run in runs)
    ratio = f"{ours / rate:.1f}×" if ours else ""
    print(
        f"| {what} | {client} | {rate:.0f}/s | {quantile(samples, 0.5) * 1000:.2f} ms "
        f"| {quantile(samples, 0.99) * 1000:.2f} ms | {cpu * 1e6:.0f} µs | {fairness:.1f} | {ratio} |",
        flush=True,
    )
    return rate


async def compare(options, pythons, endpoint, mode: str, tasks: int, *, together: bool = False) -> None:
    """Let everybody race in one mode, interleaved."""
    runners = {peer: (python, peer, mode) for peer, python in pythons.items()}
    if not together:
        client, way = ALSO[mode]
        runners[client] = (pythons[OURS], OURS, way)
    runs: dict[str, list[dict]] = {client: [] for client in runners}
    for _ in range(options.rounds):
        for client, runner in runners.items():
            once = run_together if together else run
            if result := await once(options, runner, endpoint, tasks):
                runs[client].append(result)
    what = f"{mode} | {PROCESSES} × {tasks}" if together else f"{mode} | {tasks}"
    ours = show(what, OURS, runs.pop(OURS), 0.0)
    for client, results in runs.items():
        show(what, client, results, ours)


async def main(options: argparse.Namespace) -> None:
    """Run every comparison, and print one table."""
    pythons = install(options.peers, options.environments)
    async with EtcdServer() as server:
        print(f"etcd {server.version}, one member, {platform.machine()}, Python {platform.python_version()}")
        print(", ".join(f"{peer} {version(peer, python)}" for peer, python in pythons.items()))
        print(f"{options.rounds} rounds of {options.seconds} s each, interleaved\n")
        print("| mode | tasks | client | rate | median | p99 | CPU per operation | most/least | ours is |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for mode in options.modes:
            for tasks in map(int, options.tasks.split(",")):
                await compare(options, pythons, server.endpoint, mode, tasks)
            if mode == "add":
                await compare(options, pythons, server.endpoint, mode, 1, together=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, ["aetcd", "etcetra"])
    parser.add_argument("--modes", nargs="*", default=["add", "get", "set"])
    trio.run(main, parser.parse_args())
