"""aetcd in the race (its locks have a lease each, and poll by watching)."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

import aetcd
from common import Race


async def work(race, client, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        lock = client.lock(race.name(task).encode(), ttl=20)
        left = race._ends - time.perf_counter()
        if not await lock.acquire(timeout=max(0.1, left)):
            return
        race.acquired(task, asked_at)
        race.releasing()
        await lock.release()
        race.released(asked_at)


async def main():
    race = Race()
    url = urlsplit(race.endpoint)
    async with aetcd.Client(host=url.hostname, port=url.port) as client:
        await client.get(b"warm-up")
        race.start()
        await asyncio.gather(*(work(race, client, task) for task in range(race.tasks)))
        race.report()


asyncio.run(main())
