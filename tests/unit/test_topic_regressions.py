"""What simulated topics once did wrong, each as a story of its own."""

from __future__ import annotations

from contextlib import suppress
from random import Random

import pytest
import trio

from etcd_infra import (
    AckTimeoutError,
    ConflictError,
    LockLostError,
    MessagesLostError,
    NotHeldError,
    Retention,
    StorageFullError,
)
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import DeleteRange, KeyRange, KeyValue, Put, RangeResult, Txn
from etcd_infra._etcd.wrapping import Wrapping
from etcd_infra._primitives import _feed, _message_names, _shared_group
from etcd_infra._primitives._envelope import Position
from etcd_infra._primitives._feed import Feed
from etcd_infra._primitives._reader import Reader
from etcd_infra._primitives._trimmer import Trimmer
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import NAMESPACE, open_infra
from tests.unit.test_topic_groups import both_kinds, following, keys_of, nothing_comes

KEYS = Keys(NAMESPACE).topic("orders")


async def trimmed_to(etcd, count):
    """Wait until so many messages are left."""
    with trio.fail_after(120):
        while len(keys_of(etcd, KEYS.messages)) > count:
            await trio.sleep(1)


async def test_list_that_is_newer_than_the_watch_is_read_once(etcd, autojump_clock, infra):
    """What a reader has listed before the watch tells of it is not delivered again, and nothing goes back."""
    topic, node = infra.topic("orders"), etcd.node("two")
    receipts = [await topic.publish(number) for number in range(3)]
    feed = Feed(node, KEYS, Random(1))
    feed._begin_anew(receipts[0].revision)
    reader = Reader(feed, Position(0))
    assert [one.revision for one in receipts] == [(await reader.next()).position.revision for _ in range(3)]

    async with (
        node.watch(feed.messages, start_revision=receipts[1].revision) as stream,
        trio.open_nursery() as nursery,
    ):
        found = []

        async def read():
            found.append((await reader.next()).position.revision)

        nursery.start_soon(read)
        await trio.sleep(1)
        while feed.get(1) is None:
            feed._take(await stream.receive())
        last = await topic.publish(3)
        while feed.get(2) is None:
            feed._take(await stream.receive())
    assert [last.revision] == found


async def test_list_that_takes_long_is_not_stale(autojump_clock, infra, etcd, monkeypatch):
    """While a long topic is listed page by page others publish on: that is no stale read, and no restored store."""
    monkeypatch.setattr(_message_names, "NAMES_TOGETHER", 50)
    monkeypatch.setattr(_feed, "RING_MESSAGES", 1)
    topic, backend = infra.topic("orders"), Slow(etcd.node("two"))
    for number in range(10):
        await topic.publish(number)
    heard = []

    async def publish():
        for number in range(10, 600):
            await topic.publish(number)
            await trio.sleep(0.05)

    async with (
        trio.open_nursery() as nursery,
        open_infra(backend, seed=2) as other,
        other.topic("orders").subscribe(from_revision=0) as inbox,
    ):
        nursery.start_soon(publish)
        while len(heard) < 600:
            heard.append((await following(inbox)).payload)
    assert list(range(600)) == heard


class Slow(Wrapping):
    """Reads take a moment."""

    async def around(self, verb, request, call):
        """See `Wrapping`."""
        if verb == "range":
            await trio.sleep(1)
        return await call()


async def test_reader_follows_a_restored_store(etcd, autojump_clock):
    """Whoever still reads what the old store's watch had told is told of the restore once, and hears what follows."""
    async with open_infra(etcd.node("one")) as infra, infra.topic("orders").subscribe() as inbox:
        backup = etcd.back_up()
        for number in range(200):
            await infra.topic("orders").publish(number)
        heard = []

        async def listen():
            while True:
                try:
                    heard.append((await anext(inbox)).payload)
                except MessagesLostError:
                    heard.append("lost")
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await trio.sleep(0.1)
            etcd.restore(backup)
            await trio.sleep(30)
            await infra.topic("orders").publish("after")
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
    assert ["lost", "after"] == heard[-2:]
    assert 1 == heard.count("lost")


