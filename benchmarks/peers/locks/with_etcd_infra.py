"""etcd-infra in the race; mode "baseline" measures bare puts and watch events on the same backend."""

from __future__ import annotations

import time

import trio
from common import Race

from etcd_infra import open_coordinator, open_etcd
from etcd_infra.abc import KeyRange


async def work(race, infra, task):
    lock = infra.lock(race.name(task))
    while race.goes_on():
        asked_at = time.perf_counter()
        hold = await lock.acquire()
        race.acquired(task, asked_at)
        race.releasing()
        await hold.release()
        race.released(asked_at)


async def baseline(race):
    async with open_etcd(race.endpoint) as backend:
        key = KeyRange.one(b"baseline")
        puts, events = [], []
        async with backend.watch(key, coordination=True) as batches:
            race.start()
            while race.goes_on():
                sent_at = time.perf_counter()
                await backend.put(b"other", b"")
                puts.append(time.perf_counter() - sent_at)

                answered_at = []

                async def put(answered_at=answered_at):
                    await backend.put(b"baseline", b"")
                    answered_at.append(time.perf_counter())

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(put)
                    await batches.receive()
                    seen_at = time.perf_counter()
                # What the event takes beyond the put that caused it; often it comes before the answer.
                events.append(max(0.0, seen_at - answered_at[0]))
        race.report(puts=sorted(puts), events=sorted(events))


async def main():
    race = Race()
    if race.mode == "baseline":
        await baseline(race)
        return
    async with open_coordinator(race.endpoint, namespace="bench") as infra:
        async with infra.lock("warm-up"):
            pass
        race.start()
        async with trio.open_nursery() as nursery:
            for task in range(race.tasks):
                nursery.start_soon(work, race, infra, task)
    race.report()


trio.run(main)
