"""Topics on real servers: as in memory; with consumers that are killed and frozen, on a cluster that breaks."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections import Counter

import pytest
import trio

from etcd_infra import (
    EtcdError,
    InvalidRequestError,
    LostError,
    MessagesLostError,
    OutcomeUnknownError,
    Publish,
    Retention,
    Set,
    open_coordinator,
)
from etcd_infra.testing import EtcdCluster, EtcdServer, find_etcd
from tests.helpers.etcds import crash_safe_etcd, etcd_programs, every_etcd
from tests.integration.test_bank_cluster import break_things

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]

both_kinds = pytest.mark.parametrize("shared", [False, True], ids=["ordered", "sharing"])


@every_etcd()
async def test_listeners_on_a_real_server(program):
    """Order, index, ids, late and early subscriptions, gaps after trimming: as in memory."""
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        topic = infra.topic("orders")
        with trio.fail_after(60):
            async with topic.subscribe() as inbox:
                first = await topic.publish("first", message_id="1")
                assert (await topic.publish("again", message_id="1")).is_duplicate
                done = await infra.execute([Set("a", 1), *[Publish("orders", number) for number in range(30)]])
                got = [await anext(inbox) for _ in range(31)]
            places = [(first.revision, 0), *[(done.revision, number) for number in range(30)]]
            assert places == [(message.revision, message.index) for message in got]
            async with topic.subscribe(from_revision=first.revision) as late:
                assert got == [await anext(late) for _ in range(31)]
            kept = infra.topic("orders", retention=Retention(count=3))
            async with kept.subscribe(from_revision=first.revision) as late:
                while (await infra.inspect("topics"))[0].messages > 30:
                    await trio.sleep(0.1)
                # A revision goes as a whole, or not yet.
                with pytest.raises(MessagesLostError) as caught:
                    await anext(late)
                assert (first.revision, first.revision) == (caught.value.after, caught.value.up_to)
                assert 0 == (await anext(late)).payload


@every_etcd()
@both_kinds
async def test_groups_on_a_real_server(program, shared):
    """Effects with the acknowledgement, failures, dead letters, replay, receipts: as in memory."""
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        topic = infra.topic("orders")
        with trio.fail_after(60):
            async with topic.subscribe(group="g", shared=shared, max_retries=1) as inbox:
                receipts = [await topic.publish(number) for number in range(4)]
                for _ in range(5):
                    message = await anext(inbox)
                    if message.payload == 1:
                        with pytest.raises(OSError, match="broken"):
                            async with message:
                                raise OSError("broken")
                        continue
                    async with message.transaction() as tx:
                        tx.set("total", (await tx.get("total") or 0) + message.payload)
                assert 5 == (await infra.state.get("total")).value
                await receipts[0].wait_acknowledged()
                assert not await receipts[1].refresh()
                [letter] = await topic.dead_letters("g")
                assert await topic.replay("g", letter)
                async with await anext(inbox) as message:
                    assert 1 == message.payload
                await receipts[1].wait_acknowledged()
            (info,) = await infra.inspect("topics")
            assert (5, 0, ()) == (info.messages, info.groups[0].lag, info.groups[0].consumers)


@every_etcd()
async def test_most_messages_of_one_transaction(program):
    """As many messages in one Txn as etcd takes, in their order; one more is refused before it is sent."""
    most = 63 * 64
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        with trio.fail_after(60):
            async with infra.topic("orders").subscribe() as inbox:
                await infra.execute([Publish("orders", number) for number in range(most)])
                assert list(range(most)) == [(await anext(inbox)).payload for _ in range(most)]
            with pytest.raises(InvalidRequestError, match="over the budget"):
                await infra.execute([Publish("orders", number) for number in range(most + 1)])


CONSUMER = """
import sys, trio
from etcd_infra import ConflictError, EtcdInfraError, open_coordinator