async def test_wiped_store_has_no_group(etcd, autojump_clock):
    """A consumer that shares work in a store that was wiped is told that its group is gone, not left to wait."""
    async with open_infra(etcd.node("one")) as infra:
        topic = infra.topic("orders")
        empty = etcd.back_up()
        for number in range(20):
            await topic.publish(number)
        async with topic.subscribe(group="g", shared=True) as inbox:
            etcd.restore(empty)
            # Which comes first, the gap or the group's end, depends on which watch hears of it first.
            with pytest.raises((MessagesLostError, ConflictError)):
                await following(inbox)
            with pytest.raises(ConflictError):
                await following(inbox)
        async with topic.subscribe(group="g", shared=True) as inbox:
            await topic.publish("x")
            async with await following(inbox) as message:
                assert "x" == message.payload


@both_kinds
async def test_group_from_the_start_is_told_what_it_missed(etcd, autojump_clock, shared):
    """A group that was made for the oldest message there is hears of what was published and trimmed since."""
    async with open_infra(etcd.node("one")) as infra:
        topic = infra.topic("orders", retention=Retention(count=1, unacknowledged=True))
        async with topic.subscribe(group="g", shared=shared, from_revision=0):
            pass
        for number in range(4):
            await topic.publish(number)
        await trimmed_to(etcd, 1)
        async with infra.topic("orders").subscribe(group="g", shared=shared) as inbox:
            with pytest.raises(MessagesLostError):
                await following(inbox)
            async with await following(inbox) as message:
                assert 3 == message.payload


async def test_trimmed_before_the_group_is_no_loss(etcd, autojump_clock, infra):
    """A group that begins with the oldest message there is misses nothing of what was trimmed before it."""
    topic = infra.topic("orders", retention=Retention(count=1))
    for number in range(4):
        await topic.publish(number)
    await trimmed_to(etcd, 1)
    async with topic.subscribe(group="g", from_revision=0) as inbox, await following(inbox) as message:
        assert 3 == message.payload


async def test_what_was_done_without_us_is_not_claimed(etcd, autojump_clock):
    """A message that another consumer acknowledges while this one waits for a session is not delivered again."""
    backend = FaultyBackend(etcd.node("one"))
    async with (
        open_infra(backend, seed=1, ttl=5) as one,
        open_infra(etcd.node("two"), seed=2) as two,
        one.topic("orders").subscribe(group="g", shared=True) as inbox,
        trio.open_nursery() as nursery,
    ):
        handed = []

        async def consume():
            async for message in inbox:
                handed.append(message.payload)
                await message.ack()

        nursery.start_soon(consume)
        backend.only = lambda verb, _: verb == "lease_grant"
        for _ in range(100):
            backend.refuse_next()
        await two.backend.lease_revoke(one.session.lease.id)
        await trio.sleep(2)
        await two.topic("orders").publish("x")
        await trio.sleep(1)
        async with two.topic("orders").subscribe(group="g", shared=True) as other:
            async with await following(other) as message:
                assert "x" == message.payload
            await trio.sleep(1)
            backend.stop()
            await trio.sleep(60)
        assert [] == handed
        nursery.cancel_scope.cancel()


@both_kinds
async def test_acknowledgement_that_takes_long_is_waited_for(etcd, autojump_clock, shared):
    """While an acknowledgement is on its way its message is not delivered again, though its time is over."""
    backend = FaultyBackend(etcd.node("one"))
    async with (
        open_infra(backend) as infra,
        infra.topic("orders").subscribe(group="g", shared=shared, ack_after=1.0) as inbox,
        trio.open_nursery() as nursery,
    ):
        await infra.topic("orders").publish("x")
        message = await following(inbox)
        await trio.sleep(0.9)
        backend.delay_next(1.0)
        nursery.start_soon(message.ack)
        await trio.lowlevel.checkpoint()
        assert await nothing_comes(inbox)


@both_kinds
async def test_acknowledgement_that_was_refused(etcd, autojump_clock, shared):
    """A message whose acknowledgement etcd has refused is delivered again, before those after it in an ordered group."""
    async with (
        open_infra(etcd.node("one")) as infra,
        infra.topic("orders").subscribe(group="g", shared=shared, ack_after=5.0) as inbox,
    ):
        for number in range(2):
            await infra.topic("orders").publish(number)
        message = await following(inbox)
        etcd.store.full = True
        with pytest.raises(StorageFullError):
            await message.ack()
        etcd.store.full = False
        found = []
        for _ in range(2):
            async with await following(inbox) as after:
                found.append((after.payload, after.attempt))
        assert ([(1, 1), (0, 2)] if shared else [(0, 2), (1, 1)]) == found


