"""Groups: they remember their place, hand each message to one handler, and lose none."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress

import pytest
import trio

from etcd_infra import (
    AckTimeoutError,
    CodecError,
    ConflictError,
    Delivery,
    InvalidRequestError,
    LockLostError,
    NotHeldError,
)
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange
from etcd_infra._primitives import _shared_group
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import NAMESPACE, open_infra
from tests.helpers.cancelling import cancelled_at

KEYS = Keys(NAMESPACE).topic("orders")
FAULTS = {
    "answered": lambda _: None,
    "refused": lambda backend: backend.refuse_next(),
    "request lost": lambda backend: backend.lose_next_request(),
    "answer lost": lambda backend: backend.lose_next_answer(),
    "applied late": lambda backend: backend.apply_next_late(3.0),
    "two applied late": lambda backend: (backend.apply_next_late(1.0), backend.apply_next_late(3.0)),
}

both_kinds = pytest.mark.parametrize("shared", [False, True], ids=["ordered", "sharing"])


def keys_of(etcd, prefix):
    """List the names of keys with a prefix."""
    return [kv.key.removeprefix(prefix) for kv in etcd.store.snapshot().kvs if kv.key.startswith(prefix)]


async def following(inbox):
    """Wait for the next message, not for ever."""
    with trio.fail_after(120):
        return await anext(inbox)


async def nothing_comes(inbox, seconds=5):
    """Return whether nothing comes for a while."""
    with trio.move_on_after(seconds) as patience:
        await anext(inbox)
    return patience.cancelled_caught


async def handled(inbox, count):
    """Handle the next messages, and return their payloads."""
    payloads = []
    for _ in range(count):
        async with await following(inbox) as message:
            payloads.append(message.payload)
    return payloads


@asynccontextmanager
async def two_nodes(etcd, **options):
    """Open two coordinators."""
    async with (
        open_infra(etcd.node("one"), seed=1, **options) as one,
        open_infra(etcd.node("two"), seed=2, **options) as two,
    ):
        yield one, two


# ── a group's place ─────────────────────────────────────────────────────────────────────────────


@both_kinds
async def test_group_goes_on_where_it_was(autojump_clock, infra, shared):
    """What was acknowledged does not come again, what was not does: also from before anybody listened."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        for number in range(3):
            await topic.publish(number)
        assert [0, 1] == await handled(inbox, 2)
    await topic.publish(3)
    async with topic.subscribe(group="g", shared=shared) as inbox:
        assert [2, 3] == await handled(inbox, 2)
        assert await nothing_comes(inbox)


@both_kinds
async def test_group_begins_when_it_is_made(autojump_clock, infra, shared):
    """A new group gets what is published from then on, or what it asked for."""
    topic = infra.topic("orders")
    first = await topic.publish("early")
    async with topic.subscribe(group="now", shared=shared) as inbox:
        await topic.publish("late")
        assert ["late"] == await handled(inbox, 1)
    async with topic.subscribe(group="then", shared=shared, from_revision=first.revision) as inbox:
        assert ["early", "late"] == await handled(inbox, 2)
    async with topic.subscribe(group="all", shared=shared, from_revision=0) as inbox:
        assert ["early", "late"] == await handled(inbox, 2)


@both_kinds
async def test_groups_are_independent(autojump_clock, infra, shared):
    """An acknowledgement of one group is none of another one's (probe D13)."""
    topic = infra.topic("orders")
    async with (
        topic.subscribe(group="a", shared=shared) as a,
        topic.subscribe(group="b", shared=shared) as b,
        topic.subscribe(group="ab", shared=shared),
    ):
        await topic.publish("x")
        assert ["x"] == await handled(a, 1)
        with pytest.raises(RuntimeError):
            async with await following(b):
                raise RuntimeError
        assert ["x"] == await handled(b, 1)
        assert [] == [message.payload for message in await topic.unacknowledged("a")]
        assert ["x"] == [message.payload for message in await topic.unacknowledged("ab")]
    assert ("a", "ab", "b") == await topic.groups()


