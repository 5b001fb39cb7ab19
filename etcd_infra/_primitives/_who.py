"""Who stands at a place in a line of locks: what its value says. For people, and never a guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from etcd_infra._etcd.keys import place_lease

if TYPE_CHECKING:
    from collections.abc import Iterable

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._session.session import Session


class Who(msgspec.Struct, frozen=True):
    """
    Who stands at a place.

    Attributes:
        node: Node id; for a foreign client its lease.
        since: Unix seconds, by its own clock, when it joined.
        task: Names the task, among all of all processes; what a task of a foreign client does is its lease's.
    """

    node: str
    since: float | None = None
    task: str = ""


def running_task(session: Session) -> Who:
    """Say who the running task is."""
    return Who(session.node_id, session.clock.wall(), f"{session.lease.id:x}-{session.number_of_task()}")


def introduce(session: Session) -> bytes:
    """Render who the running task is."""
    return msgspec.json.encode(running_task(session))


def who_is(kv: KeyValue) -> Who:
    """Read who stands at a place."""
    lease = f"lease {kv.lease or place_lease(kv.key) or 0:x}"
    try:
        who = msgspec.json.decode(kv.value, type=Who)
    except msgspec.DecodeError:  # etcdctl's and Go's values are empty
        return Who(lease, None, lease)
    return who if who.task else Who(who.node, who.since, lease)


async def least_ttl(backend: Backend, kvs: Iterable[KeyValue]) -> int | None:
    """Ask for the whole seconds left of the leases of some keys, the least of them; a round trip per lease."""
    leases = sorted({kv.lease for kv in kvs if kv.lease})
    return min([(await backend.lease_time_to_live(lease)).ttl for lease in leases], default=None)