@both_kinds
async def test_giving_back_that_takes_long_is_waited_for(etcd, autojump_clock, shared):
    """The next message is not begun before the one before it is a dead letter, whoever waits for it."""
    backend = FaultyBackend(etcd.node("one"))
    async with (
        open_infra(backend) as infra,
        infra.topic("orders").subscribe(group="g", shared=shared, max_retries=0) as inbox,
        trio.open_nursery() as nursery,
    ):
        topic = infra.topic("orders")
        for number in range(2):
            await topic.publish(number)
        message = await following(inbox)
        backend.delay_next(1.0)
        nursery.start_soon(message.nack)
        await trio.lowlevel.checkpoint()
        async with await following(inbox) as after:
            assert (1, 1) == (after.payload, after.attempt)
        assert await nothing_comes(inbox)
        assert [0] == [letter.message.payload for letter in await topic.dead_letters("g")]


async def test_effects_of_what_was_acknowledged_before_are_refused(etcd, autojump_clock):
    """Effects are never dropped in silence: what was acknowledged without them can not be handled by a transaction."""
    backend = FaultyBackend(etcd.node("one"))
    async with (
        open_infra(backend) as infra,
        infra.topic("orders").subscribe(group="g") as inbox,
    ):
        await infra.topic("orders").publish("x")
        message = await following(inbox)
        backend.delay_next_answer(5.0)
        with trio.move_on_after(1):
            await message.ack()
        with pytest.raises(NotHeldError):
            async with message.transaction() as tx:
                tx.set("effect", 1)
        assert await infra.state.get("effect") is None


@both_kinds
async def test_handler_ends_with_its_subscription(autojump_clock, infra, shared):
    """A handler that outlives its subscription is cancelled, told so, and its message is delivered again."""
    topic = infra.topic("orders")
    caught = []

    async def handle(message):
        with pytest.raises(NotHeldError) as found:
            async with message.transaction() as tx:
                tx.set("effect", "first")
                await trio.sleep(10)
        caught.append(found)

    async with trio.open_nursery() as nursery:
        async with topic.subscribe(group="g", shared=shared) as inbox:
            await topic.publish("x")
            nursery.start_soon(handle, await following(inbox))
            await trio.sleep(1)
    assert 1 == len(caught)
    assert await infra.state.get("effect") is None
    async with topic.subscribe(group="g", shared=shared) as inbox, await following(inbox) as again:
        assert ("x", 2) == (again.payload, again.attempt)


async def test_cancelled_subscription_leaves_the_line(autojump_clock, infra, etcd):
    """A subscription that is cancelled while a handler runs elsewhere keeps nobody waiting behind it."""
    topic = infra.topic("orders")

    async def handle(message):
        with trio.CancelScope(shield=True), pytest.raises(NotHeldError):
            async with message:
                with trio.CancelScope(shield=True):
                    await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with topic.subscribe(group="g") as inbox:
                await topic.publish("x")
                nursery.start_soon(handle, await following(inbox))
                await trio.sleep(0.1)
                scope.cancel()
                await trio.sleep(100)
    assert [] == keys_of(etcd, KEYS.consumers("g"))


