"""
Run a command while a lock is held, or while this process leads; end it when that is lost.

The command gets a session, and so a process group, of its own: whatever it starts is signalled with it. A
`warden` kills the group should this process be killed or frozen until what is held is no longer proven.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from etcd_infra import LostError, SessionLostError, open_coordinator

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from etcd_infra import Coordinator, Hold

PASSED_ON: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
ENDED_BY_SIGNAL: Final = 128
FEED_SECONDS: Final = 0.25
POLL_SECONDS: Final = 0.02
GATE: Final = Path(__file__).with_name("gate.py")
WARDEN: Final = Path(__file__).with_name("warden.py")


class Exit(IntEnum):
    """What the command line ends with when the command did not end by itself."""

    BUSY = 75
    LOST = 76


@dataclass(frozen=True, slots=True)
class Job:
    """
    What to run, and under what.

    Attributes:
        command: Program and arguments.
        lock: Name of the lock; None: `election` is meant.
        election: Name of the election.
        waits: Whether to wait for one's turn; else a lock that is held is BUSY.
        grace: Seconds between SIGTERM and SIGKILL when what was held is lost.
        ttl: Whole seconds for which it outlives this process.
    """

    command: Sequence[str]
    lock: str | None = None
    election: str | None = None
    waits: bool = True
    grace: float = 5.0
    ttl: int = 15

    def __post_init__(self) -> None:
        if (self.lock is None) == (self.election is None):
            raise ValueError("name either a lock or an election")
        if self.election is not None and not self.waits:
            raise ValueError("an election has no attempt that does not wait")
        if self.ttl < 1:
            raise ValueError(f"ttl must be at least 1 second, not {self.ttl}")
        if not self.grace >= 0:
            raise ValueError(f"grace must be at least 0 seconds, not {self.grace}")


async def run_job(endpoints: str, namespace: str, job: Job) -> int:
    """Run the job; return the exit code: the command's own, 128 + n after signal n, or an `Exit`."""
    runner = _Runner(job)
    with trio.open_signal_receiver(*PASSED_ON) as signals:

        async def listen() -> None:
            async for number in signals:
                runner.on_signal(number)

        async with _beside(listen):
            with runner.waiting:
                async with open_coordinator(endpoints, namespace=namespace, ttl=job.ttl) as infra:
                    await runner.run(infra)
    return runner.code


class _Runner:
    """One job; `waiting` is cancelled by a signal as long as the command does not run."""

    def __init__(self, job: Job) -> None:
        self.code = 0
        self.waiting = trio.CancelScope()
        self._job = job
        self._process: trio.Process | None = None

    def on_signal(self, number: int) -> None:
        """Pass it on; without a command, go without waiting any longer."""
        if self._process is not None:
            _signal(self._process.pid, number)
        else:
            self.code = ENDED_BY_SIGNAL + number
            self.waiting.cancel()

    async def run(self, infra: Coordinator) -> None:
        """Wait for the turn, run the command once, and set `code`."""
        while True:
            started = False
            try:
                async with self._taken(infra) as hold:
                    started = True
                    if hold is None:
                        _say(f"busy: somebody holds {self._job.lock!r}")
                        self.code = Exit.BUSY
                    else:
                        self.code = await self._run_under(hold)
            except SessionLostError:
                # Whoever waits has nothing to lose: in line again, with the next session.
                if started:
                    raise
                continue
            except LostError as error:
                _say(f"lost: {error}")
                self.code = Exit.LOST
            return

    def _taken(self, infra: Coordinator) -> AbstractAsyncContextManager[Hold | None]:
        if self._job.election is not None:
            return infra.election(self._job.election).lead(infra.node_id.encode())
        lock = infra.lock(self._job.lock or "")
        return lock if self._job.waits else lock.attempt()

    async def _run_under(self, hold: Hold) -> int:
        environment = os.environ | {
            "ETCD_INFRA_FENCING_TOKEN": str(hold.token),
            "ETCD_INFRA_FENCE": hold.fence.to_json(),
        }
        async with _open_warden() as warden:
            process, gate = await _open_gate(self._job.command, environment)
            self._process = process
            with trio.CancelScope() as guarded:
                try:
                    async with gate, _beside(partial(self._feed, warden, gate, hold, guarded)):
                        code = await process.wait()
                        return code if code >= 0 else ENDED_BY_SIGNAL - code
                finally:
                    with trio.CancelScope(shield=True):
                        await _end(process, self._job.grace)
        _say("lost: the warden is gone that guards the command's time")
        return Exit.LOST

    async def _feed(
        self, warden: trio.Process, gate: trio.lowlevel.FdStream, hold: Hold, guarded: trio.CancelScope
    ) -> None:
        """
        Tell the warden until when the group may live, and only then the gate to open.

        Without a warden, cancel `guarded`.
        """
        assert warden.stdin is not None
        assert self._process is not None
        group = self._process.pid
        try:
            while True:
                # The clock first: a pause between the two must shorten the time, not lengthen it.
                now = time.monotonic()
                remaining = hold.remaining()
                if not remaining:
                    return
                await warden.stdin.send_all(b"%d %f\n" % (group, now + remaining + self._job.grace))
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # open already, or ended
                    await gate.send_all(b"!")
                    await gate.aclose()
                await trio.sleep(FEED_SECONDS)
        except trio.BrokenResourceError:
            guarded.cancel()


@asynccontextmanager
async def _beside(function: Callable[[], Awaitable[None]]) -> AsyncGenerator[None]:
    """Run `function` as long as the body runs; what the body raises is not wrapped in a group."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again below
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _open_gate(
    command: Sequence[str], environment: Mapping[str, str]
) -> tuple[trio.Process, trio.lowlevel.FdStream]:
    """Start what becomes the command once a byte is sent; without one it ends with this process."""
    reading, writing = os.pipe()
    gate = trio.lowlevel.FdStream(writing)
    try:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-I", str(GATE), str(reading), *command],
            env=environment,
            start_new_session=True,
            pass_fds=(reading,),
        )
    except BaseException:
        await gate.aclose()
        raise
    finally:
        os.close(reading)
    return process, gate


@asynccontextmanager
async def _open_warden() -> AsyncGenerator[trio.Process]:
    # In a session of its own: what a terminal sends to the foreground must not reach it.
    command = [sys.executable, "-I", str(WARDEN)]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            with suppress(trio.BrokenResourceError):
                await process.stdin.send_all(b"end\n")
            await process.stdin.aclose()
            await process.wait()


async def _end(process: trio.Process, grace: float) -> None:
    """End the whole group, politely at first; also what the command left behind when it ended by itself."""
    _signal(process.pid, signal.SIGTERM)
    with trio.move_on_after(grace):
        await process.wait()
        while _is_there(process.pid):  # noqa: ASYNC110 - no event tells when a group is empty
            await trio.sleep(POLL_SECONDS)
        return
    _signal(process.pid, signal.SIGKILL)
    await process.wait()


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _say(what: str) -> None:
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()
