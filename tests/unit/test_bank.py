"""A bank: three processes move money in three ways under faults, and none is ever made or lost."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import trio

from etcd_infra import (
    ConflictError,
    Decrement,
    EtcdError,
    Increment,
    LostError,
    Set,
    TransactionStatus,
    TransactionTimeoutError,
)
from etcd_infra._etcd.background import open_background
from etcd_infra.testing import FaultRates, FaultyBackend, MemoryEtcd
from tests.conftest import open_infra

ACCOUNTS = [f"account/{number}" for number in range(5)]
TOTAL = 500
PREFIX = b"test/state/account/"
RATES = FaultRates(lost_request=0.05, lost_answer=0.05, late=0.05, duplicate=0.05, longest_delay=1, latest=15)


def broken_total(etcd):
    """Look for a revision at which the accounts do not add up; None if there is none."""
    balances = {}
    for commit in etcd.store.history.between(2, etcd.store.revision):
        touched = False
        for event in commit.events:
            if event.key.startswith(PREFIX):
                balances[event.key] = int(event.kv.value)
                touched = True
        if touched and sum(balances.values()) != TOTAL:
            return commit.revision
    return None


async def by_execute(infra, source, target, amount):
    await infra.execute([Decrement(source, amount), Increment(target, amount)])
    return TransactionStatus.COMMITTED


async def by_transact(infra, source, target, amount):
    async def move(tx):
        assert TOTAL == sum((await tx.list("account/")).values()), "a run saw two moments"
        tx.set(source, await tx.get(source) - amount)
        tx.set(target, await tx.get(target) + amount)

    await infra.transact(move)
    return TransactionStatus.COMMITTED


async def in_two_phases(infra, source, target, amount):
    async with infra.begin(ttl=5) as tx:
        tx.add(Decrement(source, amount))
        tx.add(Increment(target, amount))
        await tx.prepare()
        await trio.sleep(0.1)
        await tx.commit()
    return tx.status


async def move_money(infra, draws, rounds, told):
    ways = [by_execute, by_transact, in_two_phases]
    for _ in range(rounds):
        source, target = draws.sample(ACCOUNTS, 2)
        way = draws.choice(ways)
        with trio.move_on_after(draws.choice([0.2, 5, 300])) as scope:
            try:
                told[way.__name__, str(await way(infra, source, target, draws.randint(1, 9)))] += 1
            except (ConflictError, TransactionTimeoutError, EtcdError, LostError) as error:
                told[way.__name__, type(error).__name__] += 1
        if scope.cancelled_caught:
            told[way.__name__, "cancelled"] += 1


async def run_bank(seed, told):
    """Three processes, ten transfers each; one of them crashes on the way."""
    draws = random.Random(seed)
    etcd = MemoryEtcd()
    async with open_infra(etcd.node("zero"), seed=seed) as zero:
        await zero.execute([Set(account, TOTAL // len(ACCOUNTS)) for account in ACCOUNTS])

        async def work(number: int) -> None:
            node = etcd.node(f"n{number}")
            faulty = FaultyBackend(node, random.Random(seed * 10 + number), RATES)
            async with open_infra(faulty, seed=seed * 10 + number, ttl=30) as infra:
                await move_money(infra, random.Random(seed * 10 + number), 10, told)
                faulty.stop()

        async with open_background() as background:

            async def crash() -> None:
                node = etcd.node("crashing")
                async with open_infra(node, seed=-seed) as infra, infra.begin(ttl=5) as tx:
                    tx.add(Decrement(ACCOUNTS[0]))
                    tx.add(Increment(ACCOUNTS[1]))
                    await tx.prepare()
                    await trio.sleep(draws.uniform(0, 1))
                    node.crash()
                    await trio.sleep_forever()

            background.start_soon(crash)
            async with trio.open_nursery() as nursery:
                for number in range(1, 4):
                    nursery.start_soon(work, number)
            # Everything is free again: no transaction stands in the way for ever.
            with trio.fail_after(30):
                await zero.execute([Increment(account, 0) for account in ACCOUNTS])
            await trio.sleep(40)
        assert TOTAL == sum((await zero.transact(lambda tx: tx.list("account/"))).values())
    assert None is broken_total(etcd), seed
    assert [] == [kv for kv in etcd.store.snapshot().kvs if kv.key.startswith((b"test/intent/", b"test/txn/"))]


@pytest.mark.parametrize("block", range(5))
async def test_total_is_constant_at_every_revision(autojump_clock, block):
    """100 seeds of transfers by execute, transact and two-phase, mixed, under faults and a crash: the total holds."""
    told = Counter()
    for seed in range(block * 20, block * 20 + 20):
        await run_bank(seed, told)
    for way in (by_execute, by_transact, in_two_phases):
        assert told[way.__name__, "committed"] > 100, told
        assert told[way.__name__, "cancelled"] > 0, told
