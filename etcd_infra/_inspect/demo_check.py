"""Checks the demo against etcd's own history."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from etcd_infra._inspect.demo_worker import LOCK, ledger_key
from etcd_infra.abc import KeyRange

if TYPE_CHECKING:
    from etcd_infra.abc import Backend, Event


@dataclass
class Verdict:
    """What the history shows."""

    writes: int = 0
    owners: int = 0
    broken: list[str] = field(default_factory=list)


class _Replay:
    """Replays the line and the ledger, event by event."""

    def __init__(self, namespace: str) -> None:
        self._line = KeyRange.prefix(f"{namespace}/lock/{LOCK}/".encode())
        self._ledger = ledger_key(namespace)
        self._waiting: dict[bytes, int] = {}
        self._owner = 0
        self.verdict = Verdict()

    def take(self, event: Event) -> None:
        """Take in one event."""
        if event.key == self._ledger:
            self._check_write(event)
        elif event.key in self._line:
            if event.is_delete:
                self._waiting.pop(event.key, None)
            else:
                self._waiting.setdefault(event.key, event.kv.create_revision)
            self._check_owner()

    def _check_owner(self) -> None:
        owner = min(self._waiting.values(), default=0)
        if owner and owner != self._owner:
            if owner < self._owner:
                self.verdict.broken.append(f"the token went back from {self._owner} to {owner}")
            self._owner = owner
            self.verdict.owners += 1

    def _check_write(self, event: Event) -> None:
        said = json.loads(event.kv.value)
        self.verdict.writes += 1
        owner = min(self._waiting.values(), default=0)
        if said["token"] != owner:
            self.verdict.broken.append(
                f"revision {event.revision}: {said['writer']} wrote with {said['token']}, owner was {owner}"
            )


async def check_history(backend: Backend, namespace: str) -> Verdict:
    """Replay every change of the namespace from the beginning."""
    everything = KeyRange.prefix(f"{namespace}/".encode())
    last = await backend.put(f"{namespace}/end".encode(), b"")
    replay = _Replay(namespace)
    async with backend.watch(everything, start_revision=1) as batches:
        async for batch in batches:
            for event in batch.events:
                replay.take(event)
            if batch.events and batch.revision >= last:
                break
    return replay.verdict
