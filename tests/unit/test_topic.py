"""Topics: what is published reaches whoever listens, in order, once; or they are told."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

import pytest
import trio

from etcd_infra import (
    CodecError,
    Delivery,
    FencedError,
    Increment,
    InvalidRequestError,
    MessagesLostError,
    Publish,
    Retention,
    Set,
)
from etcd_infra._etcd.keys import Keys
from etcd_infra._primitives import _feed, _reader
from etcd_infra._primitives._envelope import Names, Position, time_of
from etcd_infra.testing import FaultyBackend, MemoryEtcd, RecordingBackend
from tests.conftest import NAMESPACE, open_infra

KEYS = Keys(NAMESPACE).topic("orders")


@dataclass
class Order:
    """A payload."""

    number: int


def messages(etcd):
    """List the names of the messages that are stored, in order."""
    return [kv.key for kv in etcd.store.snapshot().kvs if kv.key.startswith(KEYS.messages)]


async def take(iterator, count):
    """Return the payloads of the next messages."""
    with trio.fail_after(60):
        return [(await anext(iterator)).payload for _ in range(count)]


async def nothing_comes(iterator):
    """Return whether nothing comes for a while."""
    with trio.move_on_after(5) as patience:
        await anext(iterator)
    return patience.cancelled_caught


# ── publishing ──────────────────────────────────────────────────────────────────────────────────


async def test_message_carries_what_its_publisher_knew(autojump_clock, infra):
    """Topic, payload, publisher, time, id, place in the order, mode: all of it arrives."""
    topic = infra.topic("orders", type=Order)
    async with topic.subscribe() as inbox:
        receipt = await topic.publish(Order(7), message_id="seven", delivery=Delivery.EXACTLY_ONCE)
        message = await anext(inbox)
    assert ("orders", Order(7), "node-1", "seven") == (
        message.topic,
        message.payload,
        message.publisher_id,
        message.message_id,
    )
    assert (receipt.revision, 0, Delivery.EXACTLY_ONCE, 1) == (
        message.revision,
        message.index,
        message.delivery,
        message.attempt,
    )
    assert abs(trio.current_time() - message.published_at) < 1


@pytest.mark.parametrize("delivery", Delivery)
async def test_message_survives_without_subscribers(autojump_clock, infra, delivery):
    """What is published while nobody listens is there for whoever asks from that revision on (probe D1)."""
    topic = infra.topic("orders")
    receipt = await topic.publish("early", delivery=delivery)
    async with topic.subscribe(from_revision=receipt.revision) as inbox:
        assert ["early"] == await take(inbox, 1)


async def test_publishing_takes_one_round_trip(etcd, autojump_clock):
    """One Txn per message, and no read."""
    backend = RecordingBackend(etcd.node("one"))
    async with open_infra(backend) as infra:
        topic = infra.topic("orders")
        backend.calls.clear()
        for number in range(3):
            await topic.publish(number)
        assert ["txn"] * 3 == [call.verb for call in backend.calls]


async def test_id_is_published_once(autojump_clock, infra, etcd):
    """A second message of an id is not stored; its receipt names the first one."""
    topic = infra.topic("orders")
    first = await topic.publish("a", message_id="id")
    second = await topic.publish("b", message_id="id")
    assert (False, True) == (first.is_duplicate, second.is_duplicate)
    assert first.revision == second.revision
    assert 1 == len(messages(etcd))


@pytest.mark.parametrize("fault", ["lose_next_answer", "lose_next_request", "refuse_next", "late"])
@pytest.mark.parametrize("message_id", [None, "id"])
async def test_publish_is_applied_once_under_faults(etcd, autojump_clock, fault, message_id):
    """A lost answer is found out: one message, and the receipt has its revision."""
    backend = FaultyBackend(etcd.node("one"))
    async with open_infra(backend) as infra:
        topic = infra.topic("orders")
        if fault == "late":
            backend.apply_next_late(3.0)
        else:
            getattr(backend, fault)()
        receipt = await topic.publish("x", message_id=message_id)
        await trio.sleep(10)
        [kv] = [kv for kv in etcd.store.snapshot().kvs if kv.key.startswith(KEYS.messages)]
        assert (kv.create_revision, False) == (receipt.revision, receipt.is_duplicate)


async def test_fenced_publish(autojump_clock, infra):
    """With a fence nothing is published once its hold has ended."""
    topic = infra.topic("orders")
    async with infra.lock("job") as hold:
        await topic.publish(1, fence=hold.fence)
    with pytest.raises(FencedError):
        await topic.publish(2, fence=hold.fence)
    async with topic.subscribe(from_revision=0) as inbox:
        assert [1] == await take(inbox, 1)
        assert await nothing_comes(inbox)


async def test_raw_payloads(autojump_clock, infra):
    """Bytes arrive as bytes, with and without a type."""
    raw = b"\xff\n\x00"
    async with (
        infra.topic("orders").subscribe() as inbox,
        infra.topic("orders", type=bytes).subscribe() as typed,
    ):
        await infra.topic("orders").publish(raw)
        assert [raw] == await take(inbox, 1)
        assert [raw] == await take(typed, 1)


async def test_state_and_event_in_one_commit(autojump_clock, infra, etcd):
    """`execute` with `Publish`: the event has the revision of the change, and comes in the operations' order."""
    topic = infra.topic("orders")
    async with topic.subscribe() as inbox:
        done = await infra.execute(
            [Set("a", 1), Publish("orders", "one"), Increment("n"), Publish("orders", "two", message_id="2")]
        )
        both = [await anext(inbox), await anext(inbox)]
    assert [("one", 0), ("two", 1)] == [(one.payload, one.index) for one in both]
    assert {done.revision} == {one.revision for one in both} | {(await infra.state.get("a")).version}
    assert [True] * 4 == [one.success for one in done.results]