async def test_group_has_one_kind(autojump_clock, infra):
    """A group is an ordered or a work-sharing one, for all its consumers."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g"):
        with pytest.raises(ValueError, match="ordered one, not a work-sharing"):
            async with topic.subscribe(group="g", shared=True):
                pass


@both_kinds
async def test_deleted_group(autojump_clock, infra, etcd, shared):
    """A group that is deleted says so to its consumers, and leaves nothing."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        await topic.publish(1)
        assert [1] == await handled(inbox, 1)
        assert await topic.delete_group("g")
        assert not await topic.delete_group("g")
        await topic.publish(2)
        with pytest.raises(ConflictError, match="deleted"):
            await following(inbox)
    assert [] == keys_of(etcd, KEYS.cursors) + keys_of(etcd, KEYS.root + b"group/")
    with pytest.raises(ValueError, match="no group"):
        await topic.unacknowledged("g")


# ── acknowledging ───────────────────────────────────────────────────────────────────────────────


@both_kinds
async def test_exception_has_it_delivered_again(autojump_clock, infra, shared):
    """A handler's exception leaves as it is; the message comes again with the next attempt's number."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        await topic.publish("x")
        for attempt in (1, 2, 3):
            message = await following(inbox)
            assert attempt == message.attempt
            with pytest.raises(ValueError, match="mine"):
                async with message:
                    raise ValueError("mine")
        async with await following(inbox) as message:
            assert 4 == message.attempt
        assert await nothing_comes(inbox)


@both_kinds
async def test_never_acknowledged_becomes_a_dead_letter(autojump_clock, infra, shared):
    """With three retries a message is delivered four times, and then it is a dead letter, not gone (probe D5)."""
    topic = infra.topic("orders")
    attempts = []
    async with topic.subscribe(group="g", shared=shared, ack_after=2, max_retries=3) as inbox:
        await topic.publish("x")
        with trio.move_on_after(60):
            async for message in inbox:
                attempts.append(message.attempt)  # noqa: PERF401
    assert [1, 2, 3, 4] == attempts
    [letter] = await topic.dead_letters("g")
    assert ("x", 4, "AckTimeoutError", False) == (
        letter.message.payload,
        letter.message.attempt,
        letter.reason,
        letter.is_replayed,
    )
    assert () == await topic.unacknowledged("g")


@both_kinds
async def test_acknowledged_by_hand(autojump_clock, infra, shared):
    """`ack` by hand is enough: one delivery (probe D6), and saying it twice does no harm."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared, ack_after=2) as inbox:
        await topic.publish("x")
        message = await following(inbox)
        await message.ack()
        await message.ack()
        assert await nothing_comes(inbox, 60)
        with pytest.raises(NotHeldError):
            await message.nack()


@both_kinds
@pytest.mark.parametrize("delivery", [Delivery.AT_LEAST_ONCE, Delivery.EXACTLY_ONCE])
async def test_slow_handler_runs_once(autojump_clock, infra, shared, delivery):
    """A handler that takes its time is not started a second time meanwhile (probe D7)."""
    topic = infra.topic("orders")
    runs = []

    async def consume():
        async with topic.subscribe(group="g", shared=shared, ack_after=30) as inbox:
            async for message in inbox:
                async with message:
                    runs.append(message.attempt)
                    await trio.sleep(20)

    async with trio.open_nursery() as nursery:
        async with topic.subscribe(group="g", shared=shared):
            pass
        for _ in range(3):
            nursery.start_soon(consume)
        await topic.publish("x", delivery=delivery)
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert [1] == runs


@both_kinds
async def test_failing_handler_ends_in_a_dead_letter(autojump_clock, infra, shared):
    """A handler that always fails leaves a dead letter with its reason (probe D8), and the next message comes."""
    topic = infra.topic("orders")
    runs = []

    async def handle(payload):
        if payload == "poison":
            raise OSError

    async with topic.subscribe(group="g", shared=shared, max_retries=2) as inbox:
        await topic.publish("poison", delivery=Delivery.EXACTLY_ONCE)
        await topic.publish("good")
        while not runs or runs[-1] != "good":
            message = await following(inbox)
            runs.append(message.payload)
            with suppress(OSError):
                async with message:
                    await handle(message.payload)
    assert ["poison"] * 3 == [run for run in runs if run == "poison"]
    [letter] = await topic.dead_letters("g")
    assert ("poison", "OSError") == (letter.message.payload, letter.reason)


