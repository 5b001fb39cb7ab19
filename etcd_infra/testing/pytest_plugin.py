"""
Fixtures for pytest, there as soon as etcd-infra is installed: each gives a test an etcd of its own.

`etcd_infra_server` and `etcd_infra_cluster` run in containers if `ETCD_INFRA_TEST_IMAGE` names an image, and
otherwise with the program that `find_etcd` finds; a test that asks for one where neither is at hand is
skipped. `etcd_infra_coordinator` takes such a server, and `MemoryEtcd` where there is none. The asynchronous
ones need pytest-trio, and a Trio test.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from etcd_infra.coordinator import Coordinator
    from etcd_infra.testing.cluster import EtcdCluster
    from etcd_infra.testing.container import EtcdContainer, EtcdContainerCluster
    from etcd_infra.testing.server import EtcdServer

# What takes time to import is imported by who needs it: pytest loads this module in every run.


@pytest.fixture
def etcd_infra_memory() -> object:
    """A `MemoryEtcd`, empty."""
    from etcd_infra.testing import MemoryEtcd

    return MemoryEtcd()


@pytest.fixture
def etcd_infra_server() -> Iterator[EtcdServer | EtcdContainer]:
    """A server with an empty store: its `endpoint` is where it answers."""
    import trio

    if _image() is not None:
        from etcd_infra.testing.container import EtcdContainer

        with EtcdContainer() as container:
            yield container
        return
    from etcd_infra.testing import EtcdServer

    _need_a_program()
    # In a Trio run of its own, so that it serves every kind of test: it holds nothing that belongs to a run.
    server = EtcdServer()
    trio.run(server.__aenter__)
    yield server
    server.reap()


@pytest.fixture
async def etcd_infra_cluster() -> AsyncIterator[EtcdCluster | EtcdContainerCluster]:
    """A cluster of three members with an empty store: `endpoints` is where they answer."""
    if _image() is not None:
        from etcd_infra.testing.container import EtcdContainerCluster

        async with EtcdContainerCluster(3) as containers:
            yield containers
        return
    from etcd_infra.testing import EtcdCluster

    _need_a_program()
    async with EtcdCluster(3) as cluster:
        yield cluster


@pytest.fixture
def _etcd_infra_any(request: pytest.FixtureRequest) -> object:  # pyright: ignore[reportUnusedFunction]
    from etcd_infra.testing import MemoryEtcd, find_etcd

    has_server = _image() is not None or find_etcd() is not None
    return request.getfixturevalue("etcd_infra_server").endpoint if has_server else MemoryEtcd()


@pytest.fixture
async def etcd_infra_coordinator(_etcd_infra_any: Any) -> AsyncIterator[Coordinator]:
    """A coordinator in the namespace "test": on a server of its own, or in memory where none is at hand."""
    from etcd_infra import open_coordinator

    async with open_coordinator(_etcd_infra_any, namespace="test") as infra:
        yield infra


def _image() -> str | None:
    return os.environ.get("ETCD_INFRA_TEST_IMAGE") or None


def _need_a_program() -> None:
    from etcd_infra.testing import find_etcd

    if find_etcd() is None:
        pytest.skip("no etcd at hand: set ETCD_INFRA_TEST_IMAGE or install etcd-infra[server]")
