"""
Becomes the command once it is told to: until then its supervisor makes sure that it is guarded.

Arguments: a file descriptor, then the command. A byte from it means go; its end means that the supervisor is
gone, and the command never runs. It imports nothing but the standard library, to start at once.
"""

from __future__ import annotations

import os
import signal
import sys

NOT_EXECUTABLE = 126
NOT_FOUND = 127


def wait_and_become(gate: int, command: list[str]) -> int:
    """Return only if the command can not run, or must not."""
    if not os.read(gate, 1):
        return NOT_EXECUTABLE
    os.close(gate)
    # Python ignores these two, and what is ignored stays so in the next program.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - the very command that the user names
    except OSError as error:
        sys.stderr.write(f"error: {command[0]}: {error.strerror}\n")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


if __name__ == "__main__":
    sys.exit(wait_and_become(int(sys.argv[1]), sys.argv[2:]))
