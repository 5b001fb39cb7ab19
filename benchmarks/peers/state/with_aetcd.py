"""aetcd in the race for state: get, put, and for adds a loop that compares the revision."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

import aetcd
from common import Race


async def operation(race, client, task):
    if race.mode == "add":
        return Adder(client, f"bench/{race.run_id}".encode()).add
    key = f"bench/{race.run_id}/{task}".encode()
    await client.put(key, b"x" * 100)
    if race.mode == "get":
        return lambda: client.get(key)
    return lambda: client.put(key, b"y" * 100)


class Adder:
    """Writes what it knows plus one; refused, it is shown the present number in the same round trip."""

    def __init__(self, client, key):
        self.client, self.key = client, key
        self.number = self.revision = 0

    async def add(self):
        steps = self.client.transactions
        while True:
            succeeded, answers = await self.client.transaction(
                compare=[steps.mod(self.key) == self.revision],
                success=[steps.put(self.key, str(self.number + 1).encode()), steps.get(self.key)],
                failure=[steps.get(self.key)],
            )
            value, kv = answers[-1][0]
            self.number, self.revision = int(value), kv.mod_revision
            if succeeded:
                return


async def work(race, operate, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        await operate()
        race.done(task, asked_at)


async def main():
    race = Race()
    url = urlsplit(race.endpoint)
    async with aetcd.Client(host=url.hostname, port=url.port) as client:
        operations = [await operation(race, client, task) for task in range(race.tasks)]
        race.start()
        await asyncio.gather(*(work(race, operate, task) for task, operate in enumerate(operations)))
        race.report()


asyncio.run(main())