async def test_known_id_drops_only_the_message(autojump_clock, infra, etcd):
    """In a transaction an id that is known drops its message, and the rest is committed."""
    await infra.topic("orders").publish("first", message_id="id")
    done = await infra.execute([Set("a", 1), Publish("orders", "again", message_id="id")])
    assert [True, False] == [one.success for one in done.results]
    assert 1 == len(messages(etcd))
    assert 1 == (await infra.state.get("a")).value


@pytest.mark.parametrize("known", [False, True])
async def test_lost_answer_of_a_transaction_with_an_id(etcd, autojump_clock, known):
    """Whether the message was new is found out, although the answer was lost."""
    backend = FaultyBackend(etcd.node("one"))
    async with open_infra(backend) as infra:
        if known:
            await infra.topic("orders").publish("first", message_id="id")
        backend.lose_next_answer()
        done = await infra.execute([Set("a", 1), Publish("orders", "x", message_id="id")])
        assert [True, not known] == [one.success for one in done.results]


async def test_conflict_publishes_nothing(autojump_clock, infra, etcd):
    """`transact` publishes with its commit, once, though the function ran twice."""
    runs = []

    async def function(tx):
        runs.append(await tx.get("a"))
        if len(runs) == 1:
            await infra.state.set("a", 1)
        tx.publish("orders", len(runs))

    async with infra.topic("orders").subscribe() as inbox:
        await infra.transact(function)
        assert [2] == await take(inbox, 1)
    assert 1 == len(messages(etcd))


async def test_two_phase_publishes_at_its_commit(autojump_clock, infra, etcd):
    """A prepared transaction's message is there after the commit, and never after a rollback."""
    async with infra.begin() as tx:
        tx.add(Set("a", 1))
        tx.add(Publish("orders", "committed"))
        await tx.prepare()
        assert [] == messages(etcd)
        done = await tx.commit()
    async with infra.begin() as tx:
        tx.add(Publish("orders", "rolled back", message_id="never"))
        await tx.prepare()
    async with infra.topic("orders").subscribe(from_revision=done.revision) as inbox:
        assert ["committed"] == await take(inbox, 1)
        assert await nothing_comes(inbox)


# ── order ───────────────────────────────────────────────────────────────────────────────────────


def test_names_grow_though_the_clock_goes_back():
    """A publisher's names never repeat and never go back; they tell the time."""
    names = Names(random.Random(5))
    made = [names.next(now) for now in (100.0, 100.0, 3.0, 200.5, 200.5)]
    assert sorted(set(made)) == made
    assert (100.0, 100.0, 200.5) == (time_of(made[0]), time_of(made[2]), time_of(made[3]))
    assert 0.0 == time_of("by hand")


@pytest.mark.parametrize("ring", [2, 4096])
async def test_many_messages_of_one_revision_come_in_their_order(autojump_clock, infra, monkeypatch, ring):
    """30 messages of one Txn come in the order in which they were published, from the watch and from a list."""
    monkeypatch.setattr(_feed, "RING_MESSAGES", ring)
    async with infra.topic("orders").subscribe() as inbox:
        await infra.execute([Publish("orders", number) for number in range(30)])
        await trio.sleep(1)
        with trio.fail_after(60):
            found = [await anext(inbox) for _ in range(30)]
    assert [(number, number) for number in range(30)] == [(one.payload, one.index) for one in found]


