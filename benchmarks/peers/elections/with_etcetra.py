"""
etcetra in the race: etcd's own lock service, whose owner leads.

While tasks take turns it has no TTL, as is its default: with one, its cancelled keep-alive task now and then never
ends. Who stands until it is told to go has one: otherwise its lease would outlive it by a minute.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from urllib.parse import urlsplit

from common import Race, says
from etcetra import EtcdClient, HostPortPair
from etcetra.client import EtcdLockManager

TTL = 3


async def work(race, channel, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        lock = EtcdLockManager(race.name(task), channel)
        await lock.__aenter__()
        race.acquired(task, asked_at)
        race.releasing()
        await lock.__aexit__(None, None, None)


async def stand(channel):
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    lock = EtcdLockManager("stand", channel, ttl=TTL)
    await lock.__aenter__()
    says("leads")
    await told.wait()
    # Its way out may hang, see above: the unlocking is what counts.
    leaving = asyncio.ensure_future(lock.__aexit__(None, None, None))
    await asyncio.wait([leaving], timeout=2)
    os._exit(0)


async def main():
    race = Race()
    url = urlsplit(race.endpoint)
    async with EtcdClient(HostPortPair(url.hostname, url.port)).connect() as communicator:
        await communicator.get("warm-up")
        if race.mode == "stand":
            await stand(communicator.channel)
        race.mode = "contended"
        race.start()
        await asyncio.gather(*(work(race, communicator.channel, task) for task in range(race.tasks)))
        race.report()


asyncio.run(main())
