"""What lies in wait for topics: stale servers, restored stores, tasks that share, limits, and what is left to whom."""

from __future__ import annotations

import gc
import random

import pytest
import trio

from etcd_infra import (
    Delivery,
    InvalidRequestError,
    LockLostError,
    MessagesLostError,
    NotHeldError,
    Retention,
    SessionLostError,
)
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import DeleteRange, KeyRange, Txn
from etcd_infra._primitives import _trimmer
from etcd_infra._primitives.publish import MAX_MESSAGE_BYTES
from etcd_infra.testing import MemoryEtcd, ServerBug
from tests.conftest import NAMESPACE, open_infra
from tests.unit.test_topic import messages, trimmed_to
from tests.unit.test_topic_groups import both_kinds, bury, following, handled, keys_of, nothing_comes

KEYS = Keys(NAMESPACE).topic("orders")


@pytest.mark.parametrize("seed", range(20))
async def test_receipt_is_not_fooled_by_a_stale_server(autojump_clock, seed):
    """A read from before says neither that nobody is missing, nor keeps the wait waiting when all have acknowledged."""
    etcd = MemoryEtcd(bugs=[ServerBug.STALE_READ], random=random.Random(seed))
    async with open_infra(etcd.node("one"), seed=seed) as infra:
        topic = infra.topic("orders")
        async with topic.subscribe(group="g") as inbox:
            receipt = await topic.publish(1)
            with trio.move_on_after(10) as patience:
                await receipt.wait_acknowledged()
            assert patience.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receipt.wait_acknowledged)
                async with await following(inbox):
                    pass
                with trio.fail_after(60):
                    while nursery.child_tasks:
                        await trio.sleep(0.1)
            assert ("g",) == receipt.acknowledged_by


