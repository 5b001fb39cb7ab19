"""Thousands of acquisitions, watches and sessions: whatever they took is given back."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from etcd_infra import open_coordinator, open_etcd
from etcd_infra.abc import KeyRange, Range
from etcd_infra.testing import EtcdServer, MemoryEtcd, find_etcd
from etcd_infra.testing.plain_http import read_metrics
from tests.helpers.etcds import etcd_programs

few_or_many = pytest.mark.parametrize(
    "times", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
FILES = Path("/proc/self/fd")
PAGES = Path("/proc/self/statm")
EVERYTHING = Range(KeyRange.everything(), keys_only=True)


@dataclass(frozen=True)
class Footprint:
    """What is open, here and in the server."""

    threads: int
    files: int
    tasks: int
    leases: tuple
    keys: int
    watchers: float
    streams: float


async def footprint(backend, server=None):
    """Look what is open."""
    metrics = await read_metrics(server.endpoint) if server else {}
    return Footprint(
        threading.active_count(),
        open_files(),
        trio.lowlevel.current_statistics().tasks_living,
        await backend.lease_list(),
        len((await backend.range(EVERYTHING)).kvs),
        metrics.get("etcd_debugging_mvcc_watcher_total", 0),
        metrics.get("etcd_debugging_mvcc_watch_stream_total", 0),
    )


async def locks(backend, times):
    """Acquire and release, every tenth time with a lease of its own, every seventh as an attempt."""
    async with open_coordinator(backend, namespace="ns") as infra:
        for number in range(times):
            lock = infra.lock("job", ttl=5 if number % 10 == 0 else None)
            if number % 7 == 0:
                async with lock.attempt() as hold:
                    assert hold is not None
            else:
                async with lock:
                    pass


async def watches(backend, times):
    """Open and close watches; every tenth one sees an event."""
    for number in range(times):
        async with backend.watch(KeyRange.one(b"ns/w")) as batches:
            if number % 10 == 0:
                await backend.put(b"ns/w", b"")
                assert (await batches.receive()).events


async def sessions(backend, times):
    """Open and close sessions; every tenth one takes a lock that somebody waits for."""
    for number in range(times):
        async with open_coordinator(backend, namespace="ns") as infra:
            if number % 10 == 0:
                async with trio.open_nursery() as nursery:

                    async def wait(infra=infra):
                        async with infra.lock("job"):
                            pass

                    async with infra.lock("job"):
                        nursery.start_soon(wait)
                        await trio.sleep(0.001)


async def is_back(before, look):
    """Wait until everything is back where it was; a server takes a moment to count."""
    after = None
    with trio.move_on_after(5):
        while (after := await look()) != before:
            gc.collect()
            await trio.sleep(0.1)
    return after


work = pytest.mark.parametrize("work", [locks, watches, sessions], ids=lambda work: work.__name__)


@pytest.mark.real
@pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")
@few_or_many
@work
async def test_real_etcd_is_left_as_it_was(work, times):
    """Threads, files and tasks here, leases, keys, watchers and streams there: as before, however often."""
    # A history of 60,000 revisions would make etcd write snapshots in the middle.
    async with EtcdServer(etcd_programs()[0], extra_args=["--snapshot-count=1000000"]) as server:
        async with open_etcd(server.endpoint) as backend:
            # What stays by design: connections, imports, the epoch, the key that watches look at.
            await work(backend, 11)
            before = await footprint(backend, server)
            resident = resident_bytes()
            began = trio.current_time()
            await work(backend, times)
            seconds = trio.current_time() - began
            assert before == await is_back(before, lambda: footprint(backend, server))
    grown = resident_bytes() - resident
    print(f"\n{times} {work.__name__} in {seconds:.1f} s; resident {resident / 2**20:.1f} MiB before,", end=" ")
    print(f"{grown / 2**20:+.1f} MiB after; {before}")
    assert grown <= 0.05 * resident


@few_or_many
@work
async def test_memory_etcd_is_left_as_it_was(work, times, autojump_clock):
    """The same in memory, where the tasks of the store count, too, and the objects that are left."""
    etcd = MemoryEtcd(auto_compact_revisions=100)
    await work(etcd, 211)
    gc.collect()
    before, objects = await footprint(etcd), len(gc.get_objects())
    await work(etcd, times)
    gc.collect()
    assert before == await footprint(etcd)
    # Not one object more for each turn, nor for every tenth.
    assert len(gc.get_objects()) - objects < times / 10 + 500


def open_files():
    """Count the files of this process; 0 where that can not be told."""
    return sum(1 for _ in FILES.iterdir()) if FILES.is_dir() else 0


def resident_bytes():
    """Read how much memory this process has; 0 where that can not be told."""
    return int(PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if PAGES.exists() else 0
