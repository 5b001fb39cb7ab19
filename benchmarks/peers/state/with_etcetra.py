"""etcetra in the race for state: get, put, and for adds a loop that compares the value (it tells no revisions)."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

from common import Race
from etcetra import CompareKey, EtcdClient, HostPortPair


async def operation(race, communicator, task):
    if race.mode == "add":
        await communicator.put(f"bench/{race.run_id}", "0")
        return Adder(communicator, f"bench/{race.run_id}").add
    key = f"bench/{race.run_id}/{task}"
    await communicator.put(key, "x" * 100)
    if race.mode == "get":
        return lambda: communicator.get(key)
    return lambda: communicator.put(key, "y" * 100)


class Adder:
    """Writes what it knows plus one; refused, it is shown the present number in the same round trip."""

    def __init__(self, communicator, key):
        self.communicator, self.key = communicator, key
        self.number = 0

    async def add(self):
        while True:
            unchanged = CompareKey(self.key).value == str(self.number)

            def build(success, failure):
                success.put(self.key, str(self.number + 1))
                failure.get(self.key)

            values, succeeded = await self.communicator.txn_compare([unchanged], build)
            if succeeded:
                self.number += 1
                return
            self.number = int(values[0][self.key])


async def work(race, operate, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        await operate()
        race.done(task, asked_at)


async def main():
    race = Race()
    url = urlsplit(race.endpoint)
    async with EtcdClient(HostPortPair(url.hostname, url.port)).connect() as communicator:
        operations = [await operation(race, communicator, task) for task in range(race.tasks)]
        race.start()
        await asyncio.gather(*(work(race, operate, task) for task, operate in enumerate(operations)))
        race.report()


asyncio.run(main())
