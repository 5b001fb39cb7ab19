"""One suite, every etcd: the in-memory one, and each real server that can be found, over gRPC."""

from __future__ import annotations

import os
import secrets
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import trio
from trio.testing import MockClock

from etcd_infra._backends.opening import open_etcd
from etcd_infra._etcd.model import KeyRange
from etcd_infra.errors import LeaseNotFoundError
from etcd_infra.testing import EtcdServer, MemoryEtcd, find_etcd
from tests.contract.world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


class Target(NamedTuple):
    """An etcd under test: a program, or "memory"; and the road to it."""

    program: str
    transport: str = ""


MEMORY = Target("memory")


def _binaries() -> list[str]:
    """`ETCD_INFRA_TEST_ETCDS` names programs, separated by colons; otherwise the one at hand, if any."""
    if named := os.environ.get("ETCD_INFRA_TEST_ETCDS"):
        return named.split(":")
    found = find_etcd()
    return [str(found)] if found else []


def run_jumping(fn, *, clock, instruments):
    """Run a test under a clock that jumps over every wait: nothing real is waited for in memory."""
    assert clock is None
    return trio.run(fn, clock=MockClock(autojump_threshold=0), instruments=instruments)


def real_targets() -> list[object]:
    """List the programs at hand, each by every road, as parameters of the fixture `target`."""
    binaries = _binaries()
    names = [Path(binary).name if len(binaries) == 1 else binary for binary in binaries]
    seldom = [pytest.mark.real, pytest.mark.slow]
    roads = (("http2", [pytest.mark.real]), ("grpcio", seldom), ("gateway", seldom))
    real = [
        pytest.param(Target(binary, road), id=f"{name}-{road}", marks=marks)
        for binary, name in zip(binaries, names, strict=True)
        for road, marks in roads
    ]
    missing = pytest.param(Target(""), id="etcd", marks=pytest.mark.skip(reason="no etcd program here"))
    return real or [missing]


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, EtcdServer]]:
    """Keep one running server per program, started when it is first needed."""
    running: dict[str, EtcdServer] = {}
    yield running
    for server in running.values():
        trio.run(server.__aexit__, None, None, None)


@pytest.fixture(
    params=[pytest.param(MEMORY, id="memory", marks=pytest.mark.trio(run=run_jumping)), *real_targets()]
)
def target(request) -> Target:
    """Name the etcd under test, and the road to it."""
    return request.param


@pytest.fixture
def server(target, servers) -> EtcdServer | None:
    """Return the real server of this target, shared with other tests."""
    if target == MEMORY:
        return None
    program = target.program
    if program not in servers:
        # Started in a Trio run of its own: a server holds nothing that belongs to a run.
        server = EtcdServer(program)
        trio.run(server.__aenter__)
        servers[program] = server
    return servers[program]


@pytest.fixture
async def world(server, target) -> AsyncIterator[World]:
    """Open a backend, and give the test a part of the key space and no lease of others."""
    if server is None:
        yield _in_memory()
        return
    async with _connected(server, target.transport) as opened:
        yield opened
        await _clean(opened)


@pytest.fixture
async def fresh(target) -> AsyncIterator[World]:
    """Give the test an etcd of its own, whose store is empty."""
    if target == MEMORY:
        yield _in_memory()
        return
    async with over_network(target) as opened:
        yield opened


@asynccontextmanager
async def over_network(target: Target, *arguments: str) -> AsyncIterator[World]:
    """Start a server of one's own, and connect to it."""
    async with (
        EtcdServer(target.program, extra_args=arguments) as server,
        _connected(server, target.transport) as opened,
    ):
        yield opened


def _in_memory() -> World:
    etcd = MemoryEtcd()
    return World(etcd, b"test/", store=etcd.store)


@asynccontextmanager
async def _connected(server: EtcdServer, transport: str) -> AsyncIterator[World]:
    version = tuple(int(part) for part in server.version.split("."))
    async with open_etcd(server.endpoint, transport=transport) as backend:
        yield World(backend, b"test-%s/" % secrets.token_hex(4).encode(), version)


async def _clean(world: World) -> None:
    # A lease left behind would delete its keys, and so make a revision, in the middle of another test.
    for lease in await world.backend.lease_list():
        with suppress(LeaseNotFoundError):
            await world.backend.lease_revoke(lease)
    await world.backend.delete(KeyRange.everything())
