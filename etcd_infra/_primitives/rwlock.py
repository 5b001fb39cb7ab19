"""
A lock that many may hold for reading, or one for writing; nobody starves.

Keys
    ``{ns}rwlock/{name}/{read|write}-{lease}-{n}``  a place in line, as for a lock.

Algorithm
    1. Readers and writers stand in one line, ordered by create revision (see `_waitqueue`).
    2. A writer waits for whoever is directly ahead; a reader for the nearest *writer* ahead, and for no reader.
    3. An attempt to read is refused while a writer is in line, also one that waits.

Guarantees
    While somebody writes, nobody else holds the lock. A writer that has joined is passed by no reader that
    joins later, so that it does not starve; nor does a reader, as a lock's waiter does not. Tokens grow in
    the order of joining; a fence is proof of the own key alone.

Does not guarantee
    That nobody else acts while this process believes that it holds the lock: that is what the fence is for.

Source
    etcd ``client/v3/experimental/recipes/rwmutex.go`` (where a waiter does not look at its own key), and
    Apache Curator's ``InterProcessReadWriteLock``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from etcd_infra._etcd.keys import READER, WRITER
from etcd_infra._etcd.model import KeyRange
from etcd_infra._primitives._lock_like import LockLike
from etcd_infra._primitives._waitqueue import Spot
from etcd_infra._primitives.rwlock_info import RWLockInfo, inspect_rwlock

if TYPE_CHECKING:
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._session.current import SessionSource


class RWLock:
    """
    The read-write lock `name`; `read` and `write` are used as a `Lock` is.

    A task that holds one side, or waits for it, may not ask for either: it would wait for itself.

    Args:
        sessions: A session, or what replaces it when it is lost.
        keys: The namespace's key layout.
        name: Non-empty, at most 512 bytes.

    Attributes:
        read: Held together with other readers.
        write: Held alone.
    """

    def __init__(self, sessions: SessionSource, keys: Keys, name: str) -> None:
        self.name = name
        self.read: LockLike = _Reading(sessions, keys, name)
        self.write: LockLike = _Writing(sessions, keys, name)
        self._sessions = sessions
        self._keys = keys

    def __repr__(self) -> str:
        return f"<RWLock {self.name!r}>"

    async def inspect(self) -> RWLockInfo:
        """
        Describe who reads, who writes and who waits.

        Round trips:
            One.
        """
        session = await self._sessions.current()
        return await inspect_rwlock(session.backend, self._keys, self.name)


class _Reading(LockLike):
    def __repr__(self) -> str:
        return f"<RWLock {self.name!r}, to read>"

    def _find_spot(self) -> Spot:
        line = self._keys.rwlock_line(self.name)
        return Spot(self._keys.rwlocks, line, READER, rivals=KeyRange.prefix(line + WRITER))


class _Writing(LockLike):
    def __repr__(self) -> str:
        return f"<RWLock {self.name!r}, to write>"

    def _find_spot(self) -> Spot:
        line = self._keys.rwlock_line(self.name)
        return Spot(self._keys.rwlocks, line, WRITER, rivals=KeyRange.prefix(line))
