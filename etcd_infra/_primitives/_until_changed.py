"""Waiting for the first change of what was read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra.errors import CompactedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.model import KeyRange


async def wait_changed(backend: Backend, watched: Sequence[tuple[KeyRange, int]]) -> None:
    """
    Wait until one of the ranges changes after its revision, or nobody can tell any more whether it did.

    Raises:
        EtcdError: etcd refuses a watch.

    Cancellation:
        Leaves nothing behind.

    Round trips:
        One watch per range.
    """
    changed = trio.Event()

    async def wait_one(wanted: KeyRange, revision: int) -> None:
        try:
            async with backend.watch(wanted, start_revision=revision + 1) as stream:
                async for batch in stream:
                    if batch.events:
                        break
        except CompactedError:
            pass
        changed.set()

    async with open_background() as background:
        for wanted, revision in watched:
            background.start_soon(wait_one, wanted, revision)
        await changed.wait()