async def test_two_publishers_have_one_order(etcd, autojump_clock):
    """Whoever listens, live or later, sees the same order: that of revisions."""
    async with (
        open_infra(etcd.node("one"), seed=1) as one,
        open_infra(etcd.node("two"), seed=2) as two,
        two.topic("orders").subscribe() as live,
    ):
        async with trio.open_nursery() as nursery:
            for infra in (one, two):
                for number in range(20):
                    nursery.start_soon(partial(infra.topic("orders").publish, number))
        seen = [await anext(live) for _ in range(40)]
        async with one.topic("orders").subscribe(from_revision=0) as later:
            again = [await anext(later) for _ in range(40)]
    places = [(message.revision, message.index) for message in seen]
    assert sorted(set(places)) == places
    assert [message.message_id for message in seen] == [message.message_id for message in again]


# ── subscribing ─────────────────────────────────────────────────────────────────────────────────


async def test_subscription_begins_now(etcd, autojump_clock):
    """What was confirmed before a subscription was entered does not come, whoever follows the topic already."""
    async with open_infra(etcd.node("one")) as infra, infra.topic("orders").subscribe():
        for number in range(20):
            await infra.topic("orders").publish(number)
            async with infra.topic("orders").subscribe() as inbox:
                await infra.topic("orders").publish("new")
                assert ["new"] == await take(inbox, 1)


async def test_subscriptions_share_one_watch(etcd, autojump_clock):
    """A hundred subscriptions of a process are one watch, each gets everything, and nothing is left afterwards."""
    async with open_infra(etcd.node("one")) as infra:
        before = etcd.open_watches
        topic = infra.topic("orders")
        async with trio.open_nursery() as nursery:
            got = []

            async def listen(task_status):
                async with infra.topic("orders").subscribe() as inbox:
                    task_status.started()
                    got.append(await take(inbox, 3))

            for _ in range(100):
                await nursery.start(listen)
            assert before + 1 == etcd.open_watches
            for number in range(3):
                await topic.publish(number)
        assert [[0, 1, 2]] * 100 == got
        assert before == etcd.open_watches


async def test_leaving_one_subscription_leaves_the_other(autojump_clock, infra):
    """Two subscriptions of a topic: the end of one is not the end of the other (probe D14)."""
    topic = infra.topic("orders")
    async with topic.subscribe() as stays:
        async with topic.subscribe() as goes:
            await topic.publish(1)
            assert [1] == await take(goes, 1)
        await topic.publish(2)
        assert [1, 2] == await take(stays, 2)


@pytest.mark.parametrize(("ring", "listed", "fetched"), [(3, 4096, 32), (3, 5, 2), (4096, 4096, 32)])
async def test_slow_subscriber_loses_nothing(autojump_clock, infra, monkeypatch, ring, listed, fetched):
    """A subscriber that does not keep up gets everything, and costs no memory beyond the ring (probes D18, D19)."""
    monkeypatch.setattr(_feed, "RING_MESSAGES", ring)
    monkeypatch.setattr(_reader, "LISTED_TOGETHER", listed)
    monkeypatch.setattr(_reader, "FETCHED_TOGETHER", fetched)
    topic = infra.topic("orders")
    async with topic.subscribe() as slow, topic.subscribe() as fast:
        for number in range(100):
            await topic.publish(number)
            assert [number] == await take(fast, 1)
        assert list(range(50)) == await take(slow, 50)
        for number in range(100, 110):
            await topic.publish(number)
        assert list(range(50, 110)) == await take(slow, 60)


async def test_slow_subscriber_does_not_hold_up_others(autojump_clock, infra):
    """While one subscriber sleeps, another one gets its messages (probe D16: none starves the next)."""
    topic = infra.topic("orders")
    async with topic.subscribe() as asleep, topic.subscribe() as awake:
        for number in range(5000):
            await topic.publish(number)
            await anext(awake)
        assert [0, 1] == await take(asleep, 2)


