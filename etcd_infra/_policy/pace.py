"""How fast to write a key that others write, too, so that everybody gets a turn."""

from __future__ import annotations

from typing import Final

from etcd_infra._policy.backoff import delay

CONTENDED_SECONDS: Final = 1.0
TURN: Final = 32
REST_SECONDS: Final = 0.016


class Pace:
    """
    The pace of one writer of one key.

    Who has written last knows the version, and needs one round trip where the others need two: it would win
    for ever. So while there are others it rests after 32 writes in a row. A writer alone never rests.
    """

    def __init__(self) -> None:
        self._contended_until = 0.0
        self._in_a_row = 0

    def lost(self, now: float, losses: int, draw: float) -> float:
        """
        Note that somebody else was faster, `losses` times in a row; return seconds to wait.

        The first time the number was only out of date. When there are others it is their turn: trying again
        at once would cost both of them a round trip for each write.
        """
        contended = now < self._contended_until
        self._contended_until = now + CONTENDED_SECONDS
        self._in_a_row = 0
        return delay(losses, draw, base=REST_SECONDS / 2, cap=REST_SECONDS * 2) if contended else 0.0

    def won(self) -> None:
        """Note a write of one's own."""
        self._in_a_row += 1

    def before_next(self, now: float, draw: float) -> float:
        """Return seconds to rest before the next write; 0.0 when alone, or in one's turn."""
        if now >= self._contended_until or self._in_a_row < TURN:
            return 0.0
        self._in_a_row = 0
        return REST_SECONDS * (0.5 + draw)
