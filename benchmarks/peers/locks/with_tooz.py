"""tooz over etcd3gw in the race: a thread per task, polling."""

from __future__ import annotations

import threading
import time

from common import Race
from tooz import coordination


def work(race, coordinator, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        lock = coordinator.get_lock(race.name(task).encode())
        if not lock.acquire(blocking=max(0.1, race._ends - time.perf_counter())):
            return
        race.acquired(task, asked_at)
        race.releasing()
        lock.release()
        race.released(asked_at)


def attempt(*arguments):
    try:
        work(*arguments)
    except Exception as error:  # a give-up at the end of the time is an exception of its retry library
        if "Retry" not in type(error).__name__:
            raise


race = Race()
url = race.endpoint.replace("http://", "etcd3+http://") + "?api_version=v3"
coordinator = coordination.get_coordinator(url, b"bench")
coordinator.start()
race.start()
threads = [threading.Thread(target=attempt, args=(race, coordinator, task)) for task in range(race.tasks)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
race.report()
coordinator.stop()
