"""The intents of prepared two-phase transactions, as every writer of state sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.model import KeyRange, Range

if TYPE_CHECKING:
    from etcd_infra._etcd.model import KeyValue
    from etcd_infra._session.session import Session


async def wait_resolved(session: Session, intent: KeyValue) -> None:
    """
    Wait until the transaction that left `intent` is decided and the intent gone.

    Cancellation:
        Leaves nothing behind.
    """
    while (await session.backend.range(Range(KeyRange.one(intent.key), keys_only=True))).kvs:  # noqa: ASYNC110
        await trio.sleep(0.1)
