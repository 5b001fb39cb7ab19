"""
etcetra in the race: etcd's own lock service, over one connection.

Without a TTL, as is its default: with one, its cancelled keep-alive task now and then never ends, and the
whole run hangs. Without one the server makes a lease per acquisition, which nobody revokes.
"""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

from common import Race
from etcetra import EtcdClient, HostPortPair
from etcetra.client import EtcdLockManager


async def work(race, channel, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        lock = EtcdLockManager(race.name(task), channel)
        await lock.__aenter__()
        race.acquired(task, asked_at)
        race.releasing()
        await lock.__aexit__(None, None, None)
        race.released(asked_at)


async def main():
    race = Race()
    url = urlsplit(race.endpoint)
    async with EtcdClient(HostPortPair(url.hostname, url.port)).connect() as communicator:
        await communicator.get("warm-up")
        race.start()
        await asyncio.gather(*(work(race, communicator.channel, task) for task in range(race.tasks)))
        race.report()


asyncio.run(main())