async def test_compaction_while_cut_off_loses_nothing(etcd, autojump_clock):
    """History that is compacted while a process is cut off is no gap: the messages are still there."""
    node = etcd.node("two")
    async with (
        open_infra(etcd.node("one"), seed=1) as one,
        open_infra(node, seed=2, ttl=600) as two,
        two.topic("orders").subscribe() as inbox,
    ):
        await one.topic("orders").publish("before")
        assert ["before"] == await take(inbox, 1)
        node.partition()
        for number in range(10):
            await one.topic("orders").publish(number)
        await one.backend.compact(etcd.store.revision)
        await trio.sleep(60)
        node.heal()
        assert list(range(10)) == await take(inbox, 10)


async def test_restored_store_is_told(etcd, autojump_clock):
    """A store that went back is no silent gap: the subscription says so once, and goes on."""
    async with open_infra(etcd.node("one")) as infra, infra.topic("orders").subscribe() as inbox:
        backup = etcd.back_up()
        for number in range(5):
            await infra.topic("orders").publish(number)
        assert list(range(5)) == await take(inbox, 5)
        etcd.restore(backup)
        with pytest.raises(MessagesLostError), trio.fail_after(60):
            await anext(inbox)
        await infra.topic("orders").publish("after")
        assert ["after"] == await take(inbox, 1)


async def test_cancelled_wait_loses_nothing(autojump_clock, infra):
    """A subscriber may be cancelled while it waits, as often as it likes."""
    topic = infra.topic("orders")
    async with topic.subscribe() as inbox, trio.open_nursery() as nursery:

        async def publish():
            for number in range(50):
                await topic.publish(number)
                await trio.sleep(0.3)

        nursery.start_soon(publish)
        got = []
        while len(got) < 50:
            with trio.move_on_after(0.1):
                got.append((await anext(inbox)).payload)
        assert list(range(50)) == got


async def test_payload_that_does_not_decode_is_told(autojump_clock, infra):
    """A payload of another type is an error of its own; the next message comes after it."""
    async with infra.topic("orders", type=Order).subscribe() as inbox:
        await infra.topic("orders").publish("no order")
        await infra.topic("orders").publish(Order(1))
        with pytest.raises(CodecError, match="Order"):
            await anext(inbox)
        assert [Order(1)] == await take(inbox, 1)


async def test_foreign_key_among_the_messages_is_told(autojump_clock, infra, etcd):
    """What somebody put among the messages by hand is a `CodecError`, and no end of the subscription."""
    async with infra.topic("orders").subscribe() as inbox:
        await etcd.node("hand").put(KEYS.message("zzz"), b"\xff")
        await infra.topic("orders").publish(1)
        with pytest.raises(CodecError, match="no message"):
            await anext(inbox)
        assert [1] == await take(inbox, 1)


# ── retention ───────────────────────────────────────────────────────────────────────────────────


async def trimmed_to(etcd, count):
    """Wait until so many messages are left."""
    with trio.fail_after(120):
        while len(messages(etcd)) > count:
            await trio.sleep(1)


async def test_count_is_kept(autojump_clock, infra, etcd):
    """Of many messages the newest ones are kept, and their ids; an id that was trimmed may come again."""
    topic = infra.topic("orders", retention=Retention(count=10))
    for number in range(1500):
        await topic.publish(number, message_id=f"id-{number}")
    await trimmed_to(etcd, 10)
    async with topic.subscribe(from_revision=0) as inbox:
        assert list(range(1490, 1500)) == await take(inbox, 10)
    assert 10 == len([kv for kv in etcd.store.snapshot().kvs if kv.key.startswith(KEYS.markers)])
    assert not (await topic.publish("again", message_id="id-0")).is_duplicate
    assert (await topic.publish("again", message_id="id-1499")).is_duplicate


async def test_age_is_kept(autojump_clock, infra, etcd):
    """Messages go when they are too old, not before."""
    topic = infra.topic("orders", retention=Retention(age=60))
    await topic.publish("old")
    await trio.sleep(50)
    await topic.publish("young")
    assert 2 == len(messages(etcd))
    await trio.sleep(30)
    assert 1 == len(messages(etcd))


async def test_gap_is_told_with_its_range(autojump_clock, infra, etcd):
    """Who comes too late is told which revisions are gone, once, and gets the rest."""
    topic = infra.topic("orders", retention=Retention(count=5))
    receipts = [await topic.publish(number) for number in range(20)]
    await trimmed_to(etcd, 5)
    async with topic.subscribe(from_revision=receipts[2].revision) as inbox:
        with pytest.raises(MessagesLostError) as caught:
            await anext(inbox)
        assert (receipts[2].revision, receipts[14].revision) == (caught.value.after, caught.value.up_to)
        assert list(range(15, 20)) == await take(inbox, 5)


