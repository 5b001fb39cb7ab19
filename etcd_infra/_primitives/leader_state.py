"""Where a process stands in an election, at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.keys import place_lease
from etcd_infra._etcd.model import KeyRange, Range, SortTarget, Txn
from etcd_infra._primitives._cas import found_in
from etcd_infra._primitives._roll import Roll
from etcd_infra._session.keepalive import SessionStatus
from etcd_infra.errors import UnavailableError

if TYPE_CHECKING:
    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._primitives._candidacy import Candidacy
    from etcd_infra._session.session import Session


class LeaderStatus(StrEnum):
    """
    Where a process stands.

    PARTITIONED: its session can not confirm itself, or there are too few members; it hides the others.
    LEADER: it leads. FOLLOWER: it does not. CANDIDATE: it campaigns, and nobody leads.
    """

    LEADER = "leader"
    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    PARTITIONED = "partitioned"


@dataclass(frozen=True, slots=True)
class Quorum:
    """
    Who is there, and how many must be.

    Attributes:
        required: So many distinct nodes must be members.
        members: Those that are, by node id.
    """

    required: int
    members: tuple[str, ...]

    @property
    def is_met(self) -> bool:
        """Whether there are enough."""
        return len(self.members) >= self.required


@dataclass(frozen=True, slots=True)
class LeaderState:
    """
    One process's view of an election, at one revision.

    Attributes:
        leader_id: The leader's node id (for a foreign client its lease); None: nobody leads, or, if the
            session can not confirm itself, nobody can tell.
        status: Where this process stands.
        term: The leader's; 0 if there is none.
        quorum: Who is a member, and how many must be.
    """

    leader_id: str | None
    status: LeaderStatus
    term: int
    quorum: Quorum


async def read_leader_state(candidacy: Candidacy, required: int) -> LeaderState:
    """See `Election.status`."""
    await trio.lowlevel.checkpoint_if_cancelled()
    session = candidacy.sessions.session
    if session is not None and session.status is SessionStatus.ALIVE:
        with session.tether():
            try:
                first, roll = await _read(session, candidacy)
            except UnavailableError:
                pass
            else:
                return _judge(candidacy, session, first, roll, required)
    return LeaderState(None, LeaderStatus.PARTITIONED, 0, Quorum(required, ()))


async def _read(session: Session, candidacy: Candidacy) -> tuple[KeyValue | None, tuple[KeyValue, ...]]:
    line = KeyRange.prefix(candidacy.keys.election_line(candidacy.name))
    members = KeyRange.prefix(candidacy.keys.member_line(candidacy.name))
    looks = (Range(line, sort_by=SortTarget.CREATE, keys_only=True, limit=1), Range(members))
    answer = await session.backend.txn(Txn(success=looks))
    line_found, members_found = map(found_in, answer.results)
    return line_found[0] if line_found else None, members_found


def _judge(
    candidacy: Candidacy,
    session: Session,
    first: KeyValue | None,
    members: tuple[KeyValue, ...],
    required: int,
) -> LeaderState:
    roll = Roll()
    roll.begin_anew(members)
    quorum = Quorum(required, tuple(member.node_id for member in roll.members))
    leader_id, term = None, 0
    if first is not None:
        lease = place_lease(first.key) or 0
        leader_id, term = roll.node_of(lease) or f"lease {lease:x}", first.create_revision
    if session.status is not SessionStatus.ALIVE or (required > 1 and not quorum.is_met):
        status = LeaderStatus.PARTITIONED
    elif any(leadership.is_held() and leadership.term == term for leadership in candidacy.leaderships):
        status = LeaderStatus.LEADER
    elif candidacy.campaigns and (first is None or place_lease(first.key) == session.lease.id):
        status = LeaderStatus.CANDIDATE
    else:
        status = LeaderStatus.FOLLOWER
    return LeaderState(leader_id, status, term, quorum)
