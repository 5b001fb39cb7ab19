"""
etcd-infra's own roads in the race of transports: the bare backend, without sessions or slots.

A mode is a road and what is done: "http2 put", "gateway watch". A watch counts events; its `tasks` are watchers, each of
a key of its own, or of all keys if there is one. Who writes is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import trio
from common import Race

from etcd_infra import open_etcd
from etcd_infra.abc import KeyRange


async def work(race, operate, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        await operate()
        race.done(task, asked_at)


async def calls(race, etcd, what):
    async with trio.open_nursery() as nursery:
        keys = [f"bench/{race.run_id}/{task}".encode() for task in range(race.tasks)]
        for key in keys:
            await etcd.put(key, b"x" * 100)
        race.start()
        for task, key in enumerate(keys):
            operate = (lambda k=key: etcd.get(k)) if what == "get" else (lambda k=key: etcd.put(k, b"y" * 100))
            nursery.start_soon(work, race, operate, task)


async def watcher(race, etcd, task, task_status):
    prefix = f"bench/{race.run_id}/".encode()
    watched = KeyRange.prefix(prefix) if race.tasks == 1 else KeyRange.one(prefix + str(task).encode())
    async with etcd.watch(watched) as stream:
        task_status.started()
        async for batch in stream:
            race.counts[task] += len(batch.events)


async def watches(race, etcd):
    async with trio.open_nursery() as nursery:
        for task in range(race.tasks):
            await nursery.start(lambda task=task, *, task_status: watcher(race, etcd, task, task_status))
        command = [sys.executable, "-W", "ignore", __file__.replace("with_etcd_infra", "writer")]
        arguments = [race.endpoint, race.run_id, str(max(1000, race.tasks)), str(race.seconds + 1)]
        with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE) as writer:  # noqa: ASYNC220 - a moment before the race
            await trio.to_thread.run_sync(writer.stdout.readline)
            race.start()
            await trio.sleep(race.seconds)
            race.report()
            writer.kill()
        nursery.cancel_scope.cancel()


async def main():
    race = Race()
    road, what = race.mode.split()
    async with open_etcd(race.endpoint, transport=road, call_timeout=30) as etcd:
        if what == "watch":
            await watches(race, etcd)
        else:
            await calls(race, etcd, what)
            race.report()


if __name__ == "__main__":
    os.environ.pop("ETCD_INFRA_TRANSPORT", None)
    trio.run(main)
