"""What this coordinator has done, counted where it happens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Tally:
    """Counters that outlive single sessions."""

    lock_acquisitions: int = 0
    lock_releases: int = 0
    lock_conflicts: int = 0
    state_operations: int = 0
    messages_sent: int = 0
    messages_received: int = 0