async def test_claim_that_a_stranger_puts_back_does_not_stay(autojump_clock, infra, etcd):
    """A claim that was deleted and put back under our lease is nobody's: the message is delivered again."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=True, ack_after=1000) as inbox:
        await topic.publish("x")
        message = await following(inbox)
        [found] = [kv for kv in etcd.store.snapshot().kvs if kv.key.startswith(KEYS.claims("g"))]
        operator = etcd.node("operator")
        with pytest.raises(LockLostError):
            async with message:
                await operator.txn(Txn(success=(DeleteRange(KeyRange.one(found.key)),)))
                await operator.txn(Txn(success=(Put(found.key, found.value, lease=found.lease),)))
                await trio.sleep(500)
        async with await following(inbox) as again:
            assert ("x", 2) == (again.payload, again.attempt)
    assert [] == keys_of(etcd, KEYS.claims("g"))


async def test_progress_of_trimmed_messages_goes(autojump_clock, infra, etcd, monkeypatch):
    """How often a message was tried is forgotten after it was trimmed: no key is left of it."""
    monkeypatch.setattr(_shared_group, "FLOOR_STEP", 1)
    topic = infra.topic("orders", retention=Retention(count=1, unacknowledged=True))
    async with topic.subscribe(group="g", shared=True) as inbox:
        await topic.publish("first")
        message = await following(inbox)
        await topic.publish("second")
        await trimmed_to(etcd, 1)
        await message.nack()
        found = []
        for _ in range(2):
            try:
                async with await following(inbox) as after:
                    found.append(after.payload)
            except MessagesLostError:
                found.append("lost")
        assert ["lost", "second"] == found
        await topic.publish("third")
        async with await following(inbox):
            pass
    assert [] == keys_of(etcd, KEYS.progress("g", ""))


async def test_cut_revision_waits_for_the_rest_of_its_chunk(autojump_clock, infra):
    """Of a revision that the end of a chunk cuts nothing goes while a group still needs what comes before it."""
    trimmer = Trimmer(infra.topic("orders")._space, "orders", KEYS, Retention(count=1))
    kvs = tuple(
        KeyValue(KEYS.message(f"{at:016x}-x"), b"", create_revision=revision)
        for at, revision in enumerate((48, 45))
    )
    assert [] == trimmer._spent(RangeResult(kvs, 9, more=True, revision=99), Position(46))
    alone = RangeResult(kvs[1:], 9, more=True, revision=99)
    assert [Position(45, f"{1:016x}-x")] == trimmer._spent(alone, Position(46))


async def test_reading_ahead_goes_on_after_a_loss(autojump_clock, infra, etcd, monkeypatch):
    """A consumer that was full of messages which are gone reads on, and gets those that are there."""
    monkeypatch.setattr(_shared_group, "WAITING", 1)
    topic = infra.topic("orders", retention=Retention(count=2, unacknowledged=True))
    async with topic.subscribe(group="g", shared=True) as inbox:
        for number in range(6):
            await topic.publish(number)
        await trimmed_to(etcd, 2)
        found = []
        while 5 not in found:
            try:
                async with await following(inbox) as message:
                    found.append(message.payload)
            except MessagesLostError:
                found.append("lost")
    assert [4, 5] == found[-2:]
    assert "lost" in found


async def test_duplicate_is_told_by_the_refusal_itself(etcd, autojump_clock):
    """Whether an id was known, and where, is read in the Txn that would have published: not later, in one round trip."""
    backend = RecordingBackend(etcd.node("one"))
    async with open_infra(backend) as infra:
        topic = infra.topic("orders")
        first = await topic.publish("x", message_id="id")
        backend.calls.clear()
        again = await topic.publish("y", message_id="id")
        assert (True, first.revision) == (again.is_duplicate, again.revision)
        assert 1 == len([call for call in backend.calls if call.verb in {"txn", "range"}])


@both_kinds
async def test_late_acknowledgement_or_dead_letter(etcd, autojump_clock, shared):
    """An acknowledgement that arrives when its message is being buried acknowledges it, or it is dead: never both."""
    for seconds in (0.2, 0.6, 1.0, 1.4, 2.0):
        backend = FaultyBackend(etcd.node("one"))
        async with (
            open_infra(backend, namespace=f"test-{seconds}") as infra,
            infra.topic("orders").subscribe(group="g", shared=shared, ack_after=1.0, max_retries=0) as inbox,
        ):
            await infra.topic("orders").publish("x")
            with suppress(AckTimeoutError, LockLostError):
                async with (await following(inbox)).transaction() as tx:
                    tx.set("effect", 1)
                    await trio.sleep(0.5)
                    backend.apply_next_late(seconds)
            assert await nothing_comes(inbox)
            effect = await infra.state.get("effect")
            assert (effect is None) == bool(await infra.topic("orders").dead_letters("g"))


@both_kinds
async def test_dead_letter_is_behind_its_group(autojump_clock, infra, shared):
    """What became a dead letter needs to be delivered no more, neither here nor to the next consumer."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared, max_retries=0) as inbox:
        await topic.publish("x")
        await (await following(inbox)).nack()
        assert () == await topic.unacknowledged("g")
        assert await nothing_comes(inbox)
    async with topic.subscribe(group="g", shared=shared, max_retries=0) as inbox:
        assert await nothing_comes(inbox)


async def test_acknowledged_is_not_buried(etcd, autojump_clock):
    """A message that was acknowledged by a call that was given up is no dead letter when its time is over."""
    backend = FaultyBackend(etcd.node("one"))
    async with (
        open_infra(backend) as infra,
        infra.topic("orders").subscribe(group="g", ack_after=5.0, max_retries=0) as inbox,
    ):
        await infra.topic("orders").publish("x")
        message = await following(inbox)
        backend.delay_next_answer(3.0)
        with trio.move_on_after(1):
            await message.ack()
        assert await nothing_comes(inbox, 20)
        assert () == await infra.topic("orders").dead_letters("g")


