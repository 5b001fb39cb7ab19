"""The processes that fight for locks, and what they logged."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import trio

from etcd_infra.testing.process import ChildProcess

SCRIPT = Path(__file__).with_name("worker.py")


@dataclass
class Worker:
    """One process, its road to etcd, and the times in which it was disturbed."""

    name: str
    rounds: int
    road: tuple
    directory: Path
    options: dict
    process: ChildProcess | None = None
    stopped: bool = False
    disturbed: list[tuple[float, float]] = field(default_factory=list)

    def start(self):
        """Start the process."""
        config = self.directory / f"{self.name}.json"
        endpoints = [proxy.endpoint for proxy in self.road]
        settings = {"name": self.name, "rounds": self.rounds, "endpoints": endpoints, "log": str(self.log)}
        config.write_text(json.dumps(settings | self.options))
        self.process = ChildProcess(
            [sys.executable, str(SCRIPT), str(config)],
            log=self.directory / f"{self.name}.out",
            env=dict(os.environ),
        )

    @property
    def log(self) -> Path:
        """Where it logs its steps."""
        return self.directory / f"{self.name}.jsonl"

    def steps(self) -> list[dict]:
        """Read what it logged so far; a line that is being written is left out."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_bytes().split(b"\n")[:-1]]

    def pause(self):
        """Stop it (SIGSTOP)."""
        self.stopped = True
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        """Let it go on."""
        self.stopped = False
        self.process.send_signal(signal.SIGCONT)


class Crew:
    """All processes, the dead ones included."""

    def __init__(self, directory: Path, options: dict) -> None:
        self.everybody: dict[str, Worker] = {}
        self.alive: dict[str, Worker] = {}
        self._directory = directory
        self._options = options

    def hire(self, name, rounds, road):
        """Start a process."""
        worker = Worker(name, rounds, road, self._directory, self._options)
        self.everybody[name] = self.alive[name] = worker
        worker.start()

    async def kill(self, worker):
        """Kill a process (SIGKILL), and start another one that does the rest of its rounds."""
        await worker.process.kill()
        worker.disturbed.append((time.monotonic(), float("inf")))
        del self.alive[worker.name]
        granted = sum(step["event"] == "granted" for step in worker.steps())
        stem, _, life = worker.name.partition(".")
        # A killed process may have done all its rounds: the next one then only shows that it still can.
        self.hire(f"{stem}.{int(life) + 1}", max(1, worker.rounds - granted), worker.road)

    def granted(self) -> int:
        """Count the acquisitions so far."""
        return sum(
            worker.log.read_bytes().count(b'"granted"')
            for worker in self.everybody.values()
            if worker.log.exists()
        )

    def is_done(self, worker) -> bool:
        """Whether a process has done its rounds."""
        return worker.log.exists() and b'"done"' in worker.log.read_bytes()[-300:]

    async def wait_done(self):
        """
        Wait until everybody has done its rounds.

        Raises:
            AssertionError: a process ended by itself.
        """
        while not all(self.is_done(worker) for worker in self.alive.values()):
            for worker in self.alive.values():
                assert worker.process.returncode is None, f"{worker.name} ended:\n{worker.process.log_tail()}"
            await trio.sleep(0.1)

    def reap(self):
        """End all processes at once."""
        for worker in self.everybody.values():
            worker.process.reap()
