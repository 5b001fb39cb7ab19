"""Who stands first in a line of a process's own: the one consumer, or the one trimmer, of several."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from etcd_infra._etcd.model import Compare
from etcd_infra._primitives._hold import Hold
from etcd_infra._primitives._turn import come_first
from etcd_infra._primitives._waitqueue import Spot
from etcd_infra._primitives._who import introduce
from etcd_infra._primitives.fence import Fence
from etcd_infra.errors import LockLostError, SessionLostError

if TYPE_CHECKING:
    from etcd_infra._session.current import SessionSource

logger = logging.getLogger("etcd_infra.topic")


async def become_foremost(sessions: SessionSource, line: bytes, resource: str) -> Hold | None:
    """
    Stand in line until it is this place's turn; None: the session, or the place, was lost meanwhile.

    Raises:
        SessionLostError: there will be no session any more.
        StorageFullError, AccessDeniedError: etcd refuses.

    Cancellation:
        Leaves the line within two seconds; what is left, the session's janitor does.

    Round trips:
        One if nobody is in line, else one more for each predecessor seen.
    """
    session = await sessions.current()
    place = Spot(line, line).place(session, introduce(session))
    hold: Hold | None = None
    try:
        with session.tether():
            await come_first(place)
            proof = (Compare.created_at(place.key, place.token),)
            hold = Hold(session, place, Fence(resource, place.token, session.own_key.epoch, proof), own=None)
    except (LockLostError, SessionLostError) as error:
        logger.info("for %r another place in line is needed: %s", resource, error)
    finally:
        if hold is None:
            await place.leave(until=session.clean_up_deadline())
    return hold
