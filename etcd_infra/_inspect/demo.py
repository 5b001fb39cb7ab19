"""
The demo: three processes, one lock, one etcd; one process is killed and one frozen while holding it.

What the processes say is shown live. What is checked is etcd's own history: each write of the ledger was made
by whoever was first in line at that revision.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import trio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from etcd_infra import open_etcd
from etcd_infra._inspect.demo_check import Verdict, check_history
from etcd_infra._inspect.demo_worker import TTL
from etcd_infra.testing import EtcdServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

NAMES: Final = ("ada", "bob", "cleo")
CALM_SECONDS: Final = 3.0
LIMIT_SECONDS: Final = 50.0
HAND_OVER_LIMIT_SECONDS: Final = TTL + 3.0


@dataclass
class Story:
    """What has happened so far, as the processes told it."""

    states: dict[str, str] = field(default_factory=lambda: dict.fromkeys(NAMES, "starting"))
    tokens: dict[str, int] = field(default_factory=dict)
    holds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))
    hand_overs: list[float] = field(default_factory=list)
    slow_hand_overs: list[tuple[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: int = 0
    broken: list[str] = field(default_factory=list)
    left_at: float | None = None

    def hear(self, name: str, said: dict[str, Any]) -> None:
        """Take in one line of one process."""
        event, token, at = said["event"], said.get("token"), said["at"]
        self.states[name] = event
        if token is not None:
            self.tokens[name] = token
        match event:
            case "acquired":
                self.holds[name] += 1
                if self.left_at is not None:
                    self.hand_overs.append(at - self.left_at)
            case "released":
                self.left_at = at
            case "lost":
                self.notes.append(f"{name} learnt that its lock was lost, and its work was cancelled")
            case "stale-write-refused":
                self.refused += 1
                self.notes.append(f"{name} wrote all the same, with token {token}: etcd refused it")
            case "stale-write-accepted":
                self.broken.append(f"etcd accepted a stale write of {name} with token {token}")
            case _:
                pass

    def picture(self) -> Group:
        """Draw the present state: who says what, and what happened last."""
        table = Table(title="one lock, three processes", title_justify="left")
        for title in ("process", "last said", "token", "times held"):
            table.add_column(title)
        for name in NAMES:
            table.add_row(name, self.states[name], str(self.tokens.get(name, "-")), str(self.holds[name]))
        mean = sum(self.hand_overs) / len(self.hand_overs) * 1000 if self.hand_overs else 0.0
        hand_overs = f"{len(self.hand_overs)} hand-overs, {mean:.1f} ms each on average"
        return Group(table, hand_overs, *(f"- {note}" for note in self.notes))


class Stage:
    """The processes, and a way to wait for what they say."""

    def __init__(self, story: Story, show: Callable[[], None]) -> None:
        self.story = story
        self._show = show
        self._processes: dict[str, trio.Process] = {}
        self._said: dict[str, trio.Event] = {}

    async def start(self, nursery: trio.Nursery, endpoint: str, namespace: str) -> None:
        """Start all three."""
        command = [sys.executable, "-m", "etcd_infra._inspect.demo_worker", endpoint, namespace]
        for name in NAMES:
            process = await trio.lowlevel.open_process([*command, name], stdout=-1)
            self._processes[name] = process
            nursery.start_soon(self._listen, name, process)

    async def _listen(self, name: str, process: trio.Process) -> None:
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            self.story.hear(name, json.loads(line))
            self._said.pop(self.story.states[name], trio.Event()).set()
            self._show()

    async def wait_held(self, *, not_by: str | None = None) -> str:
        """Wait until somebody says that it has just acquired the lock; return who."""
        while True:
            await self._said.setdefault("acquired", trio.Event()).wait()
            for name in NAMES:
                if self.story.states[name] == "acquired" and name != not_by:
                    return name

    async def wait_said(self, event: str) -> None:
        """Wait until somebody says `event`."""
        await self._said.setdefault(event, trio.Event()).wait()

    def send(self, name: str, what: signal.Signals, note: str) -> None:
        """Send a signal to one process, and note it."""
        self._processes[name].send_signal(what)
        self.story.states[name] = what.name
        self.story.left_at = None
        self.story.notes.append(f"{name} {note}")
        self._show()

    async def end(self) -> None:
        """Kill whoever still lives."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
        for process in self._processes.values():
            await process.wait()


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncGenerator[bytes]:
    rest = b""
    async for chunk in stream:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


