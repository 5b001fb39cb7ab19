"""What a checker has to say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """
    Something that must not happen, and did.

    Attributes:
        invariant: Its name, for instance "L1" or "liveness".
        what: What happened.
        at: True seconds or a revision, whatever the checker knows; 0: neither.
    """

    invariant: str
    what: str
    at: float = 0.0

    def __str__(self) -> str:
        return f"{self.invariant} at {self.at:g}: {self.what}"
