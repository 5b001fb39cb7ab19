"""
A lock that is held by one task of one process at a time, first come, first served.

Keys
    ``{ns}lock/{name}/{lease}-{n}``  a place in line, on the session's lease (or one of its own); JSON who
                                     and since when, for people only.

Algorithm
    1. Join the line (see `_waitqueue`): alone in it, the lock is held after one round trip.
    2. Otherwise wait for the one directly ahead, by one shared watch.
    3. While held: the lease's proof of life moves the deadline of the body's cancel scope, and from a
       quarter of a second on the key itself is watched: a lease clock is never proof of holding.
    4. Release: ``[created(mine)==token] → [delete mine]``.

Guarantees
    Tokens grow strictly from owner to owner. A write that carries ``hold.fence`` in its Txn is applied only
    while the lock is held, whoever was paused for how long. Losing the lock cancels the body.

Does not guarantee
    That nobody else *acts* while this process believes that it holds the lock: a process may be paused
    between a check and an act. That is what the fence is for. Between an operator's (or a faulty
    server's) deletion of the key and its report, both may run.

Source
    etcd ``client/v3/concurrency/mutex.go``; M. Kleppmann, "How to do distributed locking" (fencing). The
    layout is Go's, so ``etcdctl lock`` waits in the same line; ``-{n}`` lets tasks of one session exclude
    each other. Go unlocks by name, and its waiters have no generation: a late copy of a Go client's put
    may block the line until its session ends.
"""

from __future__ import annotations

from etcd_infra._etcd.model import KeyRange
from etcd_infra._primitives._lock_like import LockLike
from etcd_infra._primitives._waitqueue import Spot
from etcd_infra._primitives.lock_history import LockHistory, lock_history
from etcd_infra._primitives.lock_info import LockInfo, inspect_lock


class Lock(LockLike):
    """
    A lock's name; every acquisition is a `Hold` of its own.

    ``async with lock as hold:`` waits for its turn, cancels the body if the lock is lost, and releases it at
    the end. Two tasks that use one `Lock` exclude each other; the same task twice is a `RuntimeError`.
    """

    def _find_spot(self) -> Spot:
        return Spot(self._keys.locks, self._keys.lock_line(self.name))

    async def history(self) -> LockHistory:
        """
        Replay who owned the lock, as far back as etcd remembers.

        Raises:
            CompactedError: history is compacted faster than it can be read.

        Round trips:
            One and a watch; with compacted history another two and a watch. Half a second at least.
        """
        session = await self._sessions.current()
        return await lock_history(session.backend, self.name, KeyRange.prefix(self._line))

    async def inspect(self) -> LockInfo:
        """
        Describe who holds the lock and who waits.

        Round trips:
            One, and one more for the holder's lease.
        """
        session = await self._sessions.current()
        return await inspect_lock(session.backend, self._keys, self.name)
