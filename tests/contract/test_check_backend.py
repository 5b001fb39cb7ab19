"""The conformance kit for implementers, on every etcd."""

from __future__ import annotations

import pytest

from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra.testing import MemoryEtcd, check_backend


async def test_every_backend_conforms(world):
    """Every backend passes the kit, twice on one store, and the kit leaves nothing behind."""
    await check_backend(world.backend)
    await check_backend(world.backend, prefix=world.prefix)
    everything = await world.backend.range(Range(KeyRange.everything(), count_only=True))
    assert (0, ()) == (everything.count, await world.backend.lease_list())


async def test_failure_names_the_fact(autojump_clock):
    """A fact that does not hold is reported by its sentence."""
    with pytest.raises(AssertionError, match="A key lives as long as its lease"):
        await check_backend(MemoryEtcd(min_ttl=60))
