"""What an observer is told of one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Call:
    """
    One call to etcd.

    Attributes:
        verb: The waist's verb; a watch is recorded when it was created.
        request: What was asked: a `Txn`, a `Range`, a lease id, …
        duration: Seconds.
        error: The class of what it raised; None if it was answered.
    """

    verb: str
    request: object
    duration: float
    error: type[BaseException] | None = None


Observer: TypeAlias = Callable[[Call], object]
"""Is told of each call after it ended; runs on the Trio loop and must not block; what it raises is logged."""
