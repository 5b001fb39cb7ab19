"""kazoo on ZooKeeper in the race: a thread per task, all on one session."""

from __future__ import annotations

import signal
import threading
import time

from common import Race, says
from kazoo.client import KazooClient

TTL = 3


def turn_of(client, kind, name):
    """Return what takes turns, as a context manager."""
    path = f"/bench/{kind}/{name}"
    return {
        "lock": lambda: client.Lock(path),
        "semaphore": lambda: client.Semaphore(path, max_leases=1),
        "rwlock": lambda: client.WriteLock(path),
        # What its Election is made of, without its loop around a callback.
        "election": lambda: client.Election(path).lock,
    }[kind]()


def work(race, client, kind, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        with turn_of(client, kind, race.name(task)):
            race.acquired(task, asked_at)
            race.releasing()


def stand(client):
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())

    def lead():
        says("leads")
        told.wait()

    client.Election("/bench/stand").run(lead)


race = Race()
client = KazooClient(race.endpoint, timeout=TTL)
client.start()
if race.mode == "stand":
    stand(client)
else:
    kind, race.mode = race.mode, "contended"
    race.start()
    threads = [threading.Thread(target=work, args=(race, client, kind, task)) for task in range(race.tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    race.report()
client.stop()
