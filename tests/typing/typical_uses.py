"""Typical uses, accepted by the type checker, never executed."""

from __future__ import annotations

from typing import assert_type

import trio

from etcd_infra import (
    Fence,
    Hold,
    Lock,
    LockInfo,
    LockLostError,
    LockStatus,
    Renewal,
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
