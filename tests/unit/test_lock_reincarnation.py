"""A lock's key that is deleted and made anew by other hands is another key, whatever its name."""

from __future__ import annotations

import pytest
import trio

from etcd_infra import LockLostError
from etcd_infra._etcd.model import KeyRange, Put, Range, Txn
from tests.conftest import NAMESPACE, open_infra

LINE = Range(KeyRange.prefix(f"{NAMESPACE}/lock/job/".encode()))


async def made_anew(etcd, hold):
    """Delete a hold's key and create it again, on the same lease, with the same name and the same value."""
    key = hold.fence.proof[0].range.key
    before = await etcd.get(key)
    await etcd.delete(KeyRange.one(key))
    created = await etcd.put(key, before.value, lease=before.lease)
    return key, created


async def test_fence_refuses_a_key_that_was_made_anew(etcd, autojump_clock):
    """A fenced write is refused after the key was made anew: it exists, its version is the same, it is not mine."""
    async with open_infra(etcd.node("one")) as infra:
        hold = await infra.lock("job").acquire()
        await made_anew(etcd, hold)
        write = Txn(hold.fence.proof, (Put(b"data", b"stale"),))
        assert not (await infra.backend.txn(write)).succeeded
        assert None is await etcd.get(b"data")
        with pytest.raises(LockLostError):
            await hold.release()


async def test_release_spares_a_key_that_was_made_anew(etcd, autojump_clock):
    """Giving back what was lost deletes nobody's key, though it has the name of mine."""
    async with open_infra(etcd.node("one")) as infra:
        hold = await infra.lock("job").acquire()
        key, created = await made_anew(etcd, hold)
        with pytest.raises(LockLostError):
            await hold.release()
        assert created == (await etcd.get(key)).create_revision


async def test_waiter_whose_key_is_deleted_does_not_wait_for_the_holder(etcd, autojump_clock):
    """A waiter's key is deleted while the holder stays: the call ends within a second."""
    async with open_infra(etcd.node("one")) as one, open_infra(etcd.node("two"), seed=2) as two:
        hold = await one.lock("job").acquire()
        deleted_at = []

        async def meddle() -> None:
            await trio.sleep(5)
            (waiter,) = [kv for kv in (await etcd.range(LINE)).kvs if kv.create_revision > hold.token]
            deleted_at.append(trio.current_time())
            await etcd.delete(KeyRange.one(waiter.key))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(meddle)
            with pytest.raises(LockLostError):
                await two.lock("job").acquire()
        assert trio.current_time() - deleted_at[0] < 1
        hold.check()