async def test_groups_hold_back_the_trimmer(autojump_clock, infra, etcd):
    """What a group has not acknowledged is kept; what it has acknowledged goes."""
    topic = infra.topic("orders", retention=Retention(count=1))
    async with topic.subscribe(group="slow") as inbox:
        for number in range(10):
            await topic.publish(number)
        await trio.sleep(60)
        assert 10 == len(messages(etcd))
        for _ in range(4):
            async with await anext(inbox):
                pass
    await trio.sleep(60)
    assert 6 == len(messages(etcd))


async def test_unacknowledged_messages_may_go(autojump_clock, infra, etcd):
    """With `unacknowledged` a group's messages go, and it is told, not passed over."""
    topic = infra.topic("orders", retention=Retention(count=1, unacknowledged=True))
    async with topic.subscribe(group="slow") as inbox:
        for number in range(10):
            await topic.publish(number)
        await trimmed_to(etcd, 1)
    async with (
        open_infra(etcd.node("two"), seed=2) as two,
        two.topic("orders").subscribe(group="slow") as inbox,
    ):
        with pytest.raises(MessagesLostError):
            await anext(inbox)
        message = await anext(inbox)
        assert 9 == message.payload
        await message.ack()


async def test_one_process_trims(etcd, autojump_clock):
    """Of several processes with a retention one trims; when it goes, the next one does."""
    retention = Retention(count=3)
    async with open_infra(etcd.node("one"), seed=1) as one:
        async with open_infra(etcd.node("two"), seed=2) as two:
            for infra in (two, one):
                await infra.topic("orders", retention=retention).publish("x")
                await trio.sleep(1)
            line = [kv for kv in etcd.store.snapshot().kvs if kv.key.startswith(KEYS.trimmers)]
            assert 2 == len(line)
        for number in range(10):
            await one.topic("orders", retention=retention).publish(number)
        await trimmed_to(etcd, 3)


async def test_revision_is_trimmed_as_a_whole(autojump_clock, infra, etcd):
    """Messages of one revision go together, so that their places stay."""
    topic = infra.topic("orders", retention=Retention(count=10))
    for _ in range(3):
        await infra.execute([Publish("orders", number) for number in range(8)])
    await topic.publish("last")
    await trio.sleep(60)
    assert 17 == len(messages(etcd))


# ── looking inside ──────────────────────────────────────────────────────────────────────────────


async def test_inspect_topics(autojump_clock, infra):
    """Topics, what is in them, who consumes, how far behind, and what is dead."""
    assert () == await infra.inspect("topics")
    topic, other = infra.topic("orders"), infra.topic("orders/2")
    await other.publish("x")
    async with (
        topic.subscribe(group="idle"),
        topic.subscribe(group="busy") as busy,
        topic.subscribe(group="many", shared=True, max_retries=0) as many,
    ):
        for number in range(5):
            await topic.publish(number)
        await trio.sleep(10)
        async with await anext(busy):
            pass
        await anext(many)
        await (await anext(many)).ack()
        await (await anext(many)).nack()
        await trio.sleep(1)
        (orders,) = await infra.inspect("topics", "orders")
        assert [orders, "orders/2"] == [
            (await infra.inspect("topics"))[0],
            (await infra.inspect("topics"))[1].name,
        ]
    assert ("orders", 5, 0) == (orders.name, orders.messages, orders.trimmed_up_to)
    assert orders.oldest_at <= orders.newest_at < trio.current_time()
    assert [
        ("busy", "ordered", 4, ("node-1",), 1, 0),
        ("idle", "ordered", 5, (), 0, 0),
        ("many", "sharing", 3, ("node-1",), 1, 1),
    ] == [(one.name, one.kind, one.lag, one.consumers, one.attempts, one.dead_letters) for one in orders.groups]
    assert all(10 < one.lag_seconds < 13 for one in orders.groups)
    assert "many (sharing): lag 3 (11 s), 1 dead; node-1" == str(orders.groups[2])


# ── bad input ───────────────────────────────────────────────────────────────────────────────────

