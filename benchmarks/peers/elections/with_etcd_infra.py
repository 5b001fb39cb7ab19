"""etcd-infra in the race: every kind of turn that it has, and a leader that stands until it is told to go."""

from __future__ import annotations

import signal
import time

import trio
from common import Race, says

from etcd_infra import open_coordinator

TTL = 3


def turn_of(infra, kind, name):
    """Return what takes turns: entered, it is one's turn."""
    return {
        "lock": lambda: infra.lock(name),
        "semaphore": lambda: infra.semaphore(name, 1),
        "rwlock": lambda: infra.rwlock(name).write,
        "multi-lock": lambda: infra.multi_lock(name, f"{name}-too"),
        "election": lambda: infra.election(name).lead(b""),
    }[kind]()


async def work(race, infra, kind, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        async with turn_of(infra, kind, race.name(task)):
            race.acquired(task, asked_at)
            race.releasing()


async def stand(infra, name):
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with infra.election(name).lead(b""):
            says("leads")
            await anext(signals)


async def main():
    race = Race()
    async with open_coordinator(race.endpoint, namespace="bench", ttl=TTL) as infra:
        if race.mode == "stand":
            await stand(infra, "stand")
            return
        kind, race.mode = race.mode, "contended"
        race.start()
        async with trio.open_nursery() as nursery:
            for task in range(race.tasks):
                nursery.start_soon(work, race, infra, kind, task)
    race.report()


trio.run(main)
