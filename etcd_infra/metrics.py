"""What a coordinator has done, under the source document's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from etcd_infra._etcd.model import Txn

if TYPE_CHECKING:
    from etcd_infra._etcd.calls import Call
    from etcd_infra._session.clock import Clock
    from etcd_infra._session.session import Session
    from etcd_infra._session.tally import Tally


class SyncMeter:
    """Measures acknowledged writes: when the last one was, and how long they take on average."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._count = 0
        self._seconds = 0.0
        self.last_at: float | None = None

    def saw(self, call: Call) -> None:
        """Take one call in."""
        if call.error is None and isinstance(call.request, Txn) and not call.request.is_read_only:
            self._count += 1
            self._seconds += call.duration
            self.last_at = self._clock.wall()

    @property
    def average(self) -> float:
        """Mean seconds from sending a write to its answer; 0.0 before the first."""
        return self._seconds / self._count if self._count else 0.0


@dataclass(slots=True)
class Metrics:
    """Everything that `Coordinator.metrics` reports."""

    node_id: str
    tally: Tally
    sync: SyncMeter

    def read(self, session: Session | None, *, is_leader: bool) -> dict[str, object]:
        """Return the fields of the source document's metrics, in seconds."""
        return {
            "node_id": self.node_id,
            "is_leader": is_leader,
            "connected_nodes": session.connected_nodes if session is not None else 0,
            "lock_acquisitions": self.tally.lock_acquisitions,
            "lock_releases": self.tally.lock_releases,
            "lock_conflicts": self.tally.lock_conflicts,
            "state_operations": self.tally.state_operations,
            "messages_sent": self.tally.messages_sent,
            "messages_received": self.tally.messages_received,
            "last_sync_timestamp": self.sync.last_at,
            "average_sync_latency": self.sync.average,
        }
