"""
Topics beside a plain put and watch of other clients: messages per second and latency, in one run on one server.

Each publisher and each listener is a process of its own. What a peer does is less: nothing remembers a
place, nothing is acknowledged, a lost answer is not found out. Run it with ``just bench-topics``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import trio
from racing import OURS, add_options, command_of, environment, install, quantile, version

from etcd_infra import Publish, Retention, open_coordinator
from etcd_infra.testing import EtcdServer

SHAPES = {"1→1": (1, 16, 1), "1→10": (1, 16, 10), "10→1": (10, 4, 1)}
"""How many publishers, with how many tasks each, and how many listeners."""


def stream(
    python: str, peer: str, role: str, endpoint: str, shape: str, seconds: float, size: int
) -> dict | None:
    """Let one race once; return what the slowest listener reports, and the publishers' CPU."""
    publishers, tasks, listeners = SHAPES[shape]
    arguments = (f"topic-{time.time_ns():x}", publishers, tasks, seconds, size)

    def start(what: str) -> subprocess.Popen[str]:
        command = command_of(python, "topics", peer, endpoint, what, *arguments)
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )

    listening = [start(role) for _ in range(listeners)]
    publishing: list[subprocess.Popen[str]] = []
    try:
        for process in listening:
            await_ready(process)
        publishing = [start("publish") for _ in range(publishers)]
        sent = [json.loads(process.communicate(timeout=seconds * 10 + 60)[0]) for process in publishing]
        got = [json.loads(process.communicate(timeout=seconds * 10 + 60)[0]) for process in listening]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"  {peer} {role} {shape}: failed: {error}", file=sys.stderr)
        return None
    finally:
        for process in (*listening, *publishing):
            process.kill()
    total = sum(one["sent"] for one in sent)
    slowest = min(got, key=lambda one: one["rate"])
    missing = max(total - one["count"] for one in got)
    return slowest | {
        "missing": missing,
        "publisher_cpu": statistics.mean(one["cpu_per_message"] for one in sent),
    }


def await_ready(process: subprocess.Popen[str]) -> None:
    """Wait until a listener listens."""
    if process.stdout is None or process.stdout.readline() != "ready\n":
        raise OSError((process.communicate()[1] or "")[-300:])


async def streams(options: argparse.Namespace, pythons: dict[str, str], endpoint: str) -> None:
    """Race in all shapes and sizes."""
    racers = {"etcd-infra": (OURS, "listen"), "etcd-infra, ordered group": (OURS, "consume")}
    racers |= {f"{peer}, put and watch": (peer, "listen") for peer in pythons if peer != OURS}
    print("| shape | size | client | messages | median | p99 | CPU publishing | CPU listening | lost |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in (100, 10_000):
        for shape in SHAPES:
            runs: dict[str, list[dict]] = {
                name: [] for name, (_, role) in racers.items() if shape != "1→10" or role == "listen"
            }
            for _ in range(options.rounds):
                for name, results in runs.items():
                    peer, role = racers[name]
                    result = await trio.to_thread.run_sync(
                        stream, pythons[peer], peer, role, endpoint, shape, options.seconds, size
                    )
                    if result is not None:
                        results.append(result)
            for name, each in runs.items():
                if not each:
                    print(f"| {shape} | {size} B | {name} | failed | | | | | |")
                    continue
                samples = sorted(sample for one in each for sample in one["samples"])
                figures = {
                    key: statistics.median(one[key] for one in each)
                    for key in ("rate", "publisher_cpu", "cpu_per_message")
                }
                print(
                    f"| {shape} | {size} B | {name} | {figures['rate']:.0f}/s "
                    f"| {quantile(samples, 0.5) * 1000:.1f} ms | {quantile(samples, 0.99) * 1000:.1f} ms "
                    f"| {figures['publisher_cpu'] * 1e6:.0f} µs | {figures['cpu_per_message'] * 1e6:.0f} µs "
                    f"| {max(one['missing'] for one in each)} |",
                    flush=True,
                )


KEPT = 20_000


async def memory(endpoint: str, count: int) -> None:
    """Publish many messages with a retention, and listen: what a process holds must not grow."""
    together = 100
    sizes: dict[int, int] = {}
    async with open_coordinator(endpoint, namespace="memory") as infra, trio.open_nursery() as nursery:
        topic = infra.topic("many", retention=Retention(count=KEPT, unacknowledged=True))
        progress, heard = trio.Event(), trio.Event()
        seen = published = 0

        async def listen() -> None:
            nonlocal seen
            async with topic.subscribe() as messages:
                progress.set()
                async for _ in messages:
                    seen += 1
                    if seen in {count // 10, count}:
                        sizes[seen] = resident()
                    if seen == count:
                        heard.set()
                        return

        nursery.start_soon(listen)
        await progress.wait()

        async def publish(share: int) -> None:
            nonlocal published
            for _ in range(share // together):
                # The retention keeps less than a publisher that runs ahead would need.
                while published - seen > KEPT // 2:  # noqa: ASYNC110 - once per hundred messages
                    await trio.sleep(0.01)
                published += together
                await infra.execute([Publish("many", b"x" * 100) for _ in range(together)])

        async with trio.open_nursery() as publishers:
            for _ in range(4):
                publishers.start_soon(publish, count // 4)
        with trio.fail_after(120):
            await heard.wait()
        (info,) = await infra.inspect("topics")
    growth = sizes[count] / sizes[count // 10] - 1
    print(
        f"\nresident memory at message {count // 10:,}: {sizes[count // 10] / 2**20:.1f} MiB, "
        f"at {count:,}: {sizes[count] / 2**20:.1f} MiB ({growth:+.1%}); {info.messages:,} messages kept"
    )


async def idle(endpoint: str, count: int) -> None:
    """Open many subscriptions that get nothing."""
    async with open_coordinator(endpoint, namespace="idle") as infra, trio.open_nursery() as nursery:
        topic = infra.topic("quiet")
        started = 0
        all_started = trio.Event()

        async def listen() -> None:
            nonlocal started
            async with topic.subscribe() as messages:
                started += 1
                if started == count:
                    all_started.set()
                async for _ in messages:
                    pass

        before = resident()
        for _ in range(count):
            nursery.start_soon(listen)
        await all_started.wait()
        cpu = time.process_time()
        await trio.sleep(5)
        cpu = time.process_time() - cpu
        print(
            f"{count:,} idle subscriptions on one topic: one watch, {(resident() - before) / count / 1024:.1f} KiB each "
            f"with the task that iterates, {cpu / 5 * 100:.1f} % of a core for all"
        )
        nursery.cancel_scope.cancel()


def resident() -> int:
    """Return what this process holds in memory, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def main(options: argparse.Namespace) -> None:
    os.environ["BENCH_PYTHON"] = sys.executable
    pythons = install(options.peers, options.environments)
    async with EtcdServer(extra_args=("--quota-backend-bytes", str(8 * 2**30))) as server:
        print(f"etcd {server.version}, one member, {platform.machine()}, Python {platform.python_version()}")
        names = {peer: version(peer, python) for peer, python in pythons.items() if peer != OURS}
        names[OURS] = importlib.metadata.version("etcd-infra")
        print(", ".join(f"{peer} {number}" for peer, number in names.items()))
        print(f"{options.rounds} rounds of {options.seconds} s each, interleaved\n")
        await streams(options, pythons, server.endpoint)
        await memory(server.endpoint, options.messages)
        await idle(server.endpoint, 1000)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, ["aetcd", "etcetra"])
    parser.add_argument("--messages", type=int, default=1_000_000, help="for the growth of memory")
    trio.run(main, parser.parse_args())