@both_kinds
async def test_handler_is_cancelled_when_its_time_is_over(autojump_clock, infra, shared):
    """After `ack_after` seconds the handler is cancelled, and only then the message is delivered again."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared, ack_after=5) as inbox:
        await topic.publish("x")
        began = trio.current_time()
        with pytest.raises(AckTimeoutError, match="attempt 1"):
            async with await following(inbox):
                await trio.sleep_forever()
        assert 5 == pytest.approx(trio.current_time() - began, abs=0.5)
        assert 2 == (await following(inbox)).attempt


@both_kinds
async def test_nack_with_a_delay(autojump_clock, infra, shared):
    """A message that was given back for ten seconds comes after ten seconds."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        await topic.publish("x")
        message = await following(inbox)
        began = trio.current_time()
        await message.nack(delay=10)
        assert 2 == (await following(inbox)).attempt
        assert 10 == pytest.approx(trio.current_time() - began, abs=1)


@both_kinds
@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), "1", True])
async def test_bad_delay_changes_nothing(autojump_clock, infra, shared, delay):
    """A delay that is none is refused; the message can be acknowledged still."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        await topic.publish("x")
        message = await following(inbox)
        with pytest.raises(ValueError, match="delay"):
            await message.nack(delay)
        await message.ack()


@both_kinds
async def test_at_most_once_never_comes_twice(autojump_clock, infra, shared):
    """A message that was published at most once is acknowledged before its handler sees it."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        await topic.publish("x", delivery=Delivery.AT_MOST_ONCE)
        message = await following(inbox)
        assert () == await topic.unacknowledged("g")
        with pytest.raises(RuntimeError):
            async with message:
                raise RuntimeError
        await message.ack()
        assert await nothing_comes(inbox)


async def test_at_most_once_is_handled_one_after_the_other(autojump_clock, infra):
    """Handlers of consecutive messages neither overlap nor end out of order, however long they take (probe D15)."""
    topic = infra.topic("orders")
    story = []
    async with topic.subscribe(group="g") as inbox:
        for number in range(4):
            await topic.publish(number, delivery=Delivery.AT_MOST_ONCE)
        with trio.move_on_after(60):
            async for message in inbox:
                async with message:
                    story.append(("begins", message.payload))
                    await trio.sleep(4 - message.payload)
                    story.append(("ends", message.payload))
    assert [(what, number) for number in range(4) for what in ("begins", "ends")] == story


@both_kinds
async def test_ordered_and_cheap(etcd, autojump_clock, shared):
    """With messages at hand an ordered group costs one Txn per message, a work-sharing one two."""
    backend = RecordingBackend(etcd.node("one"))
    async with open_infra(backend) as infra:
        topic = infra.topic("orders")
        async with topic.subscribe(group="g", shared=shared) as inbox:
            for number in range(51):
                await topic.publish(number)
            await trio.sleep(1)
            await handled(inbox, 1)
            backend.calls.clear()
            assert list(range(1, 41)) == await handled(inbox, 40)
            assert (80 if shared else 40) == len([call for call in backend.calls if call.verb == "txn"])


# ── consumers come and go ───────────────────────────────────────────────────────────────────────


async def test_one_consumer_is_active_and_the_next_takes_over(etcd, autojump_clock):
    """Of two consumers one gets everything; when it leaves, the other one goes on at once, in order."""
    async with two_nodes(etcd) as (one, two):
        got = []

        async def consume(infra, name, task_status):
            async with infra.topic("orders").subscribe(group="g") as inbox:
                task_status.started()
                async for message in inbox:
                    async with message:
                        got.append((name, message.payload))

        async with trio.open_nursery() as nursery:
            first, second = trio.CancelScope(), trio.CancelScope()

            async def scoped(scope, infra, name, task_status):
                with scope:
                    await consume(infra, name, task_status)

            await nursery.start(scoped, first, one, "one")
            await trio.sleep(1)
            await nursery.start(scoped, second, two, "two")
            for number in range(5):
                await two.topic("orders").publish(number)
            await trio.sleep(1)
            first.cancel()
            for number in range(5, 10):
                await two.topic("orders").publish(number)
            await trio.sleep(1)
            second.cancel()
    assert [("one", number) for number in range(5)] + [("two", number) for number in range(5, 10)] == got


