"""Fixtures that every group of tests uses."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio

from etcd_infra.coordinator import open_coordinator
from etcd_infra.testing import MemoryEtcd

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._etcd.backend import Backend
    from etcd_infra.coordinator import Coordinator

NAMESPACE = "test"


def open_infra(
    backend: Backend, *, seed: int = 1, **options: object
) -> AbstractAsyncContextManager[Coordinator]:
    """Open a coordinator that depends on nothing but Trio's clock and a seed."""
    settings: dict[str, object] = {
        "namespace": NAMESPACE,
        "random": random.Random(seed),
        "boot_clock": trio.current_time,
        "node_id": f"node-{seed}",
    }
    return open_coordinator(backend, **(settings | options))  # type: ignore[arg-type]


@pytest.fixture
def etcd() -> MemoryEtcd:
    """Make a fresh in-memory etcd."""
    return MemoryEtcd()


@pytest.fixture
async def infra(etcd, autojump_clock):
    """Open a coordinator on the in-memory etcd, under a clock that jumps."""
    async with open_infra(etcd.node("one")) as opened:
        yield opened