BAD = {
    "empty name": (lambda infra: infra.topic(""), ValueError),
    "name": (lambda infra: infra.topic(7), TypeError),
    "retention": (lambda infra: infra.topic("t", retention=5), TypeError),
    "no retention": (lambda _: Retention(), ValueError),
    "age": (lambda _: Retention(age=0), ValueError),
    "count": (lambda _: Retention(count=1.5), TypeError),
    "bool": (lambda _: Retention(count=True), TypeError),
    "group": (lambda infra: infra.topic("t").subscribe(group=""), ValueError),
    "shared": (lambda infra: infra.topic("t").subscribe(shared=True), ValueError),
    "from": (lambda infra: infra.topic("t").subscribe(from_revision=-1), ValueError),
    "from text": (lambda infra: infra.topic("t").subscribe(from_revision="1"), TypeError),
    "ack_after": (lambda infra: infra.topic("t").subscribe(group="g", ack_after=0), ValueError),
    "ack_after text": (lambda infra: infra.topic("t").subscribe(group="g", ack_after="1"), TypeError),
    "retries": (lambda infra: infra.topic("t").subscribe(group="g", max_retries=-1), ValueError),
    "retries float": (lambda infra: infra.topic("t").subscribe(group="g", max_retries=1.0), TypeError),
    "operation": (lambda _: Publish("t", 1, delivery="twice"), ValueError),
    "operation id": (lambda _: Publish("t", 1, message_id=""), ValueError),
}


@pytest.mark.parametrize(("call", "error"), BAD.values(), ids=BAD)
async def test_bad_arguments_are_refused_at_once(autojump_clock, infra, call, error):
    """Bad arguments raise where they are given."""
    with pytest.raises(error):
        call(infra)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"payload": float("nan")}, ValueError),
        ({"payload": object()}, TypeError),
        ({"payload": 1, "message_id": ""}, ValueError),
        ({"payload": 1, "message_id": 5}, TypeError),
        ({"payload": 1, "delivery": "twice"}, ValueError),
        ({"payload": 1, "fence": "none"}, TypeError),
        ({"payload": bytes(2_000_000)}, InvalidRequestError),
    ],
)
async def test_bad_messages_are_refused_before_anything_is_sent(etcd, autojump_clock, arguments, error):
    """A message that can not be published sends nothing."""
    backend = RecordingBackend(etcd.node("one"))
    async with open_infra(backend) as infra:
        backend.calls.clear()
        with pytest.raises(error):
            await infra.topic("t").publish(**arguments)
        assert [] == backend.calls


def test_positions_are_ordered_by_revision_first():
    """A later revision is later, whatever the names say."""
    assert Position(3, "z") < Position(4, "a") < Position(4, "b")


async def test_memory_etcd_is_enough(autojump_clock):
    """A topic works on a fresh private store."""
    async with open_infra(MemoryEtcd().node("one")) as infra, infra.topic("t").subscribe() as inbox:
        await infra.topic("t").publish(1)
        assert [1] == await take(inbox, 1)


async def test_inspect_shows_a_cursor_that_is_none(autojump_clock, infra, etcd):
    """What somebody put among the cursors by hand is shown as what holds up the trimmer, beside the groups."""
    topic = infra.topic("orders", retention=Retention(count=1))
    async with topic.subscribe(group="good"):
        await etcd.node("hand").put(KEYS.cursor("bad"), b"\xff")
        for number in range(3):
            await topic.publish(number)
        await trio.sleep(60)
        (orders,) = await infra.inspect("topics")
    assert [("bad", "unreadable", 3), ("good", "ordered", 3)] == [
        (one.name, one.kind, one.lag) for one in orders.groups
    ]


async def test_messages_are_counted(autojump_clock, infra):
    """`messages_sent` counts what was published in whatever way, `messages_received` each delivery."""
    topic = infra.topic("orders")

    async def publish_both(tx):
        tx.publish("orders", 3)
        tx.publish("orders", 4)

    async with (
        topic.subscribe() as listener,
        topic.subscribe(group="one") as one,
        topic.subscribe(group="many", shared=True) as many,
    ):
        await topic.publish(1, message_id="once")
        await topic.publish(1, message_id="once")
        await infra.execute([Publish("orders", 2), Set("k", 1)])
        await infra.transact(publish_both)
        assert (5, 0) == counted(infra)
        assert [1, 2, 3, 4] == await take(listener, 4)
        assert (5, 4) == counted(infra)
        async with (await anext(one)).transaction() as tx:
            tx.publish("orders", 5)
        message = await anext(many)
        await message.nack()
        async with await anext(many):
            pass
        assert (6, 7) == counted(infra)
    assert 1 == infra.metrics()["state_operations"]


def counted(infra):
    """Return how many messages were sent and received."""
    return infra.metrics()["messages_sent"], infra.metrics()["messages_received"]
