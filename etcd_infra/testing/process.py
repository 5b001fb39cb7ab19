"""
A child process for tests that never outlives its owner.

It is started from the calling thread, not a worker thread: Linux kills a child with `PR_SET_PDEATHSIG` when
the *thread* that made it ends, and Trio's worker threads come and go.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_POLL_SECONDS: Final = 0.01
_POLITE_SECONDS: Final = 5.0
_TAIL_BYTES: Final = 4000

# Replaces itself by the real program, keeping the process id. A `preexec_fn` would do the same between fork
# and exec, where a process with threads must not run Python.
# Race: the parent may be gone before prctl is called; then its id is not our parent's any more.
_DIE_WITH_PARENT: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class ChildProcess:
    """
    One run of a program, its output in `log`.

    On Linux it is killed by the kernel when its parent dies; elsewhere only `reap` ends it.
    """

    def __init__(self, command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> None:
        self._log = log
        if sys.platform == "linux":
            stub = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
            command = [*stub, *command]
        with log.open("ab") as output:
            self._popen = subprocess.Popen(  # noqa: S603 - the caller chose the program
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, once it has ended."""
        return self._popen.poll()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        self._popen.send_signal(number)

    async def wait(self) -> int:
        """Wait for the end; return the exit code."""
        while (code := self._popen.poll()) is None:  # noqa: ASYNC110 - an exit wakes nobody portably
            await trio.sleep(_POLL_SECONDS)
        return code

    async def kill(self) -> None:
        """Kill it (SIGKILL) and wait for its end."""
        self._popen.kill()
        await self.wait()

    async def terminate(self) -> None:
        """Ask it to end (SIGTERM), a stopped one too; kill it if it has not after five seconds."""
        self._popen.send_signal(signal.SIGCONT)
        self._popen.terminate()
        with trio.move_on_after(_POLITE_SECONDS):
            await self.wait()
        await self.kill()

    def reap(self) -> None:
        """Kill it and wait, without Trio: the last resort of clean-up, right in every state."""
        self._popen.kill()
        self._popen.wait()

    def log_tail(self) -> str:
        """Return the end of what it wrote."""
        with self._log.open("rb") as lines:
            lines.seek(max(0, self._log.stat().st_size - _TAIL_BYTES))
            return lines.read().decode(errors="replace")
