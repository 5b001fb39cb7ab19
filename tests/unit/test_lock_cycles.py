"""Rings of tasks that wait for each other: found across all kinds of locks, and never where somebody gets on."""

from __future__ import annotations

from contextlib import asynccontextmanager

import trio

from etcd_infra import CycleInfo, Inspector
from tests.conftest import open_infra


class Nodes:
    """Tasks that take things in the order they are told to, and keep them."""

    def __init__(self, nursery, infras):
        self._nursery = nursery
        self._infras = infras

    async def take(self, node, *things):
        """Let a task of a node take one thing after the other; return when it holds or waits."""

        async def run():
            for thing in things:
                await thing(self._infras[node]).acquire()

        self._nursery.start_soon(run)
        await trio.sleep(1)


class Gate:
    """Something that every task gets, once it is open."""

    def __init__(self):
        self._open = trio.Event()

    def __call__(self, infra):
        return self

    async def acquire(self):
        """Wait until it is open."""
        await self._open.wait()

    def open(self):
        """Let all through."""
        self._open.set()


@asynccontextmanager
async def nodes(etcd):
    """Open some nodes; their tasks are cancelled at the end."""
    async with trio.open_nursery() as nursery:
        async with (
            open_infra(etcd.node("1"), seed=1) as one,
            open_infra(etcd.node("2"), seed=2) as two,
            open_infra(etcd.node("3"), seed=3) as three,
        ):
            yield Nodes(nursery, [one, two, three])
            nursery.cancel_scope.cancel()


def lock(name):
    return lambda infra: infra.lock(name)


def read(name):
    return lambda infra: infra.rwlock(name).read


def write(name):
    return lambda infra: infra.rwlock(name).write


def permit(name, permits):
    return lambda infra: infra.semaphore(name, permits)


async def cycles(etcd):
    """What the inspector finds; it writes nothing."""
    before = etcd.store.revision
    found = await Inspector(etcd, "test").inspect("cycles")
    assert before == etcd.store.revision
    return found


async def test_two_locks_in_opposite_order(etcd, autojump_clock):
    """One task holds a and waits for b, another holds b and waits for a: a ring of two, named once."""
    async with nodes(etcd) as each:
        await each.take(2, lock("a"))
        await each.take(2, lock("b"))
        await each.take(0, lock("c"), lock("d"), lock("a"))
        assert () == await cycles(etcd)
    async with nodes(etcd) as each:
        gate = Gate()
        await each.take(0, lock("a"), gate, lock("b"))
        await each.take(1, lock("b"), gate, lock("a"))
        assert () == await cycles(etcd)
        gate.open()
        await trio.sleep(1)
        (ring,) = await cycles(etcd)
        assert {("node-1", "lock b"), ("node-2", "lock a")} == set(zip(ring.nodes, ring.waits, strict=True))


async def test_tasks_of_one_node_are_told_apart(etcd, autojump_clock):
    """Other tasks of a node that holds something wait for something else: no ring, as each task gets on."""
    async with nodes(etcd) as each:
        await each.take(0, lock("a"))
        await each.take(1, lock("b"))
        await each.take(0, lock("b"))
        await each.take(1, lock("a"))
        assert () == await cycles(etcd)


async def test_ring_within_one_node(etcd, autojump_clock):
    """Two tasks of one process can wait for each other, too."""
    async with nodes(etcd) as each:
        gate = Gate()
        await each.take(0, lock("a"), gate, lock("b"))
        await each.take(0, lock("b"), gate, lock("a"))
        gate.open()
        await trio.sleep(1)
        (ring,) = await cycles(etcd)
        assert ("node-1", "node-1") == ring.nodes


async def test_ring_of_three_kinds(etcd, autojump_clock):
    """A lock, a read-write lock and the last permit of a semaphore; who waits behind the ring is not part of it."""
    async with nodes(etcd) as each:
        gate = Gate()
        await each.take(0, lock("a"), gate, write("b"))
        await each.take(1, read("b"), gate, permit("c", 1))
        await each.take(2, permit("c", 1), gate, lock("a"))
        gate.open()
        await trio.sleep(1)
        await each.take(0, lock("a"))
        (ring,) = await cycles(etcd)
        steps = set(zip(ring.nodes, ring.waits, strict=True))
        assert {("node-1", "rwlock b"), ("node-2", "semaphore c"), ("node-3", "lock a")} == steps


async def test_free_permit_breaks_the_ring(etcd, autojump_clock):
    """One of two holders of a semaphore gets on: whoever waits for a permit will have one."""
    async with nodes(etcd) as each:
        gate = Gate()
        await each.take(0, permit("c", 2), gate, lock("a"))
        await each.take(1, permit("c", 2))
        await each.take(2, lock("a"), gate, permit("c", 2))
        gate.open()
        await trio.sleep(1)
        assert () == await cycles(etcd)


async def test_readers_do_not_wait_for_readers(etcd, autojump_clock):
    """Two that read both, and one that waits to write: no ring; with a writer between them there is one."""
    async with nodes(etcd) as each:
        gate = Gate()
        await each.take(0, read("a"), gate, read("b"))
        await each.take(1, read("b"), gate, read("a"))
        await each.take(2, write("c"))
        gate.open()
        await trio.sleep(1)
        assert () == await cycles(etcd)
    async with nodes(etcd) as each:
        gate = Gate()
        await each.take(0, read("a"), gate, read("b"))
        await each.take(1, read("b"), gate, read("a"))
        await each.take(2, write("a"))
        await each.take(2, write("b"))
        gate.open()
        await trio.sleep(1)
        (ring,) = await cycles(etcd)
        assert {"rwlock a", "rwlock b"} == set(ring.waits)
        assert isinstance(ring, CycleInfo)


async def test_foreign_keys_are_waited_for_as_one(etcd, autojump_clock):
    """A client whose keys say nothing is known by its lease."""
    granted = await etcd.lease_grant(30, lease=0xABC)
    async with nodes(etcd) as each:
        gate = Gate()
        await each.take(0, lock("a"), gate, lock("b"))
        await etcd.put(b"test/lock/b/abc", b"", lease=granted.lease)
        await etcd.put(b"test/lock/a/abc", b"", lease=granted.lease)
        gate.open()
        await trio.sleep(1)
        (ring,) = await cycles(etcd)
        assert {"node-1", "lease abc"} == set(ring.nodes)
