"""
Several locks at once, or none of them: the same locks that `Lock` takes one by one.

Keys
    A place in the line of each, see `lock`.

Algorithm
    1. Join all lines by one Txn: ``[mod(session)==generation, absent(all mine)] → [put all mine]``. All keys
       have one create revision, which is the token.
    2. Look who is first in each, and that all keys are there, at one revision; if it is not always me, wait
       for one turn after the other, and look again.
    3. The fence is the proof of all keys. One key gone is all lost, and the others are given back.

Guarantees
    Multi-locks whose owners hold nothing else never wait for each other in a ring: one is ahead of another
    in every line that both stand in.

Does not guarantee
    That tasks which hold a lock and ask for more do not: `inspect` shows rings.

Source
    Apache Curator's ``InterProcessMultiLock`` takes one lock after the other, and so may wait in a ring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from etcd_infra._primitives._hold import Hold
from etcd_infra._primitives._lock_like import LockLike
from etcd_infra._primitives._owner import check_not_owner
from etcd_infra._primitives._places import Places
from etcd_infra._primitives._waitqueue import Spot
from etcd_infra._primitives._who import introduce
from etcd_infra._primitives.fence import Fence

if TYPE_CHECKING:
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._session.current import SessionSource
    from etcd_infra._session.session import Session

MAX_NAMES: Final = 63


class MultiLock(LockLike):
    """
    The locks `names`, taken, held, lost and given back together, as a `Lock` is.

    Args:
        sessions: A session, or what replaces it when it is lost.
        keys: The namespace's key layout.
        names: One to 63 distinct names of locks; their order does not matter.
    """

    def __init__(self, sessions: SessionSource, keys: Keys, *names: str) -> None:
        self.names = tuple(sorted(names))
        if not 1 <= len(names) <= MAX_NAMES or len(set(names)) < len(names):
            msg = f"a multi-lock takes 1 to {MAX_NAMES} distinct names, not {names!r}"
            raise ValueError(msg)
        self._spots = [Spot(keys.locks, keys.lock_line(name)) for name in self.names]
        super().__init__(sessions, keys, "+".join(self.names))

    def _find_spot(self) -> Spot:
        return self._spots[0]

    async def _take(self, session: Session, *, wait: bool) -> Hold | None:
        for spot in self._spots[1:]:
            check_not_owner(session, spot.line, self)
        who = introduce(session)
        places = Places([spot.place(session, who) for spot in self._spots])
        taken = False
        try:
            taken = await (places.come_first() if wait else places.try_join())
        finally:
            if not taken:
                await places.leave(until=session.clean_up_deadline())
        if places.waited or not taken:
            session.tally.lock_conflicts += 1
        return self._granted_all(session, places) if taken else None

    def _granted_all(self, session: Session, places: Places) -> Hold:
        fence = Fence(self.name, places.token, session.own_key.epoch, places.proof)
        hold = Hold(session, places, fence, own=None)
        task = trio.lowlevel.current_task()
        for spot in self._spots[1:]:
            hold.own((spot.line, task))
        session.tally.lock_acquisitions += 1
        return hold
