"""What the records say of two-phase transactions. Needs no session, and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra._primitives._record import Record

if TYPE_CHECKING:
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys
    from etcd_infra._primitives.operations import TransactionStatus


@dataclass(frozen=True, slots=True)
class TransactionInfo:
    """
    One two-phase transaction that was prepared and has not ended yet.

    Attributes:
        transaction_id: Its name.
        status: PREPARED, or for a moment the verdict.
        node_id: Node id of who began it.
        keys: The state keys that it keeps.
        ttl: Whole seconds left of its lease, as the server says.
        began_at: Unix seconds, by its beginner's clock.
    """

    transaction_id: str
    status: TransactionStatus
    node_id: str
    keys: tuple[str, ...]
    ttl: int
    began_at: float


async def inspect_transactions(backend: Backend, keys: Keys) -> tuple[TransactionInfo, ...]:
    """Describe every record, oldest first; one round trip, and one per record."""
    found = await backend.range(Range(KeyRange.prefix(keys.transactions)))
    infos: list[TransactionInfo] = []
    for kv in sorted(found.kvs, key=lambda kv: kv.create_revision):
        record = Record.parse(kv)
        if record is None:
            continue
        name = kv.key.removeprefix(keys.transactions).decode(errors="backslashreplace")
        ttl = (await backend.lease_time_to_live(kv.lease)).ttl
        infos.append(TransactionInfo(name, record.status, record.node, record.keys, ttl, record.since))
    return tuple(infos)
