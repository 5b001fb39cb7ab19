"""
Locks beside other clients of etcd, in one run on one server.

Their runs are interleaved, so that what the machine does besides hits all alike, and the result is a ratio.
Run it with ``just bench``; ``--help`` tells the rest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
from functools import partial

import trio
from racing import OURS, add_options, install, quantile, race, version

from etcd_infra import open_coordinator, open_etcd
from etcd_infra.testing import EtcdServer, RecordingBackend


def show(mode: str, tasks: int, peer: str, runs: list[dict], ours: float) -> float:
    if not runs:
        print(f"| {mode} | {tasks} | {peer} | failed | | | | | |")
        return float("nan")
    rate = statistics.median(run["rate"] for run in runs)
    samples = sorted(sample for run in runs for sample in run["samples"])
    fairness = f"{max(run['most'] / max(1, run['least']) for run in runs):.1f}"
    cpu = statistics.median(run["cpu_per_cycle"] for run in runs)
    ratio = ours / rate if ours and rate else float("nan")
    print(
        f"| {mode} | {tasks} | {peer} | {rate:.0f}/s | {quantile(samples, 0.5) * 1000:.2f} ms "
        f"| {quantile(samples, 0.99) * 1000:.2f} ms | {cpu * 1e6:.0f} µs | {fairness} "
        f"| {'' if peer == OURS else f'{ratio:.1f}×'} | {len(samples)} |"
    )
    return rate


async def run(python: str, peer: str, endpoint: str, mode: str, tasks: int, seconds: float) -> dict | None:
    """Let one peer race once."""
    call = partial(race, python, "locks", peer, endpoint, mode, tasks, seconds, seconds=seconds)
    return await trio.to_thread.run_sync(call)


async def thousand_locks(endpoint: str) -> None:
    """Count what 1,000 held locks cost while nothing happens."""
    ttl, watched = 10, 20
    async with open_etcd(endpoint) as backend:
        recording = RecordingBackend(backend)
        before = set(await backend.lease_list())
        async with open_coordinator(recording, namespace="thousand", ttl=ttl) as infra:
            async with trio.open_nursery() as nursery:
                for number in range(1000):
                    nursery.start_soon(infra.lock(f"job-{number}").acquire)
            leases = len(set(await backend.lease_list()) - before)
            await trio.sleep(2)
            watches = recording.verbs().count("watch")
            recording.calls.clear()
            await trio.sleep(watched)
            renewals = recording.verbs().count("lease_keep_alive")
    print(
        f"\n1,000 held locks: {leases} lease, {watches} watch, "
        f"{renewals} renewals in {watched} s at a TTL of {ttl} s (one per TTL/5 is {watched * 5 // ttl})"
    )


async def main(options: argparse.Namespace) -> None:
    pythons = install(options.peers, options.environments)
    counts = [int(count) for count in options.tasks.split(",")]
    async with EtcdServer() as server:
        print(f"etcd {server.version}, one member, {platform.machine()}, Python {platform.python_version()}")
        names = {peer: version(peer, python) for peer, python in pythons.items() if peer != OURS}
        names[OURS] = importlib.metadata.version("etcd-infra")
        print(", ".join(f"{peer} {number}" for peer, number in names.items()))
        print(f"{options.rounds} rounds of {options.seconds} s each, interleaved\n")
        print(
            "| mode | tasks | client | rate | median | p99 | CPU per cycle | most/least | ours is | samples |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for mode in ("cycle", "contended"):
            for tasks in counts:
                runs: dict[str, list[dict]] = {peer: [] for peer in pythons}
                for _ in range(options.rounds):
                    for peer, python in pythons.items():
                        result = await run(python, peer, server.endpoint, mode, tasks, options.seconds)
                        if result is not None:
                            runs[peer].append(result)
                ours = show(mode, tasks, OURS, runs.pop(OURS), 0.0)
                for peer, results in runs.items():
                    show(mode, tasks, peer, results, ours)
        await hand_over_goal(pythons[OURS], server.endpoint, options, counts)
        await thousand_locks(server.endpoint)


async def hand_over_goal(python: str, endpoint: str, options: argparse.Namespace, counts: list[int]) -> None:
    """Compare a hand-over with two bare puts plus one watch event, interleaved."""
    bare: list[float] = []
    ours: dict[int, list[float]] = {tasks: [] for tasks in counts if tasks > 1}
    for _ in range(options.rounds):
        result = await run(python, OURS, endpoint, "baseline", 1, options.seconds)
        if result:
            bare.append(2 * quantile(result["puts"], 0.5) + quantile(result["events"], 0.5))
        for tasks, samples in ours.items():
            result = await run(python, OURS, endpoint, "contended", tasks, options.seconds)
            if result:
                samples.append(quantile(result["samples"], 0.5))
    goal = statistics.median(bare) * 1.5
    print(f"\ntwo bare puts plus one watch event: {goal / 1.5 * 1000:.2f} ms; times 1.5: {goal * 1000:.2f} ms")
    for tasks, samples in ours.items():
        median = statistics.median(samples)
        print(
            f"hand-over, {tasks} tasks: {median * 1000:.2f} ms, {'within' if median <= goal else 'ABOVE'} the goal"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, ["aetcd", "etcetra", "tooz"])
    trio.run(main, parser.parse_args())