@both_kinds
async def test_crashed_consumer_is_replaced(etcd, autojump_clock, shared):
    """A consumer that crashes with a message in hand: another one gets it when the lease ends, counted."""
    node = etcd.node("one")
    async with open_infra(etcd.node("two"), seed=2, ttl=10) as two:
        topic = two.topic("orders")
        async with topic.subscribe(group="g", shared=shared):
            pass
        with trio.CancelScope() as scope:
            async with open_infra(node, seed=1, ttl=10) as one:
                async with one.topic("orders").subscribe(group="g", shared=shared) as inbox:
                    await topic.publish("x")
                    await following(inbox)
                    node.crash()
                    scope.cancel()
        async with topic.subscribe(group="g", shared=shared) as inbox:
            message = await following(inbox)
            assert ("x", 2) == (message.payload, message.attempt)
            await message.ack()


@both_kinds
async def test_message_that_kills_its_consumers_is_buried(etcd, autojump_clock, shared):
    """Attempts survive their consumers: a message that kills each of them is a dead letter in the end."""
    async with open_infra(etcd.node("calm"), seed=9, ttl=5) as calm:
        topic = calm.topic("orders")
        async with topic.subscribe(group="g", shared=shared):
            pass
        await topic.publish("poison")
        await topic.publish("good")
        for seed in range(3):
            node = etcd.node(f"dies-{seed}")
            with trio.CancelScope() as scope:
                async with open_infra(node, seed=seed, ttl=5) as dies:
                    async with dies.topic("orders").subscribe(group="g", shared=shared, max_retries=2) as inbox:
                        message = await following(inbox)
                        assert ("poison", seed + 1) == (message.payload, message.attempt)
                        node.crash()
                        scope.cancel()
            await trio.sleep(20)
        async with topic.subscribe(group="g", shared=shared, max_retries=2) as inbox:
            assert ["good"] == await handled(inbox, 1)
        [letter] = await topic.dead_letters("g")
        assert ("poison", 3, "") == (letter.message.payload, letter.message.attempt, letter.reason)


@both_kinds
async def test_lost_claim_cancels_the_handler(etcd, autojump_clock, shared):
    """A consumer that is cut off: its handler is cancelled before the next one begins, and says why."""
    node = etcd.node("one")
    running = []

    async def consume(infra, name):
        async with infra.topic("orders").subscribe(group="g", shared=shared, ack_after=1000) as inbox:
            async for message in inbox:
                try:
                    async with message:
                        running.append(("begin", name, trio.current_time()))
                        await trio.sleep(500 if name == "one" else 1)
                finally:
                    running.append(("end", name, trio.current_time()))

    async with (
        open_infra(node, seed=1, ttl=10) as one,
        open_infra(etcd.node("two"), seed=2, ttl=10) as two,
    ):
        async with two.topic("orders").subscribe(group="g", shared=shared):
            pass
        caught = []
        async with trio.open_nursery() as nursery:

            async def first():
                with pytest.raises(LockLostError) as found:
                    await consume(one, "one")
                caught.append(found)

            nursery.start_soon(first)
            await two.topic("orders").publish("x")
            await trio.sleep(2)
            nursery.start_soon(consume, two, "two")
            await trio.sleep(2)
            node.partition()
            await trio.sleep(60)
            nursery.cancel_scope.cancel()
    assert [("begin", "one"), ("end", "one"), ("begin", "two"), ("end", "two")] == [one[:2] for one in running]
    assert 1 == len(caught)


@both_kinds
async def test_deleted_claim_cancels_the_handler(autojump_clock, infra, etcd, shared):
    """An operator who deletes the claim takes the message away: cancelled, refused, delivered again."""
    topic = infra.topic("orders")
    line = KEYS.claims("g") if shared else KEYS.consumers("g")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        await topic.publish("x")
        message = await following(inbox)
        await trio.sleep(1)
        [name] = keys_of(etcd, line)
        with pytest.raises(LockLostError):
            async with message:
                await etcd.node("operator").delete(KeyRange.one(line + name))
                await trio.sleep(500)
        with pytest.raises(LockLostError):
            await message.ack()
        async with await following(inbox) as again:
            assert ("x", 2) == (again.payload, again.attempt)
        assert await nothing_comes(inbox)