# ── what each comparison is for ─────────────────────────────────────────────────────────────────


async def test_place_that_is_lost_on_the_way_acknowledges_nothing(etcd, autojump_clock):
    """An acknowledgement that arrives after its consumer's place in line was deleted is refused."""
    backend, operator = FaultyBackend(etcd.node("one")), etcd.node("operator")
    async with (
        open_infra(backend) as infra,
        infra.topic("orders").subscribe(group="g") as inbox,
        trio.open_nursery() as nursery,
    ):
        await infra.topic("orders").publish("x")
        message = await following(inbox)
        before = await operator.get(KEYS.cursor("g"))
        backend.delay_next(2.0)

        async def acknowledge():
            with pytest.raises(LockLostError):
                await message.ack()

        nursery.start_soon(acknowledge)
        await trio.sleep(1)
        [name] = keys_of(etcd, KEYS.consumers("g"))
        await operator.txn(Txn(success=(DeleteRange(KeyRange.one(KEYS.consumers("g") + name)),)))
        await trio.sleep(5)
        assert before == await operator.get(KEYS.cursor("g"))


async def test_acknowledgement_leaves_another_group_of_the_name_alone(etcd, autojump_clock):
    """Whoever handles a message while its group is deleted and made anew does not move the new one's cursor."""
    async with (
        open_infra(etcd.node("one"), seed=1) as one,
        open_infra(etcd.node("two"), seed=2) as two,
        one.topic("orders").subscribe(group="g") as inbox,
    ):
        await one.topic("orders").publish("x")
        message = await following(inbox)
        await two.topic("orders").delete_group("g")
        async with two.topic("orders").subscribe(group="g"):
            pass
        before = await two.backend.get(KEYS.cursor("g"))
        with suppress(ConflictError, NotHeldError):
            await message.ack()
        assert before == await two.backend.get(KEYS.cursor("g"))


@pytest.mark.parametrize("step", [1, 64], ids=["below the floor", "done"])
async def test_what_was_done_unseen_is_not_claimed(etcd, autojump_clock, monkeypatch, step):
    """A consumer that did not hear of a message's end is refused its claim, by its progress or by the floor."""
    monkeypatch.setattr(_shared_group, "FLOOR_STEP", step)
    async with (
        open_infra(etcd.node("one"), seed=1) as one,
        open_infra(etcd.node("two"), seed=2) as two,
        one.topic("orders").subscribe(group="g", shared=True) as deaf,
        two.topic("orders").subscribe(group="g", shared=True) as inbox,
    ):
        monkeypatch.setattr(deaf._view, "see", lambda _kv: None)
        monkeypatch.setattr(deaf._view, "saw", lambda _event: None)
        await one.topic("orders").publish("x")
        async with await following(inbox) as message:
            assert "x" == message.payload
        if step == 1:
            await one.topic("orders").publish("y")
            async with await following(inbox):
                pass
            assert [] != keys_of(etcd, KEYS.progress("g", ""))
            await trio.sleep(1)
        monkeypatch.undo()
        assert await nothing_comes(deaf)


@both_kinds
async def test_handler_publishes_with_its_effects(autojump_clock, infra, shared):
    """What a handler publishes through its transaction is published at the revision of its effects, or not at all."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox, infra.topic("echo").subscribe() as echoes:
        await topic.publish("x")
        with suppress(ZeroDivisionError):
            async with (await following(inbox)).transaction() as tx:
                tx.publish("echo", "never")
                raise ZeroDivisionError
        async with (await following(inbox)).transaction() as tx:
            tx.set("effect", 1)
            tx.publish("echo", "once")
        echo = await following(echoes)
        entry = await infra.state.get("effect")
        assert ("once", entry.version) == (echo.payload, echo.revision)


async def test_list_is_in_the_order_of_revisions(etcd, autojump_clock):
    """Messages are listed as they were committed, whatever their publishers' clocks say."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        clock = one.topic("orders")._space.clock
        for number in range(6):
            # Names begin with the time: those of one publisher are an hour ahead.
            node = (one, two)[number % 2]
            names = node.topic("orders")._space.names
            names.next(clock.wall() + (3600 if node is one else 0))
            await node.topic("orders").publish(number)
        async with two.topic("orders").subscribe(from_revision=0) as inbox:
            assert list(range(6)) == [(await following(inbox)).payload for _ in range(6)]
