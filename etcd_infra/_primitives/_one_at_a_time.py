"""What only one task may do at a time, and a second one is refused."""

from __future__ import annotations

import trio


class OneAtATime:
    """A block in which there is one task at most."""

    def __init__(self) -> None:
        self._is_taken = False

    def __enter__(self) -> None:
        if self._is_taken:
            msg = "another task waits for the next message of this subscription already"
            raise trio.BusyResourceError(msg)
        self._is_taken = True

    def __exit__(self, *_: object) -> None:
        self._is_taken = False