@both_kinds
async def test_lost_session_is_replaced_by_itself(autojump_clock, infra, shared):
    """Between messages a lost session is no error: the consumer is there again under the next one."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        await topic.publish(1)
        assert [1] == await handled(inbox, 1)
        await infra.backend.lease_revoke(infra.session.lease.id)
        await trio.sleep(20)
        await topic.publish(2)
        assert [2] == await handled(inbox, 1)


async def test_work_is_shared(etcd, autojump_clock):
    """Consumers of a work-sharing group get different messages, at the same time, all of them once."""
    async with two_nodes(etcd) as (one, two):
        got = []

        async def consume(infra, name, task_status):
            async with infra.topic("orders").subscribe(group="g", shared=True) as inbox:
                task_status.started()
                async for message in inbox:
                    async with message:
                        await trio.sleep(1)
                        got.append((name, message.payload))

        async with trio.open_nursery() as nursery:
            for name, infra in (("one", one), ("two", two), ("three", two)):
                await nursery.start(consume, infra, name)
            for number in range(300):
                await one.topic("orders").publish(number)
            began = trio.current_time()
            while len(got) < 300:
                await trio.sleep(1)
            assert trio.current_time() - began < 130
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
    assert list(range(300)) == sorted(number for _, number in got)
    assert all(sum(name == one for one, _ in got) > 50 for name in ("one", "two", "three"))
    # The floor has moved, and took the progress below it along.
    assert len(keys_of(etcd, KEYS.shared("g"))) < 2 * _shared_group.FLOOR_STEP


async def test_one_consumer_may_have_many_in_hand(autojump_clock, infra, etcd):
    """A work-sharing consumer may hand its messages to tasks; one that is stuck holds up nobody."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=True) as inbox, trio.open_nursery() as nursery:
        for number in range(600):
            await topic.publish(number)
        done = []

        async def handle(message):
            async with message:
                await trio.sleep(20 if message.payload == 0 else 1)
                done.append(message.payload)

        for _ in range(600):
            nursery.start_soon(handle, await following(inbox))
    assert list(range(600)) == sorted(done)
    assert 0 == done[-1]


# ── exactly once ────────────────────────────────────────────────────────────────────────────────


@both_kinds
async def test_effects_and_acknowledgement_are_one_commit(autojump_clock, infra, etcd, shared):
    """What the handler writes has the revision of its acknowledgement; what it publishes, too."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox, infra.topic("done").subscribe() as done:
        await topic.publish(5)
        async with (await following(inbox)).transaction() as tx:
            tx.set("total", (await tx.get("total") or 0) + 5)
            tx.delete("gone")
            tx.publish("done", "five")
        event = await anext(done)
    assert event.revision == (await infra.state.get("total")).version
    cursor = KEYS.progress("g", keys_of(etcd, KEYS.messages)[0].decode()) if shared else KEYS.cursor("g")
    if not shared:
        assert event.revision == (await infra.backend.get(cursor)).mod_revision
    assert () == await topic.unacknowledged("g")


@both_kinds
async def test_failed_handler_writes_nothing(autojump_clock, infra, shared):
    """An exception in the body: nothing is written, and the message comes again."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        await topic.publish(5)
        with pytest.raises(ValueError, match="mine"):
            async with (await following(inbox)).transaction() as tx:
                tx.set("total", 5)
                raise ValueError("mine")
        assert await infra.state.get("total") is None
        async with (await following(inbox)).transaction() as tx:
            tx.set("total", 5)
        assert 5 == (await infra.state.get("total")).value


@both_kinds
async def test_conflict_is_no_attempt(autojump_clock, infra, shared):
    """A handler whose reads were overtaken is told so; the message comes again and is not counted."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared, max_retries=0) as inbox:
        await topic.publish(5)
        for number in range(3):
            message = await following(inbox)
            assert 1 == message.attempt
            with pytest.raises(ConflictError):
                async with message.transaction() as tx:
                    tx.set("total", await tx.get("total"))
                    await infra.state.set("total", number)
        async with (await following(inbox)).transaction() as tx:
            tx.set("total", (await tx.get("total")) + 5)
        assert 7 == (await infra.state.get("total")).value
        assert () == await topic.dead_letters("g")


@both_kinds
async def test_effects_over_the_budget(autojump_clock, infra, shared):
    """More than one Txn can take is refused as a whole, and is an attempt."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared) as inbox:
        await topic.publish(5)
        with pytest.raises(InvalidRequestError, match="budget"):
            async with (await following(inbox)).transaction() as tx:
                tx.set("big", bytes(2_000_000))
        assert 2 == (await following(inbox)).attempt


