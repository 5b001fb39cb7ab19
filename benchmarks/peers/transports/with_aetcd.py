"""aetcd in the race of transports: get, put, and one watcher of a prefix."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import aetcd
from common import Race


async def work(race, operate, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        await operate()
        race.done(task, asked_at)


async def calls(race, client):
    keys = [f"bench/{race.run_id}/{task}".encode() for task in range(race.tasks)]
    for key in keys:
        await client.put(key, b"x" * 100)
    race.start()
    operations = [
        (lambda k=key: client.get(k)) if race.mode == "get" else (lambda k=key: client.put(k, b"y" * 100))
        for key in keys
    ]
    await asyncio.gather(*(work(race, operate, task) for task, operate in enumerate(operations)))


async def watch(race, client):
    watching = await client.watch_prefix(f"bench/{race.run_id}/".encode())

    async def count():
        async for _ in watching:
            race.counts[0] += 1

    counting = asyncio.create_task(count())
    command = [os.environ["BENCH_PYTHON"], "-W", "ignore", str(Path(__file__).with_name("writer.py"))]
    arguments = [race.endpoint, race.run_id, "1000", str(race.seconds + 1)]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE) as writer:  # noqa: ASYNC220 - a moment before the race
        await asyncio.to_thread(writer.stdout.readline)
        race.start()
        await asyncio.sleep(race.seconds)
        race.report()
        writer.kill()
    counting.cancel()


async def main():
    race = Race()
    url = urlsplit(race.endpoint)
    async with aetcd.Client(host=url.hostname, port=url.port) as client:
        if race.mode == "watch":
            await watch(race, client)
        else:
            await calls(race, client)
            race.report()


asyncio.run(main())
