"""The session key and the grant before it: answers in any order, leases that are gone or somebody else's."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra._etcd.model import KeyRange, KeyValue, RangeResult
from etcd_infra._session.clock import Clock
from etcd_infra._session.granting import grant
from etcd_infra._session.keepalive import SessionStatus
from etcd_infra.errors import SessionLostError
from etcd_infra.testing import FaultyBackend
from tests.conftest import open_infra


async def test_older_answer_does_not_kill_a_newer_generation(etcd, autojump_clock):
    """An answer from before the key was written, which showed no key, comes late and changes nothing."""
    async with open_infra(etcd.node("one")) as infra:
        own_key = infra.session.own_key
        generation = own_key.generation
        assert not own_key.saw(RangeResult(()), generation - 1)
        assert generation == own_key.generation
        assert own_key.saw(RangeResult(()), generation + 1)
        assert 0 == own_key.generation


async def test_older_answer_does_not_bring_an_older_generation_back(etcd, autojump_clock):
    """An answer that shows an older generation comes after a newer one: the newer one stays."""
    async with open_infra(etcd.node("one")) as infra:
        own_key = infra.session.own_key
        generation = own_key.generation
        older = RangeResult((KeyValue(own_key.key, mod_revision=generation),))
        own_key.wrote(generation + 5)
        assert not own_key.saw(older, generation + 1)
        assert generation + 5 == own_key.generation


async def test_deleted_session_key_is_written_anew(etcd, autojump_clock):
    """Somebody deletes the session key: the next lock writes it again, on the lease, and is granted."""
    async with open_infra(etcd.node("one")) as infra:
        session = infra.session
        await etcd.delete(KeyRange.one(session.own_key.key))
        async with infra.lock("job"):
            found = await etcd.get(session.own_key.key)
            assert session.lease.id == found.lease
            assert found.mod_revision == session.own_key.generation


async def test_lease_that_is_gone_at_the_key_s_write_loses_the_session(etcd, autojump_clock):
    """The lease was revoked, and a lock needs the session key: the session is lost at once."""
    async with open_infra(etcd.node("one"), ttl=60) as infra:
        session = infra.session
        await etcd.lease_revoke(session.lease.id)
        began = trio.current_time()
        with pytest.raises(SessionLostError, match="does not exist any more"):
            await infra.lock("job").acquire()
        assert began == trio.current_time()
        assert SessionStatus.LOST is session.status


async def test_grant_cancelled_before_its_answer_leaves_no_lease(etcd, autojump_clock):
    """A grant was applied and is cancelled before its answer comes: the lease is revoked."""
    slow = FaultyBackend(etcd.node("one"))
    slow.delay_next_answer(1)
    with trio.move_on_after(0.5) as scope:
        async with open_infra(slow):
            pytest.fail("opened")
    assert scope.cancelled_caught
    assert 1 == slow.struck
    assert () == await etcd.lease_list()


@pytest.mark.parametrize("refused", [False, True])
async def test_lease_of_a_stranger_is_not_adopted(etcd, autojump_clock, refused):
    """The id that was drawn is somebody else's, be the first copy refused unsent or not: another is drawn."""
    taken = random.Random(1).getrandbits(63)
    await etcd.lease_grant(600, lease=taken)
    faulty = FaultyBackend(etcd.node("one"))
    if refused:
        faulty.refuse_next()
    lease = await grant(faulty, Clock(trio.current_time), random.Random(1), ttl=10)
    assert taken != lease.id
    assert 10 == lease.ttl
    assert {taken, lease.id} == set(await etcd.lease_list())
