"""The roll of a group: registrations as they are in etcd, and the distinct nodes that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from etcd_infra._etcd.keys import place_lease

if TYPE_CHECKING:
    from collections.abc import Iterable

    from etcd_infra._etcd.model import KeyValue


@dataclass(frozen=True, slots=True)
class Member:
    """
    One node, by its newest registration.

    Attributes:
        node_id: Its name; a group counts distinct ones.
        meta: What it says of itself.
        since: Unix seconds, by its own clock, when it registered.
        revision: The registration's create revision: a restarted node has a larger one.
    """

    node_id: str
    meta: dict[str, object]
    since: float
    revision: int


class _Value(msgspec.Struct):
    node: str
    since: float = 0.0
    meta: dict[str, object] = msgspec.field(default_factory=dict[str, object])


class Roll:
    """The registrations of one group; keys that are no registrations are passed over."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, Member] = {}

    def __len__(self) -> int:
        return len(self.node_ids)

    @property
    def node_ids(self) -> set[str]:
        """The distinct nodes."""
        return {member.node_id for member in self._by_key.values()}

    def begin_anew(self, kvs: Iterable[KeyValue]) -> None:
        """Forget everything but `kvs`."""
        self._by_key.clear()
        for kv in kvs:
            self.put(kv)

    def put(self, kv: KeyValue) -> Member | None:
        """Take in a registration; return whose it is, None if it is none."""
        try:
            value = msgspec.json.decode(kv.value, type=_Value)
        except msgspec.DecodeError:
            return None
        member = Member(value.node, value.meta, value.since, kv.create_revision)
        self._by_key[kv.key] = member
        return member

    def delete(self, key: bytes) -> Member | None:
        """Take in that a registration ended; return whose it was."""
        return self._by_key.pop(key, None)

    def get(self, node_id: str) -> Member | None:
        """Return a node by its newest registration."""
        return max(
            (member for member in self._by_key.values() if member.node_id == node_id),
            key=lambda member: member.revision,
            default=None,
        )

    def node_of(self, lease: int) -> str | None:
        """Return which node registered on a lease."""
        return next((member.node_id for key, member in self._by_key.items() if place_lease(key) == lease), None)

    def lease_of(self, member: Member) -> int:
        """Return the lease of a member's newest registration."""
        return next((place_lease(key) or 0 for key, known in self._by_key.items() if known is member), 0)

    @property
    def members(self) -> tuple[Member, ...]:
        """The distinct nodes, by node id."""
        newest = self._newest()
        return tuple(newest[node_id][1] for node_id in sorted(newest))

    def proof(self, node_id: str, count: int) -> tuple[tuple[bytes, int], ...]:
        """
        Return one registration (key, create revision) each of `count` nodes, `node_id` among them.

        Fewer, if there are not so many; none, if `node_id` has none.
        """
        newest = self._newest()
        if node_id not in newest:
            return ()
        others = sorted(other for other in newest if other != node_id)
        return tuple((newest[other][0], newest[other][1].revision) for other in (node_id, *others[: count - 1]))

    def _newest(self) -> dict[str, tuple[bytes, Member]]:
        newest: dict[str, tuple[bytes, Member]] = {}
        for key, member in self._by_key.items():
            known = newest.get(member.node_id)
            if known is None or known[1].revision < member.revision:
                newest[member.node_id] = (key, member)
        return newest
