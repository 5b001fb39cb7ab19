"""Typical uses, accepted by the type checker, never executed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_type

import trio

from etcd_infra import (
    DeadLetter,
    Delivery,
    Fence,
    GroupMessage,
    Hold,
    Lock,
    LockInfo,
    LockLostError,
    LockStatus,
    Message,
    Publish,
    Receipt,
    Renewal,
    Retention,
    Topic,
    open_coordinator,
    open_etcd,
)
from etcd_infra.abc import Backend, Call, KeyValue, Put, Txn, TxnResult
from etcd_infra.testing import EtcdServer, FaultyBackend, MemoryEtcd, RecordingBackend


def on_overdue(hold: Hold, error: Exception) -> None:
    print(hold.remaining(), error)


def observe(call: Call) -> None:
    print(call.verb, call.duration)


async def locks() -> None:
    async with open_coordinator("memory://", namespace="ns", ttl=10, observer=observe) as infra:
        lock = infra.lock("job", ttl=10, renewal=Renewal.MANUAL, on_renewal_failure=on_overdue)
        assert_type(lock, Lock)
        async with lock as hold:
            assert_type(hold, Hold)
            assert_type(hold.fence, Fence)
            assert_type(hold.token, int)
            assert_type(hold.status, LockStatus)
            assert_type(await hold.extend(), float)
            answer = await infra.backend.txn(Txn(hold.fence.proof, (Put(b"k", b"v"),)))
            assert_type(answer, TxnResult)
        async with lock.attempt() as maybe:
            assert_type(maybe, Hold | None)
        assert_type(await lock.inspect(), LockInfo)
        assert_type(await lock.current_token(), int | None)
        try:
            (await lock.acquire()).check()
        except LockLostError as error:
            print(error)


async def backends() -> None:
    async with EtcdServer() as server, open_etcd([server.endpoint]) as backend:
        assert_type(backend, Backend)
        assert_type(await backend.get(b"k"), KeyValue | None)
    etcd = MemoryEtcd()
    faulty = FaultyBackend(etcd.node("a"))
    faulty.lose_next_answer()
    recording = RecordingBackend(faulty)
    async with open_coordinator(recording, boot_clock=trio.current_time):
        assert_type(recording.verbs(), list[str])


@dataclass
class Order:
    """A payload."""

    number: int


async def topics() -> None:
    async with open_coordinator("memory://") as infra:
        topic = infra.topic("orders", type=Order, retention=Retention(count=10))
        assert_type(topic, Topic[Order])
        assert_type(infra.topic("anything"), Topic[Any])
        assert_type(await topic.publish(Order(1), delivery=Delivery.EXACTLY_ONCE, message_id="1"), Receipt)
        async with topic.subscribe() as messages:
            async for message in messages:
                assert_type(message, Message[Order])
        async with topic.subscribe(group="billing", ack_after=10.0, max_retries=2) as consumed:
            async for message in consumed:
                assert_type(message, GroupMessage[Order])
                async with message as entered:
                    assert_type(entered.payload, Order)
                async with message.transaction() as tx:
                    tx.publish("other", message.payload)
                await message.nack(delay=1)
        assert_type(await topic.dead_letters("billing"), tuple[DeadLetter[Order], ...])
        await infra.execute([Publish("orders", Order(2))])
