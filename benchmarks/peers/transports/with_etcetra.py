"""etcetra in the race of transports: get and put."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

from common import Race
from etcetra import EtcdClient, HostPortPair


async def work(race, operate, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        await operate()
        race.done(task, asked_at)


async def main():
    race = Race()
    url = urlsplit(race.endpoint)
    async with EtcdClient(HostPortPair(url.hostname, url.port)).connect() as etcd:
        keys = [f"bench/{race.run_id}/{task}" for task in range(race.tasks)]
        for key in keys:
            await etcd.put(key, "x" * 100)
        race.start()
        operations = [
            (lambda k=key: etcd.get(k)) if race.mode == "get" else (lambda k=key: etcd.put(k, "y" * 100))
            for key in keys
        ]
        await asyncio.gather(*(work(race, operate, task) for task, operate in enumerate(operations)))
        race.report()


asyncio.run(main())
