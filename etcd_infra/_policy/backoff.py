"""How long to wait before the next try: exponential, capped, with full jitter."""

from __future__ import annotations

from typing import Final

BASE: Final = 0.05
CAP: Final = 1.0


def delay(attempt: int, draw: float, *, base: float = BASE, cap: float = CAP) -> float:
    """
    Return seconds to wait after the `attempt`-th failure (0 for the first).

    Full jitter spreads a crowd that failed together: the wait is drawn evenly below a bound that doubles
    each time, up to `cap`; never less than a tenth of it, so that nobody spins.

    Args:
        attempt: Failures before this one, at least 0.
        draw: A random number in [0, 1).
        base: Seconds, the bound after the first failure.
        cap: Seconds, the largest bound.

    Source: M. Brooker, "Exponential Backoff and Jitter", 2015.
    """
    bound = min(cap, base * 2 ** min(attempt, 30))
    return bound * (0.1 + 0.9 * draw)
