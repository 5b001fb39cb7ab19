"""Who leads, as everybody can see it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import trio

from etcd_infra._etcd.keys import place_lease
from etcd_infra._policy.backoff import delay
from etcd_infra._session.mirror import Changes, Mirror, Snapshot
from etcd_infra.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._etcd.model import Event, KeyValue


@dataclass(frozen=True, slots=True)
class Leader:
    """
    Who leads.

    Attributes:
        leader_id: Its node id; for a foreign client, or one whose session is gone, its lease.
        term: The create revision of its key: grows from leader to leader, and is not dense.
        value: Its latest proposal.
    """

    leader_id: str
    term: int
    value: bytes


class LeaderWatch:
    """
    To be iterated over: the leader of now (or None), then every change of leader or of its proposal.

    Terms never decrease, over reconnects, compaction and changes of the member that is asked; what happened
    while history was compacted is passed over. A store that was wiped or restored begins anew.
    """

    def __init__(self, backend: Backend, keys: Keys, mirror: Mirror, random: Random) -> None:
        self._backend = backend
        self._keys = keys
        self._mirror = mirror
        self._random = random
        self._line: dict[bytes, KeyValue] = {}
        self._first: KeyValue | None = None
        self._ready: deque[KeyValue | None] = deque()
        self._node_ids: dict[int, str] = {}

    def __aiter__(self) -> LeaderWatch:
        return self

    async def __anext__(self) -> Leader | None:
        """
        Wait for the next leader; None: there is none.

        Raises:
            EtcdError: etcd does not let the election be read any more.

        Cancellation:
            Nothing is lost; call again.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._ready:
            match await self._mirror.receive():
                case Snapshot(kvs=kvs) as snapshot:
                    self._begin_anew(kvs, is_first=snapshot.missed_after is None)
                case Changes(events):
                    self._take_in(events)
        first = self._ready[0]
        leader = None if first is None else await self._leader(first)
        self._ready.popleft()
        return leader

    def _begin_anew(self, kvs: Iterable[KeyValue], *, is_first: bool) -> None:
        self._line = {kv.key: kv for kv in kvs}
        self._elect(always=is_first)

    def _take_in(self, events: tuple[Event, ...]) -> None:
        for event, following in zip(events, (*events[1:], None), strict=True):
            if event.is_delete:
                self._line.pop(event.key, None)
            else:
                self._line[event.key] = event.kv
            # All of a revision happens at once: half of it was never true.
            if following is None or following.revision != event.revision:
                self._elect()

    def _elect(self, *, always: bool = False) -> None:
        before = self._first
        first = self._line.get(before.key) if before is not None else None
        if first is None or before is None or first.create_revision != before.create_revision:
            first = min(self._line.values(), key=lambda kv: kv.create_revision, default=None)
        self._first = first
        if always or first != before:
            self._ready.append(first)

    async def _leader(self, kv: KeyValue) -> Leader:
        lease = kv.lease or place_lease(kv.key) or 0
        if lease not in self._node_ids:
            self._node_ids = {lease: await self._node_id(lease)}
        return Leader(self._node_ids[lease], kv.create_revision, kv.value)

    async def _node_id(self, lease: int) -> str:
        failures = 0
        while True:
            try:
                found = await self._backend.get(self._keys.session(lease))
                break
            except UnavailableError:
                await trio.sleep(delay(failures, self._random.random()))
                failures += 1
        return node_id_in(found.value if found else b"", lease)


class _Session(msgspec.Struct):
    node: str


def node_id_in(session_value: bytes, lease: int) -> str:
    """Return the node id that a session's value names; for what is no such value, the lease."""
    try:
        return msgspec.json.decode(session_value, type=_Session).node
    except msgspec.DecodeError:
        return f"lease {lease:x}"