@both_kinds
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", [0, 1, 2])
async def test_effects_take_place_once_under_faults(etcd, autojump_clock, shared, fault, step):
    """Whatever happens to the answer of the begin, of a read or of the commit: each effect once."""
    backend = FaultyBackend(etcd.node("one"))
    async with open_infra(backend) as infra:
        topic = infra.topic("orders")
        async with topic.subscribe(group="g", shared=shared) as inbox:
            for number in range(3):
                await topic.publish(number)
            done = []
            while len(done) < 3:
                if step == 0:
                    FAULTS[fault](backend)
                message = await following(inbox)
                async with message.transaction() as tx:
                    if step == 1:
                        FAULTS[fault](backend)
                    tx.set(f"n-{message.payload}", (await tx.get(f"n-{message.payload}") or 0) + 1)
                    if step == 2:
                        FAULTS[fault](backend)
                done.append(message.payload)
            await trio.sleep(20)
            assert [1, 1, 1] == [(await infra.state.get(f"n-{number}")).value for number in range(3)]
            assert await nothing_comes(inbox)


@both_kinds
async def test_paused_consumer_has_no_effect(etcd, autojump_clock, shared):
    """A consumer that was replaced while it was cut off can not commit: the effect is its successor's, once."""
    node = etcd.node("one")
    async with (
        open_infra(node, seed=1, ttl=5) as one,
        open_infra(etcd.node("two"), seed=2, ttl=5) as two,
    ):
        async with one.topic("orders").subscribe(group="g", shared=shared) as stale:
            await two.topic("orders").publish("x")
            message = await following(stale)
            node.partition()
            async with two.topic("orders").subscribe(group="g", shared=shared) as inbox:
                async with (await following(inbox)).transaction() as tx:
                    tx.set("effect", "two")
            node.heal()
            with pytest.raises(LockLostError):
                async with message.transaction() as tx:
                    tx.set("effect", "one")
            await trio.sleep(20)
        assert "two" == (await two.state.get("effect")).value


# ── dead letters and receipts ───────────────────────────────────────────────────────────────────


async def bury(infra, topic, group, *, shared):
    """Make the next message of a group a dead letter."""
    async with topic.subscribe(group=group, shared=shared, max_retries=0) as inbox:
        with pytest.raises(OSError, match="broken"):
            async with await following(inbox):
                raise OSError("broken")


@both_kinds
async def test_dead_letter_is_replayed_for_its_group(autojump_clock, infra, shared):
    """A replayed letter comes to its group alone, with its id and time, and is one no more once acknowledged."""
    topic = infra.topic("orders")
    async with (
        topic.subscribe(group="g", shared=shared),
        topic.subscribe(group="other") as other,
        topic.subscribe() as ephemeral,
    ):
        await topic.publish("x", message_id="id")
        await bury(infra, topic, "g", shared=shared)
        [letter] = await topic.dead_letters("g")
        assert await topic.replay("g", letter)
        assert await topic.replay("g", letter)  # once is enough
        assert [True] == [one.is_replayed for one in await topic.dead_letters("g")]
        async with topic.subscribe(group="g", shared=shared) as inbox:
            async with await following(inbox) as message:
                assert ("x", "id", 1) == (message.payload, message.message_id, message.attempt)
            assert await nothing_comes(inbox)
        assert () == await topic.dead_letters("g")
        assert not await topic.replay("g", letter)
        assert ["x"] == await handled(other, 1)
        assert await nothing_comes(other)
        assert "x" == (await anext(ephemeral)).payload
        assert await nothing_comes(ephemeral)


