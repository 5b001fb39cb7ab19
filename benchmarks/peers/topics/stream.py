"""What every script in the race of topics does: publish for a while, or listen until all publishers have ended."""

from __future__ import annotations

import json
import sys
import time

END = "end"
KEPT = 20_000


class Stream:
    """
    One process's part: its arguments, what it sends, what it got.

    A message is its time of sending in nanoseconds, filled up to `size`; the last one of each publisher says so.
    """

    def __init__(self) -> None:
        self.endpoint, self.role, self.name, publishers, tasks, seconds, size = sys.argv[1:]
        self.publishers, self.tasks, self.size = int(publishers), int(tasks), int(size)
        self._seconds, self._ends = float(seconds), 0.0
        self._ended = 0
        self._count = 0
        self._first = self._last = 0
        self._samples: list[float] = []
        self._cpu = time.process_time()
        self.sent = 0

    def start(self) -> None:
        """Begin to publish."""
        self._cpu = time.process_time()
        self._ends = time.perf_counter() + self._seconds

    def goes_on(self) -> bool:
        return time.perf_counter() < self._ends

    def message(self) -> str:
        self.sent += 1
        return f"{time.time_ns()} ".ljust(self.size, "x")

    def ready(self) -> None:
        self._cpu = time.process_time()
        print("ready", flush=True)

    def got(self, message: str | bytes) -> bool:
        """Take in a message; return whether it was the last one."""
        now = time.time_ns()
        if message[:3] in {END, END.encode()}:
            self._ended += 1
            return self._ended == self.publishers
        self._count += 1
        self._first = self._first or now
        self._last = now
        # Enough for a median and a 99th percentile, however long it takes.
        if len(self._samples) < KEPT:
            self._samples.append((now - int(message[:19])) / 1e9)
        else:
            self._samples[self._count % KEPT] = (now - int(message[:19])) / 1e9
        return False

    def report(self) -> None:
        seconds = max(self._last - self._first, 1) / 1e9
        print(
            json.dumps(
                {
                    "count": self._count,
                    "rate": self._count / seconds,
                    "first": self._first,
                    "last": self._last,
                    "samples": sorted(self._samples),
                    "cpu_per_message": (time.process_time() - self._cpu) / max(1, self._count or self.sent),
                    "sent": self.sent,
                }
            ),
            flush=True,
        )
