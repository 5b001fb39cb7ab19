"""Who owned a lock before: replayed from etcd's history, as far as it goes."""

from __future__ import annotations

import trio

from etcd_infra import Inspector
from tests.conftest import open_infra


def told(history):
    """Holder and turn of each tenure."""
    return [(tenure.holder, tenure.from_revision, tenure.to_revision) for tenure in history.tenures]


async def test_owners_are_told_in_the_order_of_their_turns(etcd, infra, autojump_clock):
    """Each owner with its token, when its turn came, and when it ended; who gave up waiting owned nothing."""
    lock = infra.lock("job")
    async with open_infra(etcd.node("two"), seed=2) as two:
        holds = []

        async def wait():
            holds.append(await two.lock("job").acquire())

        async with trio.open_nursery() as nursery:
            async with lock as first:
                with trio.move_on_after(1):
                    await two.lock("job").acquire()
                nursery.start_soon(wait)
                await trio.sleep(1)
            handed_over = etcd.store.revision
        await holds[0].release()
        released = etcd.store.revision
        async with lock as last:
            before = etcd.store.revision
            history = await lock.history()
            assert before == etcd.store.revision
    assert 1 == history.since_revision
    assert [
        ("node-1", first.token, handed_over),
        ("node-2", handed_over, released),
        ("node-1", last.token, None),
    ] == told(history)
    assert [first.token, holds[0].token, last.token] == [tenure.token for tenure in history.tenures]
    assert holds[0].token < handed_over


async def test_history_begins_where_compaction_left_off(etcd, infra, autojump_clock):
    """What is compacted is not made up: who owned the lock then is told from there on."""
    lock = infra.lock("job")
    async with lock:
        pass
    async with lock as hold:
        await etcd.put(b"other", b"")
        compacted = etcd.store.revision
        await etcd.compact(compacted)
    history = await lock.history()
    assert compacted == history.since_revision
    assert [("node-1", compacted, etcd.store.revision)] == told(history)
    assert [hold.token] == [tenure.token for tenure in history.tenures]


async def test_history_of_a_lock_that_nobody_ever_took(etcd, autojump_clock):
    """No tenures; and the inspector needs no session for it."""
    history = await Inspector(etcd, "test").lock_history("nobody/ever")
    assert ("nobody/ever", ()) == (history.name, history.tenures)


async def test_long_history_is_complete(etcd, infra, autojump_clock):
    """1,200 owners: more than etcd sends in one piece."""
    lock = infra.lock("job")
    tokens = []
    for _ in range(1200):
        async with lock as hold:
            tokens.append(hold.token)
    history = await lock.history()
    assert tokens == [tenure.token for tenure in history.tenures]
