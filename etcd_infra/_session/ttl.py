"""What may be a TTL."""

from __future__ import annotations

from typing import Final

MAX_TTL: Final = 9_000_000_000


def check_ttl(ttl: int) -> int:
    """
    Return `ttl` if it is a number of whole seconds that etcd takes.

    Raises:
        TypeError: it is no int (a bool and a float are none).
        ValueError: it is below 1, or above etcd's maximum.
    """
    if isinstance(ttl, bool) or not isinstance(ttl, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        msg = f"a TTL must be an int of whole seconds, not {ttl!r}"
        raise TypeError(msg)
    if not 1 <= ttl <= MAX_TTL:
        msg = f"a TTL must be between 1 and {MAX_TTL} seconds, not {ttl}"
        raise ValueError(msg)
    return ttl
