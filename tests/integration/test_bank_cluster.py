"""A bank on a cluster that is being broken: money moves by every kind of transaction, and none is made or lost."""

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
    Isolation,
    LostError,
    OutcomeUnknownError,
    Set,
    TransactionTimeoutError,
    open_coordinator,
    open_etcd,
)
from etcd_infra.abc import KeyRange
from etcd_infra.testing import EtcdCluster, find_etcd
from tests.helpers.etcds import crash_safe_etcd, etcd_programs

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]

ACCOUNTS = 6
DEPOSIT = 1000
BANK = KeyRange.prefix(b"bank/state/account/")


def account(number):
    return f"account/{number}"


class Bank:
    """Clients that move money, and what they were told: by transfer, "done", "refused" or "unknown"."""

    def __init__(self, draws):
        self.draws = draws
        self.told = {}
        self.ways = Counter()
        self.open = True

    async def client(self, name, endpoints):
        """Move money until the bank closes, one transfer after the other."""
        async with open_coordinator(
            endpoints, namespace="bank", node_id=name, ttl=5, call_timeout=1.0, dial_timeout=1.0
        ) as infra:
            number = 0
            while self.open:
                number += 1
                await self._transfer(infra, f"{name}.{number}")

    async def _transfer(self, infra, name):
        source, target = self.draws.sample(range(ACCOUNTS), 2)
        amount = self.draws.randint(1, 20)
        way = self.draws.choice((self._execute, self._transact, self._two_phase))
        try:
            await way(infra, name, account(source), account(target), amount)
            self.told[name] = "done"
            self.ways[way.__name__] += 1
        except OutcomeUnknownError:
            self.told[name] = "unknown"
        except (ConflictError, EtcdError, LostError, TransactionTimeoutError):
            self.told[name] = "refused"

    async def _execute(self, infra, name, source, target, amount):
        await infra.execute([Decrement(source, amount), Increment(target, amount), Set(f"did/{name}", amount)])

    async def _transact(self, infra, name, source, target, amount):
        async def body(tx):
            left = await tx.get(source, type=int)
            tx.set(target, await tx.get(target, type=int) + amount)
            tx.set(source, left - amount)
            tx.set(f"did/{name}", amount)

        level = self.draws.choice((Isolation.SERIALIZABLE_SNAPSHOT, Isolation.SERIALIZABLE))
        await infra.transact(body, level)

    async def _two_phase(self, infra, name, source, target, amount):
        async with infra.begin(ttl=3) as tx:
            tx.add(Decrement(source, amount))
            tx.add(Increment(target, amount))
            tx.add(Set(f"did/{name}", amount))
            await tx.prepare()
            await trio.sleep(self.draws.choice((0, 0.01, 0.1)))
            await tx.commit()


class Auditor:
    """Follows every account, revision by revision."""

    def __init__(self):
        self.balance = {}
        self.audited = 0
        self.wrong = []
        self.revision = 0

    async def run(self, endpoints, since):
        """Watch, and sum up after each revision."""
        async with open_etcd(endpoints) as backend:
            async with backend.watch(BANK, start_revision=since) as batches:
                async for batch in batches:
                    for event in batch.events:
                        if event.revision != self.revision:
                            self._audit()
                        self.revision = event.revision
                        self.balance[event.key] = int(event.kv.value)
                    self._audit()

    def _audit(self):
        if len(self.balance) == ACCOUNTS:
            self.audited += 1
            if sum(self.balance.values()) != ACCOUNTS * DEPOSIT:
                self.wrong.append((self.revision, dict(self.balance)))


async def break_things(cluster, draws, seconds, *, kills):
    """Kill, pause and depose members, one after the other."""
    faults = Counter()
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        member = draws.choice(cluster.members)
        fault = draws.choice(("kill", "pause", "move", "move") if kills else ("pause", "move"))
        if fault == "kill":
            await member.kill()
            await trio.sleep(draws.uniform(0.3, 1.5))
            await member.restart()
        elif fault == "pause":
            member.pause()
            await trio.sleep(draws.uniform(0.3, 2.0))
            member.resume()
        else:
            with trio.move_on_after(5):
                await cluster.move_leader()
        faults[fault] += 1
        await trio.sleep(draws.uniform(0.2, 1.0))
    return faults


@pytest.mark.parametrize(
    "seconds",
    [12, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(240)])],
    ids=["for a moment", "for longer"],
)
async def test_total_is_the_same_at_every_revision(seconds):
    """
    Transfers by `execute`, `transact` and in two phases, on three members that are killed, paused and deposed.

    The total is the same at every revision of the history; whatever was acknowledged was done once, and whatever was
    refused was not done.
    """
    program = crash_safe_etcd() or etcd_programs()[0]
    draws = random.Random(7)
    bank, auditor = Bank(draws), Auditor()
    async with EtcdCluster(3, binary=program, election_timeout=0.5) as cluster:
        endpoints = ",".join(member.endpoint for member in cluster.members)
        async with open_coordinator(endpoints, namespace="bank") as infra, trio.open_nursery() as watching:
            opened = await infra.execute([Set(account(number), DEPOSIT) for number in range(ACCOUNTS)])
            watching.start_soon(auditor.run, endpoints, opened.revision)
            with trio.fail_after(seconds + 60):
                async with trio.open_nursery() as nursery:
                    for number in range(6):
                        nursery.start_soon(bank.client, f"c{number}", endpoints)
                    faults = await break_things(cluster, draws, seconds, kills=crash_safe_etcd() is not None)
                    bank.open = False
                # Whatever is still on its way comes now, or never.
                await trio.sleep(6)
                last = await infra.state.set("end", 1)
                total = await infra.execute([Increment(account(0), 0)])
                assert total.revision > last
                while auditor.revision < total.revision:
                    await trio.sleep(0.05)
                done = {entry.key.removeprefix("did/") async for entry in infra.state.list("did/")}
            watching.cancel_scope.cancel()
    outcomes = Counter(bank.told.values())
    print(f"\n{outcomes}, done {bank.ways}, {auditor.audited} revisions audited, faults {faults}")
    assert [] == auditor.wrong[:3]
    assert set() == {name for name, told in bank.told.items() if told == "done"} - done
    assert set() == {name for name, told in bank.told.items() if told == "refused"} & done
    assert auditor.audited >= outcomes["done"] > 100
    assert min(bank.ways.values()) > 10
    assert sum(faults.values()) >= 4