@both_kinds
async def test_restored_group_gets_what_its_cursor_has_not_passed(autojump_clock, infra, etcd, shared):
    """After a restore the group goes by the restored cursor: what it had acknowledged since comes again."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        for number in range(5):
            await topic.publish(number)
        await trio.sleep(1)
        backup = etcd.back_up()
        assert list(range(5)) == await handled(inbox, 5)
        etcd.restore(backup)
        await trio.sleep(60)
        await infra.topic("orders").publish("new")
        got = []
        while "new" not in got:
            try:
                got += await handled(inbox, 1)
            except MessagesLostError as error:
                assert error.after < error.up_to  # noqa: PT017 - where it comes depends on the kind
        assert [0, 1, 2, 3, 4, "new"] == got
        assert () == await topic.unacknowledged("g")


async def test_second_task_on_a_subscription_is_refused(autojump_clock, infra):
    """Two tasks that wait on one subscription would lose and double messages: the second one is told."""
    async with (
        infra.topic("orders").subscribe() as plain,
        infra.topic("orders").subscribe(group="g") as ordered,
    ):
        for inbox in (plain, ordered):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(anext, inbox)
                await trio.sleep(1)
                with pytest.raises(trio.BusyResourceError):
                    await anext(inbox)
                nursery.cancel_scope.cancel()
            assert await nothing_comes(inbox)


@both_kinds
async def test_settled_inside_its_transaction_writes_nothing_and_says_so(autojump_clock, infra, shared):
    """An `ack` inside `transaction()` acknowledges without the effects: that is an error, not a silence."""
    async with infra.topic("orders").subscribe(group="g", shared=shared) as inbox:
        await infra.topic("orders").publish(1)
        message = await following(inbox)
        with pytest.raises(NotHeldError, match="settled inside"):
            async with message.transaction() as tx:
                tx.set("x", 1)
                await message.ack()
        assert await infra.state.get("x") is None


@both_kinds
async def test_nack_ends_the_handler(autojump_clock, infra, shared):
    """A message that is given back inside its handler is not begun again before that handler has left."""
    running = []
    async with (
        infra.topic("orders").subscribe(group="g", shared=shared) as inbox,
        trio.open_nursery() as nursery,
    ):
        await infra.topic("orders").publish(1)

        async def handle(message):
            async with message:
                running.append(message.attempt)
                await message.nack()
                await trio.sleep(100)
            running.append(-message.attempt)

        nursery.start_soon(handle, await following(inbox))
        again = await following(inbox)
        assert [1, -1] == running
        await again.ack()


async def test_one_trimmer_per_topic_however_many_objects(autojump_clock, infra, etcd):
    """A topic object per message makes one offer to trim, not one per object; the retention told last counts."""
    for number in range(10):
        await infra.topic("orders", retention=Retention(count=100)).publish(number)
        gc.collect()
        await trio.sleep(1)
    assert 1 == len(keys_of(etcd, KEYS.trimmers))
    await infra.topic("orders", retention=Retention(count=2)).publish(10)
    await trimmed_to(etcd, 2)


async def test_ids_are_forgotten_by_the_next_trimmer(etcd, autojump_clock):
    """A trimmer that dies between deleting messages and forgetting their ids leaves that to the next one."""
    retention = Retention(age=10)
    async with open_infra(etcd.node("one"), seed=1) as one:
        await one.topic("orders").publish("nightly", message_id="job")
        marker = await one.backend.get(KEYS.marker("job"))
        await one.topic("orders", retention=retention).publish("starts the trimmer")
        await trimmed_to(etcd, 0)
        await trio.sleep(10)
    await etcd.node("as it was").put(marker.key, marker.value)
    async with open_infra(etcd.node("two"), seed=2) as two:
        await two.topic("orders", retention=retention).publish("starts the trimmer")
        await trio.sleep(30)
        assert not (await two.topic("orders").publish("nightly", message_id="job")).is_duplicate


@both_kinds
@pytest.mark.parametrize("from_zero", [False, True])
async def test_group_that_is_made_while_the_trimmer_looks(etcd, autojump_clock, monkeypatch, shared, from_zero):
    """A group that begins before what is about to be trimmed keeps it: the trimmer compares that none was made."""
    commit = _trimmer.commit
    made = []
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        receipts = [await one.topic("orders").publish(number) for number in range(6)]

        async def commit_later(*arguments):
            if not made:
                made.append(True)
                start = 0 if from_zero else receipts[0].revision
                async with two.topic("orders").subscribe(group="g", shared=shared, from_revision=start):
                    pass
            return await commit(*arguments)

        monkeypatch.setattr(_trimmer, "commit", commit_later)
        await one.topic("orders", retention=Retention(count=2)).publish(6)
        await trio.sleep(30)
        async with two.topic("orders").subscribe(group="g", shared=shared) as inbox:
            assert list(range(7)) == await handled(inbox, 7)


@both_kinds
async def test_largest_message_can_be_buried_and_replayed(autojump_clock, infra, shared):
    """Whatever can be published can become a dead letter, and be replayed; a larger one is refused at once."""
    topic = infra.topic("orders")
    with pytest.raises(InvalidRequestError):
        await topic.publish(bytes(MAX_MESSAGE_BYTES))
    async with topic.subscribe(group="g", shared=shared):
        pass
    await topic.publish(bytes(MAX_MESSAGE_BYTES - 1000))
    await bury(infra, topic, "g", shared=shared)
    [letter] = await topic.dead_letters("g")
    assert await topic.replay("g", letter)
    async with topic.subscribe(group="g", shared=shared) as inbox:
        assert [bytes(MAX_MESSAGE_BYTES - 1000)] == await handled(inbox, 1)
    assert () == await topic.dead_letters("g")


async def test_letter_whose_copy_was_trimmed_is_replayed_again(autojump_clock, infra, etcd):
    """A replayed letter whose copy is gone can be replayed once more."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g"):
        pass
    await topic.publish("x")
    await bury(infra, topic, "g", shared=False)
    [letter] = await topic.dead_letters("g")
    await topic.replay("g", letter)
    for name in keys_of(etcd, KEYS.messages):
        await etcd.node("trimmer").delete(KeyRange.one(KEYS.messages + name))
    await topic.replay("g", letter)
    async with topic.subscribe(group="g") as inbox:
        assert ["x"] == await handled(inbox, 1)


async def replayed(infra, topic, shared):
    """Bury a message of group g, and replay it."""
    async with topic.subscribe(group="g", shared=shared):
        pass
    await topic.publish("x")
    await bury(infra, topic, "g", shared=shared)
    [letter] = await topic.dead_letters("g")
    assert await topic.replay("g", letter)
    return letter


@both_kinds
async def test_trimmed_copy_of_a_letter_has_no_effect_beside_its_successor(autojump_clock, infra, etcd, shared):
    """A copy is trimmed in its handler's hands and replayed again: only one of the two takes effect."""
    topic = infra.topic("orders")
    letter = await replayed(infra, topic, shared)
    async with topic.subscribe(group="g", shared=shared) as inbox:
        first = await anext(inbox)
        with pytest.raises((NotHeldError, LockLostError)):
            async with first.transaction() as tx:
                tx.set("effect/first", True)
                for name in keys_of(etcd, KEYS.messages):
                    await etcd.node("trimmer").delete(KeyRange.one(KEYS.messages + name))
                assert await topic.replay("g", letter)
        second = await anext(inbox)
        assert first.revision < second.revision
        async with second.transaction() as tx:
            tx.set("effect/second", True)
        assert await nothing_comes(inbox, 60)
    assert None is await infra.state.get("effect/first")
    assert (await infra.state.get("effect/second")).value
    assert () == await topic.dead_letters("g")


@both_kinds
async def test_copy_of_a_discarded_letter_is_passed_over(autojump_clock, infra, shared):
    """A letter that is discarded after it was replayed is not delivered, and holds up nobody."""
    topic = infra.topic("orders")
    letter = await replayed(infra, topic, shared)
    assert await topic.discard("g", letter)
    await topic.publish("y")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        assert ["y"] == await handled(inbox, 1)
        assert await nothing_comes(inbox, 60)
    assert () == await topic.dead_letters("g")


