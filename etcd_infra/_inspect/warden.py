"""
The supervisor's shadow: kills a process group when its time is up, or when the supervisor is gone.

A program of its own, because the supervisor may be killed or frozen while its command runs on. It is told on
its standard input, a line each: ``{group} {deadline}``, by the system's monotonic clock, and ``end``. It
imports nothing but the standard library, to start at once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import suppress

READ_BYTES = 4096


def guard(source: int) -> None:
    """Wait for the end of `source`, for ``end``, or for the latest deadline; unless ended, kill the group."""
    group, deadline = 0, float("inf")
    unread = b""
    while (now := time.monotonic()) < deadline:
        limit = None if deadline == float("inf") else deadline - now
        if not select.select([source], [], [], limit)[0]:
            continue
        received = os.read(source, READ_BYTES)
        if not received:
            break
        *lines, unread = (unread + received).split(b"\n")
        if b"end" in lines:
            return
        if lines:
            first, second = lines[-1].split()
            group, deadline = int(first), float(second)
    if group:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    guard(sys.stdin.fileno())
