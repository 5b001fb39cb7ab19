"""The janitor: jobs outlast outages, and its patrol deletes nothing that changed while it looked."""

from __future__ import annotations

import trio

from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange
from etcd_infra.testing import FaultyBackend
from tests.conftest import NAMESPACE, open_infra

KEYS = Keys(NAMESPACE)
STRAY = KEYS.lock_line("job") + b"stray"


def reads_of_the_stray(verb, request):
    return verb == "range" and request.range == KeyRange.one(STRAY)


async def test_stray_key_is_deleted_at_its_second_sight(etcd, autojump_clock):
    """A key on the lease that nobody here knows is there after one patrol, and gone after the next."""
    async with open_infra(etcd.node("one"), ttl=30) as infra:
        await etcd.put(STRAY, b"", lease=infra.session.lease.id)
        await trio.sleep(10.5)
        assert await etcd.get(STRAY) is not None
        await trio.sleep(10)
        assert await etcd.get(STRAY) is None


async def test_key_that_becomes_known_while_it_is_read_stays(etcd, autojump_clock):
    """Between the list and the deletion the key becomes somebody's here: it is not deleted."""
    slow = FaultyBackend(etcd.node("one"))
    slow.only = reads_of_the_stray
    async with open_infra(slow, ttl=30) as infra:
        await etcd.put(STRAY, b"", lease=infra.session.lease.id)
        slow.delay_next(1)
        await trio.sleep(20.5)
        assert 1 == slow.struck
        infra.session.janitor.known_keys.add(STRAY)
        await trio.sleep(30)
        assert await etcd.get(STRAY) is not None


async def test_key_that_is_made_anew_while_it_is_read_stays(etcd, autojump_clock):
    """Between the read and the deletion the key is deleted and created: the new one outlives this patrol."""
    slow = FaultyBackend(etcd.node("one"))
    slow.only = reads_of_the_stray
    async with open_infra(slow, ttl=30) as infra:
        await etcd.put(STRAY, b"old", lease=infra.session.lease.id)
        slow.delay_next_answer(1)
        await trio.sleep(20.5)
        assert 1 == slow.struck
        await etcd.delete(KeyRange.one(STRAY))
        await etcd.put(STRAY, b"new", lease=infra.session.lease.id)
        await trio.sleep(1)
        assert b"new" == (await etcd.get(STRAY)).value


async def test_job_is_repeated_over_a_long_outage(etcd, autojump_clock):
    """A release in a partition of 30 s is done three seconds after the partition's end."""
    node = etcd.node("one")
    async with open_infra(node, ttl=60) as infra:
        session = infra.session
        hold = await infra.lock("job").acquire()
        node.partition()
        with trio.fail_after(2.5):
            await hold.release()
        await trio.sleep(30)
        key = hold.fence.proof[0].range.key
        assert await etcd.get(key) is not None
        node.heal()
        await trio.sleep(3)
        assert await etcd.get(key) is None
        assert session is infra.session
        session.check()