async def test_quiet_sharing_group_moves_its_floor(autojump_clock, infra, etcd):
    """What a quiet group has acknowledged can be trimmed, however few messages that are."""
    topic = infra.topic("orders", retention=Retention(age=60))
    async with topic.subscribe(group="g", shared=True) as inbox:
        for number in range(5):
            await topic.publish(number)
        await handled(inbox, 5)
        assert await nothing_comes(inbox, 120)
        assert [] == messages(etcd)


async def test_many_that_wait_for_a_second_try_hold_up_nobody(autojump_clock, infra):
    """Hundreds of messages that were given back for an hour do not stop the others."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=True) as inbox:
        for number in range(300):
            await topic.publish(number)
        for _ in range(299):
            await (await following(inbox)).nack(delay=3600)
        assert [299] == await handled(inbox, 1)


async def test_delay_is_that_message_s_alone(etcd, autojump_clock):
    """A message that was given back for an hour, and that somebody else has handled, holds up no other one."""
    node = etcd.node("one")
    async with open_infra(node, seed=1, ttl=5) as one, open_infra(etcd.node("two"), seed=2, ttl=5) as two:
        topic = one.topic("orders")
        async with topic.subscribe(group="g") as inbox, trio.open_nursery() as nursery:
            await topic.publish(1)
            await (await following(inbox)).nack(delay=3600)

            async def take_over():
                async with two.topic("orders").subscribe(group="g") as second:
                    assert [1] == await handled(second, 1)
                node.heal()
                await trio.sleep(20)
                await two.topic("orders").publish(2)

            nursery.start_soon(take_over)
            node.partition()
            assert [2] == await handled(inbox, 1)


async def test_forgotten_message_expires_while_others_are_handled(autojump_clock, infra):
    """In a work-sharing group `ack_after` holds for a message in no scope also while there is other work."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=True, ack_after=5) as inbox:
        for number in range(50):
            await topic.publish(number)
        began = trio.current_time()
        assert 0 == (await following(inbox)).payload
        while True:
            async with await following(inbox) as message:
                if message.payload == 0:
                    break
                await trio.sleep(1)
        assert trio.current_time() - began < 10


async def test_closed_coordinator_ends_every_wait(etcd, autojump_clock):
    """Whoever waits for a message when the coordinator is closed is told."""
    told = []
    async with trio.open_nursery() as nursery:
        async with open_infra(etcd.node("one")) as infra:

            async def wait(task_status, **options):
                async with infra.topic("orders").subscribe(**options) as inbox:
                    task_status.started()
                    with pytest.raises(SessionLostError):
                        await anext(inbox)
                told.append(options)

            for options in ({}, {"group": "a"}, {"group": "b", "shared": True}):
                await nursery.start(lambda options=options, **status: wait(**status, **options))
            await trio.sleep(1)
        with trio.fail_after(60):
            while len(told) < 3:
                await trio.sleep(1)


async def test_message_that_was_never_begun_is_not_buried(etcd, autojump_clock):
    """Without retries a consumer that crashes after an acknowledgement costs the next message nothing."""
    node = etcd.node("one")
    async with open_infra(etcd.node("two"), seed=2, ttl=5) as two:
        topic = two.topic("orders")
        async with topic.subscribe(group="g"):
            pass
        await topic.publish(1)
        await topic.publish(2)
        with trio.CancelScope() as scope:
            async with open_infra(node, seed=1, ttl=5) as one:
                async with one.topic("orders").subscribe(group="g", max_retries=0) as inbox:
                    await (await following(inbox)).ack()
                    node.crash()
                    scope.cancel()
        async with topic.subscribe(group="g", max_retries=0) as inbox:
            assert [2] == await handled(inbox, 1)


@both_kinds
async def test_last_nack_under_a_lost_claim_is_a_loss(autojump_clock, infra, etcd, shared):
    """A message that was taken away can not be buried: `nack` says that it was lost, and somebody gets it again."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared, max_retries=0) as inbox:
        await topic.publish(1)
        message = await following(inbox)
        await etcd.txn(Txn(success=(DeleteRange(KeyRange.prefix(KEYS.claims("g"))),)))
        await etcd.txn(Txn(success=(DeleteRange(KeyRange.prefix(KEYS.consumers("g"))),)))
        with pytest.raises(LockLostError):
            await message.nack()


@both_kinds
async def test_at_most_once_with_a_transaction(autojump_clock, infra, shared):
    """A message that is acknowledged already has no transaction any more; it says so."""
    async with infra.topic("orders").subscribe(group="g", shared=shared) as inbox:
        await infra.topic("orders").publish(1, delivery=Delivery.AT_MOST_ONCE)
        message = await following(inbox)
        with pytest.raises(NotHeldError):
            async with message.transaction():
                pass