async def main(endpoints, group, shared, pause):
    options = dict(namespace="ns", ttl=3, call_timeout=1.0, dial_timeout=1.0)
    async with open_coordinator(endpoints, **options) as infra:
        async with infra.topic("orders").subscribe(group=group, shared=shared == "True", max_retries=99) as inbox:
            print("ready", flush=True)
            while True:
                try:
                    message = await anext(inbox)
                    async with message.transaction() as tx:
                        key = f"effect/{group}/{message.message_id}"
                        tx.set(key, (await tx.get(key) or 0) + 1)
                        print("begun", flush=True)
                        await trio.sleep(float(pause))
                except EtcdInfraError as error:
                    print("error", type(error).__name__, flush=True)

trio.run(main, *sys.argv[1:])
"""


async def consumer(endpoints, group, *, shared, pause=0.0, quiet=False):
    """Start a process that consumes."""
    command = [sys.executable, "-c", CONSUMER, endpoints, group, str(shared), str(pause)]
    where = subprocess.DEVNULL if quiet else subprocess.PIPE
    return await trio.lowlevel.open_process(command, stdout=where, stderr=where if quiet else None)


async def said(process, text):
    """Wait until a process has printed a text."""
    printed = b""
    while text not in printed:
        received = await process.stdout.receive_some()
        assert received, f"it ended after {printed!r}"
        printed += received


@pytest.mark.parametrize(
    ("shared", "how"),
    [
        pytest.param(False, signal.SIGKILL, id="ordered, killed"),
        pytest.param(False, signal.SIGSTOP, id="ordered, frozen", marks=pytest.mark.slow),
        pytest.param(True, signal.SIGKILL, id="sharing, killed", marks=pytest.mark.slow),
        pytest.param(True, signal.SIGSTOP, id="sharing, frozen", marks=pytest.mark.slow),
    ],
)
async def test_consumer_process_is_replaced(shared, how):
    """A process that is killed, or frozen, with a message in hand: another one has its effect, once."""
    async with EtcdServer() as server, open_coordinator(server.endpoint, namespace="ns", ttl=3) as infra:
        topic = infra.topic("orders")
        with trio.fail_after(60):
            async with topic.subscribe(group="g", shared=shared):
                pass
            process = await consumer(server.endpoint, "g", shared=shared, pause=1.0)
            try:
                await said(process, b"ready")
                receipt = await topic.publish("x")
                await said(process, b"begun")
                process.send_signal(how)
                async with topic.subscribe(group="g", shared=shared) as inbox:
                    message = await anext(inbox)
                    assert 2 == message.attempt
                    async with message.transaction() as tx:
                        tx.set(f"effect/g/{message.message_id}", 1)
                if how is signal.SIGSTOP:
                    process.send_signal(signal.SIGCONT)
                    await said(process, b"error LockLostError")
                version = (await infra.state.get(f"effect/g/{receipt.message_id}")).version
                await trio.sleep(1)
                entry = await infra.state.get(f"effect/g/{receipt.message_id}")
                assert (1, version) == (entry.value, entry.version)
            finally:
                process.kill()
                await process.wait()


class Publishers:
    """Clients that publish, and what they were told of each message."""

    def __init__(self, draws):
        self.draws = draws
        self.told = {}
        self.open = True

    async def run(self, name, endpoints):
        """Publish until it is closed: plainly, with the same id twice, and together with state."""
        async with open_coordinator(
            endpoints, namespace="ns", node_id=name, ttl=5, call_timeout=1.0, dial_timeout=1.0
        ) as infra:
            number = 0
            while self.open:
                number += 1
                message_id = f"{name}.{number}"
                try:
                    if number % 3:
                        await infra.topic("orders").publish(message_id, message_id=message_id)
                    else:
                        changes = [Set(f"did/{message_id}", 1), Publish("orders", 1, message_id=message_id)]
                        await infra.execute(changes)
                    if number % 5 == 0:
                        await infra.topic("orders").publish(message_id, message_id=message_id)
                    self.told[message_id] = "done"
                except OutcomeUnknownError:
                    self.told[message_id] = "unknown"
                except (EtcdError, LostError):
                    # Of the repetition, perhaps.
                    self.told[message_id] = "unknown"
                await trio.sleep(self.draws.uniform(0, 0.02))


async def break_consumers(start, draws, seconds):
    """Kill consumers, and freeze them for longer than their leases live; what dies is replaced."""
    faults = Counter()
    running = [await start() for _ in range(6)]
    until = trio.current_time() + seconds
    try:
        while trio.current_time() < until:
            await trio.sleep(draws.uniform(0.2, 1.0))
            victim = draws.randrange(len(running))
            if draws.random() < 0.5:
                running[victim].kill()
                await running[victim].wait()
                running[victim] = await start()
                faults["kill"] += 1
            else:
                running[victim].send_signal(signal.SIGSTOP)
                await trio.sleep(draws.choice((0.5, 4.5)))
                running[victim].send_signal(signal.SIGCONT)
                faults["freeze"] += 1
    except BaseException:
        for process in running:
            process.kill()
        raise
    return faults, running


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_each_effect_once_while_everything_breaks():
    """
    Publishers and consumers of two groups, killed and frozen, on three members that are, too.

    Whatever was confirmed has its effect in both groups, once; nothing has two; a listener sees all of it, in order;
    and the ordered group's effects come in that order.
    """
    seconds = 30
    program = crash_safe_etcd() or etcd_programs()[0]
    draws = random.Random(11)
    publishers = Publishers(draws)
    heard = []
    async with EtcdCluster(3, binary=program, election_timeout=0.5) as cluster:
        endpoints = ",".join(member.endpoint for member in cluster.members)
        turn = iter(range(10**6))

        async def start():
            shared = bool(next(turn) % 2)
            return await consumer(endpoints, "sharing" if shared else "ordered", shared=shared, quiet=True)

        async def listen(infra, task_status):
            async with infra.topic("orders").subscribe() as inbox:
                task_status.started()
                async for message in inbox:
                    heard.append((message.revision, message.index, message.message_id))  # noqa: PERF401

        async with open_coordinator(endpoints, namespace="ns", call_timeout=1.0) as infra:
            topic = infra.topic("orders")
            async with topic.subscribe(group="ordered"), topic.subscribe(group="sharing", shared=True):
                pass
            async with trio.open_nursery() as listening:
                await listening.start(listen, infra)
                with trio.fail_after(seconds + 90):
                    results = []

                    async def break_them():
                        results.append(await break_consumers(start, draws, seconds))

                    async with trio.open_nursery() as nursery:
                        for number in range(3):
                            nursery.start_soon(publishers.run, f"p{number}", endpoints)
                        nursery.start_soon(break_them)
                        kills = crash_safe_etcd() is not None
                        faults = await break_things(cluster, draws, seconds, kills=kills)
                        publishers.open = False
                    consumer_faults, running = results[0]
                    last = await topic.publish("last", message_id="last")
                    try:
                        while await topic.unacknowledged("ordered") or await topic.unacknowledged("sharing"):
                            await trio.sleep(0.1)
                    finally:
                        for process in running:
                            process.kill()
                            await process.wait()
                    while not heard or heard[-1][0] < last.revision:
                        await trio.sleep(0.1)
                listening.cancel_scope.cancel()
            effects = {
                group: {entry.key.removeprefix(f"effect/{group}/"): entry async for entry in listing}
                for group in ("ordered", "sharing")
                for listing in [infra.state.list(f"effect/{group}/")]
            }
            assert () == await topic.dead_letters("ordered") + await topic.dead_letters("sharing")
    outcomes = Counter(publishers.told.values())
    print(f"\n{outcomes}, {len(heard)} heard, faults {faults}, of consumers {consumer_faults}")
    order = [message_id for _, _, message_id in heard]
    assert sorted(set(heard)) == heard
    assert len(set(order)) == len(order)
    confirmed = {message_id for message_id, told in publishers.told.items() if told == "done"} | {"last"}
    assert set() == confirmed - set(order)
    for group, entries in effects.items():
        assert [] == [place for place in heard if place[2] not in entries], group
        assert set() == set(entries) - set(order), group
        assert {1} == {entry.value for entry in entries.values()}, group
    done = sorted(effects["ordered"].values(), key=lambda entry: entry.create_revision)
    assert order == [entry.key.removeprefix("effect/ordered/") for entry in done]
    assert outcomes["done"] > 100
    assert sum(faults.values()) + sum(consumer_faults.values()) >= 8
