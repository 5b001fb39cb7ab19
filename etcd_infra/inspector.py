"""Reads what is in etcd and describes it; opens no session and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import trio

from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra._primitives.election_info import (
    ElectionInfo,
    MemberInfo,
    inspect_elections,
    inspect_members,
)
from etcd_infra._primitives.lock_cycles import CycleInfo, inspect_cycles
from etcd_infra._primitives.lock_history import LockHistory, lock_history
from etcd_infra._primitives.lock_info import LockInfo, inspect_lock, inspect_locks
from etcd_infra._primitives.rwlock_info import RWLockInfo, inspect_rwlock, inspect_rwlocks
from etcd_infra._primitives.semaphore_info import SemaphoreInfo, inspect_semaphore, inspect_semaphores
from etcd_infra._primitives.state_info import StateInfo, inspect_state
from etcd_infra._primitives.topic_info import TopicInfo, inspect_topics
from etcd_infra._primitives.transaction_info import TransactionInfo, inspect_transactions
from etcd_infra._session.clock import Clock
from etcd_infra.errors import EtcdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from etcd_infra._etcd.backend import Backend


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """
    One session.

    Attributes:
        node_id: Whose it is.
        host: Where that process said it runs.
        lease: In hex, as in its keys.
        generation: Mod revision of its key.
        ttl: Whole seconds left, as the server says.
        started_at: Unix seconds by its own clock.
    """

    node_id: str
    host: str | None
    lease: str
    generation: int
    ttl: int
    started_at: float | None


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """One lease of the whole store: seconds left and granted, and the keys that hang on it."""

    lease: str
    ttl: int
    granted_ttl: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HealthInfo:
    """
    Whether etcd serves linearizable reads, and what the member that was asked says of itself.

    Attributes:
        healthy: A linearizable read was answered.
        latency: Seconds it took.
        endpoint: Where it was asked, if the caller said so.
        error: Why it was not.
    """

    healthy: bool
    latency: float
    endpoint: str = ""
    revision: int = 0
    version: str = ""
    member: str = ""
    is_leader: bool = False
    has_leader: bool = False
    db_size_bytes: int = 0
    alarms: tuple[str, ...] = ()
    error: str | None = None


class _SessionValue(msgspec.Struct):
    node: str
    host: str | None = None
    since: float | None = None


class Inspector:
    """
    Describes one namespace of a store.

    Args:
        backend: Where to read.
        namespace: What to describe; leases and health are those of the whole store.
        endpoint: Where `backend` leads, for the record.
        now: Tells Unix seconds, for ages; None: this machine's clock.
    """

    def __init__(
        self,
        backend: Backend,
        namespace: str = "",
        *,
        endpoint: str = "",
        now: Callable[[], float] | None = None,
    ) -> None:
        self._backend = backend
        self._endpoint = endpoint
        self._keys = Keys(namespace)
        self._now = now or Clock().wall

    async def inspect(self, kind: str, name: str | None = None) -> object:
        """
        Describe everything of one kind, or one thing of it.

        Raises:
            ValueError: there is no such kind, or it has no names.
        """
        named: dict[str, Callable[[str], Awaitable[object]]] = {
            "locks": self.lock,
            "rwlocks": self.rwlock,
            "semaphores": self.semaphore,
            "elections": self.elections,
            "members": self.members,
            "state": self.state,
            "topics": self.topics,
        }
        if name is not None and kind in named:
            return await named[kind](name)
        kinds: dict[str, Callable[[], Awaitable[object]]] = {
            "locks": self.locks,
            "rwlocks": self.rwlocks,
            "semaphores": self.semaphores,
            "cycles": self.cycles,
            "elections": self.elections,
            "members": self.members,
            "state": self.state,
            "transactions": self.transactions,
            "topics": self.topics,
            "sessions": self.sessions,
            "leases": self.leases,
            "health": self.health,
        }
        if kind not in kinds:
            msg = f"nothing of the kind {kind!r} can be inspected, only {', '.join(kinds)}"
            raise ValueError(msg)
        if name is not None:
            msg = f"{kind} have no names, and {name!r} was given"
            raise ValueError(msg)
        return await kinds[kind]()

    async def lock(self, name: str) -> LockInfo:
        """Describe one lock."""
        return await inspect_lock(self._backend, self._keys, name)

    async def locks(self) -> tuple[LockInfo, ...]:
        """Describe every lock that is held."""
        return await inspect_locks(self._backend, self._keys)

    async def lock_history(self, name: str) -> LockHistory:
        """Replay who owned a lock, as far back as etcd remembers."""
        return await lock_history(self._backend, name, KeyRange.prefix(self._keys.lock_line(name)))

    async def rwlock(self, name: str) -> RWLockInfo:
        """Describe one read-write lock."""
        return await inspect_rwlock(self._backend, self._keys, name)

    async def rwlocks(self) -> tuple[RWLockInfo, ...]:
        """Describe every read-write lock that is held."""
        return await inspect_rwlocks(self._backend, self._keys)

    async def semaphore(self, name: str) -> SemaphoreInfo:
        """Describe one semaphore."""
        return await inspect_semaphore(self._backend, self._keys, name)

    async def semaphores(self) -> tuple[SemaphoreInfo, ...]:
        """Describe every semaphore that was ever used."""
        return await inspect_semaphores(self._backend, self._keys)

    async def cycles(self) -> tuple[CycleInfo, ...]:
        """Find the rings of tasks that wait for each other, across locks, read-write locks and semaphores."""
        return await inspect_cycles(self._backend, self._keys)

    async def elections(self, name: str | None = None) -> tuple[ElectionInfo, ...]:
        """Describe every election that somebody leads, or one election."""
        return await inspect_elections(self._backend, self._keys, name)

    async def members(self, name: str | None = None) -> tuple[MemberInfo, ...]:
        """Describe the members of every group and election, or of one."""
        return await inspect_members(self._backend, self._keys, name)

    async def state(self, prefix: str = "") -> tuple[StateInfo, ...]:
        """Describe the state keys that begin with `prefix`."""
        return await inspect_state(self._backend, self._keys, prefix)

    async def transactions(self) -> tuple[TransactionInfo, ...]:
        """Describe every two-phase transaction that is prepared, oldest first."""
        return await inspect_transactions(self._backend, self._keys)

    async def topics(self, name: str | None = None) -> tuple[TopicInfo, ...]:
        """Describe every topic, or one, with its groups."""
        return await inspect_topics(self._backend, self._keys, name, now=self._now())

    async def sessions(self) -> tuple[SessionInfo, ...]:
        """Describe every living session, oldest first."""
        found = await self._backend.range(Range(KeyRange.prefix(self._keys.sessions)))
        infos: list[SessionInfo] = []
        for kv in sorted(found.kvs, key=lambda kv: kv.create_revision):
            lease = self._keys.parse_session(kv.key)
            if lease is None:
                continue
            value = _session_value(kv.value)
            ttl = (await self._backend.lease_time_to_live(lease)).ttl
            infos.append(SessionInfo(value.node, value.host, f"{lease:x}", kv.mod_revision, ttl, value.since))
        return tuple(infos)

    async def leases(self) -> tuple[LeaseInfo, ...]:
        """Describe every lease of the store."""
        infos: list[LeaseInfo] = []
        for lease in await self._backend.lease_list():
            found = await self._backend.lease_time_to_live(lease, keys=True)
            if found.ttl >= 0:
                keys = tuple(key.decode(errors="backslashreplace") for key in found.keys)
                infos.append(LeaseInfo(f"{lease:x}", found.ttl, found.granted_ttl, keys))
        return tuple(infos)

    async def health(self) -> HealthInfo:
        """Make one linearizable read, and ask a member about itself; never raises for etcd's sake."""
        began = trio.current_time()
        try:
            read = await self._backend.range(Range(KeyRange.one(b"\0"), count_only=True))
            latency = trio.current_time() - began
            status = await self._backend.status()
        except EtcdError as error:
            latency = trio.current_time() - began
            return HealthInfo(healthy=False, latency=latency, endpoint=self._endpoint, error=str(error))
        return HealthInfo(
            healthy=not status.errors,
            latency=latency,
            endpoint=self._endpoint,
            revision=read.revision,
            version=status.version,
            member=f"{status.member:x}",
            is_leader=status.leader == status.member,
            has_leader=status.leader != 0,
            db_size_bytes=status.db_size_bytes,
            alarms=status.errors,
        )


def _session_value(value: bytes) -> _SessionValue:
    try:
        return msgspec.json.decode(value, type=_SessionValue)
    except msgspec.DecodeError:
        return _SessionValue("?")