async def run_demo(endpoint: str | None) -> int:
    """Play the demo; return the exit code: 0 if every invariant held."""
    console = Console()
    began = time.monotonic()
    namespace = f"demo-{time.time_ns():x}"
    story = Story()
    async with AsyncExitStack() as stack:
        if endpoint is None:
            server = await stack.enter_async_context(EtcdServer())
            endpoint = server.endpoint
            console.print(f"a throw-away etcd {server.version} answers at {endpoint}")
        show = stack.enter_context(_display(console, story))
        with trio.move_on_after(LIMIT_SECONDS) as limit:
            await _play(story, show, endpoint, namespace)
        if limit.cancelled_caught:
            story.broken.append(f"the story did not end within {LIMIT_SECONDS:.0f} s")
        async with open_etcd(endpoint) as backend:
            verdict = await check_history(backend, namespace)
    return _summarise(console, story, verdict, time.monotonic() - began)


async def _play(story: Story, show: Callable[[], None], endpoint: str, namespace: str) -> None:
    stage = Stage(story, show)
    async with trio.open_nursery() as nursery:
        try:
            await stage.start(nursery, endpoint, namespace)
            await stage.wait_held()
            await trio.sleep(CALM_SECONDS)

            killed = await stage.wait_held()
            stage.send(killed, signal.SIGKILL, "was killed while it held the lock")
            await _measure_hand_over(story, stage, killed, "kill")
            await trio.sleep(CALM_SECONDS / 2)

            frozen = await stage.wait_held(not_by=killed)
            stage.send(frozen, signal.SIGSTOP, "was frozen while it held the lock")
            await _measure_hand_over(story, stage, frozen, "freeze")
            await trio.sleep(CALM_SECONDS / 2)
            stage.send(frozen, signal.SIGCONT, "was woken")
            with trio.move_on_after(HAND_OVER_LIMIT_SECONDS):
                await stage.wait_said("stale-write-refused")
            await trio.sleep(CALM_SECONDS / 2)
        finally:
            with trio.CancelScope(shield=True):
                await stage.end()
            nursery.cancel_scope.cancel()


async def _measure_hand_over(story: Story, stage: Stage, lost: str, what: str) -> None:
    began = time.monotonic()
    heir = await stage.wait_held(not_by=lost)
    gap = time.monotonic() - began
    story.slow_hand_overs.append((what, gap))
    story.notes.append(f"{heir} took over {gap:.2f} s later (the lease lives {TTL} s)")
    if gap > HAND_OVER_LIMIT_SECONDS:
        story.broken.append(f"the hand-over after the {what} took {gap:.1f} s")


@contextmanager
def _display(console: Console, story: Story) -> Generator[Callable[[], None]]:
    """Show the story live on a terminal, and as lines elsewhere."""
    if console.is_terminal:
        with Live(story.picture(), console=console, refresh_per_second=8) as live:
            yield lambda: live.update(story.picture())
        return
    shown = 0

    def show_lines() -> None:
        nonlocal shown
        for note in story.notes[shown:]:
            console.print(f"- {note}")
        shown = len(story.notes)

    yield show_lines
    show_lines()


def _summarise(console: Console, story: Story, verdict: Verdict, seconds: float) -> int:
    gaps = sorted(story.hand_overs)
    broken = story.broken + verdict.broken
    if verdict.writes < len(NAMES) or verdict.owners < len(NAMES):
        broken.append("too little happened")
    if not story.refused:
        broken.append("no stale write was seen to be refused")
    console.print(f"\n{verdict.owners} owners in etcd's history, tokens strictly growing")
    console.print(f"{verdict.writes} writes of the ledger, each by the owner of its revision")
    if gaps:
        worst = gaps[-1] * 1000
        console.print(
            f"{len(gaps)} hand-overs: median {gaps[len(gaps) // 2] * 1000:.1f} ms, worst {worst:.1f} ms"
        )
    for what, gap in story.slow_hand_overs:
        console.print(f"hand-over after the {what}: {gap:.2f} s")
    console.print(f"{story.refused} stale write(s) refused by etcd")
    for fact in broken:
        console.print(f"[bold red]BROKEN[/]: {fact}")
    console.print(f"{'FAILED' if broken else 'every invariant held'}, {seconds:.0f} s")
    return 1 if broken else 0
