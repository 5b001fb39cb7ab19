"""The conformance kit for implementers, on every etcd."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from etcd_infra._etcd.model import KeyRange, Range
from etcd_infra._wrappers.observed import Observed
from etcd_infra._wrappers.retrying import Retrying
from etcd_infra.testing import MemoryEtcd, check_backend

if TYPE_CHECKING:
    from etcd_infra._etcd.calls import Call


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


async def test_wrappers_keep_the_semantics(autojump_clock):
    """What a coordinator puts around a backend changes no answer, and every kind of call passes through it."""
    calls: list[Call] = []
    etcd = MemoryEtcd()
    await check_backend(Observed(Retrying(etcd, Random(1)), calls.append))
    assert {
        "range",
        "txn",
        "watch",
        "compact",
        "lease_grant",
        "lease_keep_alive",
        "lease_revoke",
        "lease_time_to_live",
        "lease_list",
    } <= {call.verb for call in calls}
    assert ((), ()) == (etcd.store.snapshot().kvs, etcd.store.snapshot().leases)