@both_kinds
async def test_replayed_letter_may_die_again(autojump_clock, infra, shared):
    """A replayed letter that fails again is the same dead letter again; it can be discarded for good."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared):
        pass
    await topic.publish("x")
    await bury(infra, topic, "g", shared=shared)
    [letter] = await topic.dead_letters("g")
    await topic.replay("g", letter)
    await bury(infra, topic, "g", shared=shared)
    [again] = await topic.dead_letters("g")
    assert (letter.name, False) == (again.name, again.is_replayed)
    assert await topic.discard("g", again)
    assert not await topic.discard("g", again)
    assert () == await topic.dead_letters("g")


@both_kinds
async def test_undecodable_payload_is_buried(autojump_clock, infra, shared):
    """A payload of another type is told each time, and in the end a dead letter that can be looked at."""
    async with infra.topic("orders", type=int).subscribe(group="g", shared=shared, max_retries=1) as inbox:
        await infra.topic("orders").publish("text")
        await infra.topic("orders").publish(2)
        for _ in range(2):
            with pytest.raises(CodecError):
                await following(inbox)
        assert [2] == await handled(inbox, 1)
    [letter] = await infra.topic("orders", type=int).dead_letters("g")
    assert b'"text"' == letter.message.payload


@both_kinds
async def test_receipt_tells_who_has_acknowledged(autojump_clock, infra, shared):
    """It returns as soon as the last group has acknowledged (probe D9), and names those that have not (D10)."""
    topic = infra.topic("orders")
    alone = await topic.publish("nobody there")
    await alone.wait_acknowledged()
    assert () == alone.acknowledged_by
    async with (
        topic.subscribe(group="fast", shared=shared) as fast,
        topic.subscribe(group="slow", shared=shared) as slow,
    ):
        receipt = await topic.publish("x")
        async with topic.subscribe(group="later", shared=shared):
            pass
        assert ["x"] == await handled(fast, 1)
        with pytest.raises(trio.TooSlowError), trio.fail_after(5):
            await receipt.wait_acknowledged()
        assert (("fast",), ("slow",)) == (receipt.acknowledged_by, receipt.missing)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receipt.wait_acknowledged)
            await trio.sleep(5)
            async with await following(slow):
                pass
            acknowledged_at = trio.current_time()
        assert trio.current_time() - acknowledged_at < 0.1
        assert (("fast", "slow"), ()) == (receipt.acknowledged_by, receipt.missing)


@both_kinds
async def test_dead_letter_is_not_acknowledged(autojump_clock, infra, shared):
    """A receipt does not count a dead letter as acknowledged, until it was replayed and acknowledged."""
    topic = infra.topic("orders")
    async with topic.subscribe(group="g", shared=shared):
        pass
    receipt = await topic.publish("x")
    await bury(infra, topic, "g", shared=shared)
    assert not await receipt.refresh()
    [letter] = await topic.dead_letters("g")
    await topic.replay("g", letter)
    assert not await receipt.refresh()
    async with topic.subscribe(group="g", shared=shared) as inbox:
        await handled(inbox, 1)
    assert await receipt.refresh()


# ── cancellation ────────────────────────────────────────────────────────────────────────────────


@both_kinds
@pytest.mark.parametrize("fault", FAULTS)
async def test_consumer_cancelled_at_every_step(etcd, autojump_clock, shared, fault):
    """Cancelled anywhere: no key, no task is left, every message is handled in the end, each effect once."""
    step = 0
    reached = True
    while reached:
        step += 1
        backend = FaultyBackend(etcd.node(f"one-{step}"))
        name = f"topic-{step}"
        keys = Keys(NAMESPACE).topic(name)
        async with open_infra(backend, ttl=30) as infra:
            topic = infra.topic(name)
            async with topic.subscribe(group="g", shared=shared):
                pass
            await topic.publish(1)
            await topic.publish(2)

            async def consume(topic=topic, backend=backend):
                async with topic.subscribe(group="g", shared=shared) as inbox:
                    message = await anext(inbox)
                    async with message.transaction() as tx:
                        tx.set(f"{topic.name}/{message.payload}", 1 + (await tx.get(f"{topic.name}/1") or 0))
                        FAULTS[fault](backend)
                    await anext(inbox)

            reached = await cancelled_at(step, consume)
            backend.forget_faults()
            assert [] == keys_of(etcd, keys.consumers("g")) or fault != "answered"
            await trio.sleep(12)
            assert [] == keys_of(etcd, keys.consumers("g")) + keys_of(etcd, keys.claims("g"))
            async with topic.subscribe(group="g", shared=shared) as inbox:
                left = len(await topic.unacknowledged("g"))
                for _ in range(left):
                    async with (await following(inbox)).transaction() as tx:
                        tx.set(f"{name}/{left}", 1)
                assert await nothing_comes(inbox)
            assert () == await topic.unacknowledged("g")
            one = await infra.state.get(f"{name}/1")
            assert one is None or one.value == 1
    assert step > 20
