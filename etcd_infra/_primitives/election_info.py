"""What elections and groups say of themselves: who leads, who waits, who is there. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from etcd_infra._etcd.keys import place_lease
from etcd_infra._etcd.model import KeyRange, KeyValue, Range, SortTarget
from etcd_infra._primitives._roll import Roll

if TYPE_CHECKING:
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys


@dataclass(frozen=True, slots=True)
class ElectionInfo:
    """
    One election, as its line was at one revision.

    Attributes:
        name: The election.
        leader: Node id of the leader; for a foreign client its lease; None if nobody leads.
        term: The leader's; None if nobody leads.
        proposal: The leader's latest; what is no UTF-8 is escaped.
        queue: Who waits, next in line first.
        ttl: Whole seconds left of the leader's lease, as the server says; None if nobody leads.
        members: The nodes that count towards a quorum.
    """

    name: str
    leader: str | None = None
    term: int | None = None
    proposal: str | None = None
    queue: tuple[str, ...] = ()
    ttl: int | None = None
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """
    One member of a group, by its newest registration.

    Attributes:
        group: The group, or the election.
        node_id: Its name.
        meta: What it says of itself, as JSON.
        ttl: Whole seconds left of its lease, as the server says.
        registered_at: Unix seconds, by its own clock.
    """

    group: str
    node_id: str
    meta: str
    ttl: int
    registered_at: float


async def inspect_elections(backend: Backend, keys: Keys, name: str | None = None) -> tuple[ElectionInfo, ...]:
    """Describe every election that somebody leads, or one; three round trips, and one per election."""
    prefix = keys.elections if name is None else keys.election_line(name)
    everything = Range(KeyRange.prefix(prefix), sort_by=SortTarget.CREATE)
    lines: dict[str, list[KeyValue]] = {} if name is None else {name: []}
    for kv in (await backend.range(everything)).kvs:
        election = keys.parse_election(kv.key)
        if election is not None:
            lines.setdefault(election, []).append(kv)
    groups = await _groups(backend, keys)
    found = [
        await _describe(backend, election, line, groups.get(election, Roll()))
        for election, line in sorted(lines.items())
    ]
    return tuple(found)


async def inspect_members(backend: Backend, keys: Keys, name: str | None = None) -> tuple[MemberInfo, ...]:
    """Describe the members of every group, or of one; one round trip, and one per member."""
    infos: list[MemberInfo] = []
    for group, roll in sorted((await _groups(backend, keys)).items()):
        if name not in {None, group}:
            continue
        for member in roll.members:
            ttl = (await backend.lease_time_to_live(roll.lease_of(member))).ttl
            meta = msgspec.json.encode(member.meta, order="sorted").decode()
            infos.append(MemberInfo(group, member.node_id, meta, ttl, member.since))
    return tuple(infos)


async def _groups(backend: Backend, keys: Keys) -> dict[str, Roll]:
    groups: dict[str, Roll] = {}
    for kv in (await backend.range(Range(KeyRange.prefix(keys.members)))).kvs:
        group = keys.parse_member(kv.key)
        if group is not None:
            groups.setdefault(group, Roll()).put(kv)
    return groups


async def _describe(backend: Backend, name: str, line: list[KeyValue], roll: Roll) -> ElectionInfo:
    members = tuple(member.node_id for member in roll.members)
    if not line:
        return ElectionInfo(name, members=members)
    nodes = [_node_id(kv, roll) for kv in line]
    leader = line[0]
    return ElectionInfo(
        name,
        leader=nodes[0],
        term=leader.create_revision,
        proposal=leader.value.decode(errors="backslashreplace"),
        queue=tuple(nodes[1:]),
        ttl=(await backend.lease_time_to_live(leader.lease)).ttl if leader.lease else None,
        members=members,
    )


def _node_id(kv: KeyValue, roll: Roll) -> str:
    lease = kv.lease or place_lease(kv.key) or 0
    return roll.node_of(lease) or f"lease {lease:x}"
