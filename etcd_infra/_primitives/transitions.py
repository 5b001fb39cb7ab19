"""What becomes of a process in an election, as it happens."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import trio

from etcd_infra._session.keepalive import SessionStatus
from etcd_infra.errors import SessionLostError

if TYPE_CHECKING:
    from collections.abc import Generator

    from etcd_infra._primitives._candidacy import Candidacy, RollView
    from etcd_infra._primitives.leadership import Leadership
    from etcd_infra._session.session import Session


class TransitionKind(StrEnum):
    """What happened: BECAME_LEADER and LOST, PARTITIONED and HEALED take turns."""

    BECAME_LEADER = "became-leader"
    LOST = "lost"
    PARTITIONED = "partitioned"
    HEALED = "healed"


@dataclass(frozen=True, slots=True)
class Transition:
    """
    One step.

    Attributes:
        term: Of the leadership that began or ended; 0 for PARTITIONED and HEALED.
    """

    kind: TransitionKind
    term: int = 0


class Standing:
    """What `Election.transitions` tells, and has told."""

    def __init__(
        self,
        candidacy: Candidacy,
        send: trio.MemorySendChannel[Transition],
        view: RollView | None,
        required: int,
    ) -> None:
        self._candidacy = candidacy
        self._send = send
        self._view = view
        self._required = required
        self._partitioned = False

    @contextmanager
    def told_of_leaderships(self) -> Generator[None]:
        """Tell of leaderships for the length of a body."""
        for leadership in self._candidacy.leaderships:
            self._led(leadership, True)
        self._candidacy.listeners[self._led] = None
        try:
            yield
        finally:
            del self._candidacy.listeners[self._led]

    def _led(self, leadership: Leadership, begins: bool) -> None:  # noqa: FBT001
        kind = TransitionKind.BECAME_LEADER if begins else TransitionKind.LOST
        self._send.send_nowait(Transition(kind, leadership.term))

    async def follow(self) -> None:
        """Tell of partitions, under one session after the other, until there is none any more."""
        with self._send:
            while True:
                try:
                    session = await self._candidacy.sessions.current()
                except SessionLostError:
                    return
                await self._follow(session)
                self._see(partitioned=True)

    async def _follow(self, session: Session) -> None:
        changed = trio.Event()

        def look() -> None:
            changed.set()

        view = nullcontext() if self._view is None else self._view.told(look)
        session.lease.on_status[look] = None
        try:
            with view:
                while not session.lease.is_lost():
                    changed = trio.Event()
                    lacking = self._view is not None and len(self._view.roll) < self._required
                    self._see(partitioned=lacking or session.status is not SessionStatus.ALIVE)
                    await changed.wait()
        finally:
            del session.lease.on_status[look]

    def _see(self, *, partitioned: bool) -> None:
        if partitioned is not self._partitioned:
            self._partitioned = partitioned
            kind = TransitionKind.PARTITIONED if partitioned else TransitionKind.HEALED
            self._send.send_nowait(Transition(kind))
