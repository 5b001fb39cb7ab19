"""Who joins a group and who leaves it, as facts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.keys import place_lease
from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._roll import Member, Roll
from etcd_infra._session.mirror import Changes, Mirror, Snapshot
from etcd_infra.errors import CompactedError, FutureRevisionError, UnavailableError

if TYPE_CHECKING:
    from random import Random

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._etcd.model import Event, KeyValue


class MemberChange(StrEnum):
    """
    What became of a member.

    JOINED. CHANGED: it registered anew (a restart under the same id, or other metadata). LEFT: it
    unregistered. DIED: its session ended. GONE: one of the two, while etcd's history was compacted here.
    """

    JOINED = "joined"
    CHANGED = "changed"
    LEFT = "left"
    DIED = "died"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class MemberEvent:
    """
    One change of one member.

    Attributes:
        member: As it is now; of one that went, as it was.
        revision: Of the change; 0 if it happened while nobody looked.
    """

    change: MemberChange
    member: Member
    revision: int


class MemberWatch:
    """To be iterated over: one JOINED for each member that is there, then every change."""

    def __init__(self, backend: Backend, keys: Keys, mirror: Mirror, random: Random) -> None:
        self._backend = backend
        self._keys = keys
        self._mirror = mirror
        self._random = random
        self._roll = Roll()
        self._events: deque[Event] = deque()
        self._ready: deque[MemberEvent] = deque()

    def __aiter__(self) -> MemberWatch:
        return self

    async def __anext__(self) -> MemberEvent:
        """
        Wait for the next change.

        Raises:
            EtcdError: etcd does not let the group be read any more.

        Cancellation:
            Nothing is lost; call again.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._ready:
            if self._events:
                await self._take_in(self._events[0])
                self._events.popleft()
                continue
            match await self._mirror.receive():
                case Snapshot(kvs=kvs):
                    self._begin_anew({member.node_id: member for member in self._roll.members}, kvs)
                case Changes(events):
                    self._events.extend(events)
        return self._ready.popleft()

    def _begin_anew(self, before: dict[str, Member], kvs: tuple[KeyValue, ...]) -> None:
        self._roll.begin_anew(kvs)
        for member in self._roll.members:
            known = before.pop(member.node_id, None)
            if known != member:
                change = MemberChange.JOINED if known is None else MemberChange.CHANGED
                self._ready.append(MemberEvent(change, member, member.revision))
        self._ready.extend(MemberEvent(MemberChange.GONE, member, 0) for member in before.values())

    async def _take_in(self, event: Event) -> None:
        if not event.is_delete:
            self._registered(event)
            return
        # Nothing may change before the last checkpoint: a cancelled call is made again.
        how = await self._how(event)
        member = self._roll.delete(event.key)
        if member is None:
            return
        remaining = self._roll.get(member.node_id)
        if remaining is None:
            self._ready.append(MemberEvent(how, member, event.revision))
        elif remaining.revision < member.revision:
            self._ready.append(MemberEvent(MemberChange.CHANGED, remaining, event.revision))

    def _registered(self, event: Event) -> None:
        before = self._roll.node_ids
        member = self._roll.put(event.kv)
        if member is None or self._roll.get(member.node_id) is not member:
            return
        change = MemberChange.CHANGED if member.node_id in before else MemberChange.JOINED
        self._ready.append(MemberEvent(change, member, event.revision))

    async def _how(self, event: Event) -> MemberChange:
        """Tell leaving from dying: a session's end takes all of its keys at one revision."""
        session_key = self._keys.session(place_lease(event.key) or 0)
        at_that_time = Range(KeyRange.one(session_key), keys_only=True, revision=event.revision)
        failures = 0
        while True:
            try:
                answer = await self._backend.range(at_that_time)
            except (CompactedError, FutureRevisionError):
                return MemberChange.GONE
            except UnavailableError:
                await trio.sleep(delay(failures, self._random.random()))
                failures += 1
            else:
                return MemberChange.LEFT if answer.kvs else MemberChange.DIED
