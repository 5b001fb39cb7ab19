"""What every peer's script does: take arguments, run tasks for a while, print one JSON line."""

from __future__ import annotations

import json
import sys
import time


def says(what: str) -> None:
    """Tell whoever started this script, at once."""
    print(what, flush=True)


class Race:
    """
    Counts and times what tasks do until the time is over.

    Locks, `mode` "cycle": every task takes and releases a lock of its own; a sample is one cycle. `mode`
    "contended": all take turns on one lock; a sample is the time from asking to release until the next
    holder has it.

    State: a sample is one operation, from call to answer. With a fifth argument, a Unix time, the race begins
    then: so several processes begin at once.
    """

    def __init__(self) -> None:
        self.endpoint, self.mode, tasks, seconds, *begins_at = sys.argv[1:]
        self.tasks = int(tasks)
        self._begins_at = float(begins_at[0]) if begins_at else 0.0
        self.run_id = begins_at[0] if begins_at else f"{time.time_ns():x}"
        self.seconds = float(seconds)
        self.counts = [0] * self.tasks
        self.samples: list[float] = []
        self._released_at: float | None = None
        self._began = self._cpu = self._ends = 0.0

    def name(self, task: int) -> str:
        return f"bench-{self.run_id}-{task if self.mode == 'cycle' else 'shared'}"

    def start(self) -> None:
        time.sleep(max(0.0, self._begins_at - time.time()))
        self._began, self._cpu = time.perf_counter(), time.process_time()
        self._ends = self._began + self.seconds

    def goes_on(self) -> bool:
        return time.perf_counter() < self._ends

    def acquired(self, task: int, asked_at: float) -> None:
        now = time.perf_counter()
        self.counts[task] += 1
        if self.mode == "contended" and self._released_at is not None:
            self.samples.append(now - self._released_at)
        self._asked_at = asked_at

    def releasing(self) -> None:
        self._released_at = time.perf_counter()

    def released(self, asked_at: float) -> None:
        if self.mode == "cycle":
            self.samples.append(time.perf_counter() - asked_at)

    def done(self, task: int, asked_at: float) -> None:
        self.counts[task] += 1
        self.samples.append(time.perf_counter() - asked_at)

    def report(self, **more: object) -> None:
        seconds = time.perf_counter() - self._began
        done = sum(self.counts)
        print(
            json.dumps(
                {
                    "rate": done / seconds,
                    "count": done,
                    "samples": sorted(self.samples),
                    "cpu_per_cycle": (time.process_time() - self._cpu) / max(1, done),
                    "least": min(self.counts),
                    "most": max(self.counts),
                    **more,
                }
            )
        )
