"""Transactions on real servers: every Txn that they are made of, the largest ones, and processes that compete."""

from __future__ import annotations

import pytest
import trio

from etcd_infra import (
    Cas,
    ConflictError,
    Decrement,
    Delete,
    Increment,
    InvalidRequestError,
    Isolation,
    Set,
    TransactionStatus,
    TransactionTimeoutError,
    open_coordinator,
)
from etcd_infra._primitives._budget import MAX_REQUEST_BYTES
from etcd_infra.testing import EtcdServer, find_etcd, open_proxy
from tests.helpers.etcds import every_etcd

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]


@every_etcd()
async def test_execute_on_a_real_server(program):
    """Folded operations, conflicts, lost versions: as in memory."""
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        with trio.fail_after(30):
            result = await infra.execute(
                [Set("a", 1), Delete("b"), Increment("n", 2), Decrement("n"), Cas("k", "v", expected_version=0)]
            )
            assert [True, False, True, True, True] == [one.success for one in result.results]
            assert 1 == (await infra.state.get("n")).value
            with pytest.raises(ConflictError) as caught:
                await infra.execute([Set("a", 2), Cas("k", "w", expected_version=1), Increment("n")])
            assert (1, "k", result.revision) == (caught.value.index, caught.value.key, caught.value.version)
            async with infra.lock("job") as hold:
                await infra.execute([Increment("n", 9)], fence=hold.fence)
            version = await infra.state.set("leased", 1, ttl=60)
            await infra.execute([Cas("leased", 2, expected_version=version), Increment("leased")])
            leased = await infra.state.get("leased")
            assert 3 == leased.value
            assert leased.lease
            assert (1, 10) == ((await infra.state.get("a")).value, (await infra.state.get("n")).value)


@every_etcd()
@pytest.mark.parametrize(
    ("operations", "most"),
    [
        (lambda n: [Set(f"key-{i}", i) for i in range(n)], 63 * 64),
        (lambda n: [Delete(f"key-{i}") for i in range(n)], 63 * 64),
        (lambda n: [Increment(f"key-{i}") for i in range(n)], 110),
        (lambda n: [Cas(f"key-{i}", i, expected_version=0) for i in range(n)], 110),
        (lambda n: [*[Set(f"s-{i}", i) for i in range(1776)], *[Increment(f"i-{i}") for i in range(n)]], 108),
    ],
)
async def test_largest_transactions(program, operations, most):
    """The largest transaction passes on a real server, taken or refused; one more is refused before it is sent."""
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        with trio.fail_after(60):
            done = await infra.execute(operations(most))
            assert most <= len(done.results)
            if isinstance(operations(1)[0], Cas):
                with pytest.raises(ConflictError):
                    await infra.execute(operations(most))
            with pytest.raises(InvalidRequestError, match="over the budget"):
                await infra.execute(operations(most + 1))


@every_etcd()
async def test_largest_value(program):
    """The largest value that is sent is taken by a real server."""
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        with pytest.raises(InvalidRequestError) as caught:
            await infra.execute([Set("k", bytes(MAX_REQUEST_BYTES))])
        size = int(str(caught.value).split(" bytes")[0].split()[-1])
        with trio.fail_after(30):
            await infra.execute([Set("k", bytes(2 * MAX_REQUEST_BYTES - size))])
            half = (2 * MAX_REQUEST_BYTES - size) // 2 - 200
            await infra.execute([Set("k", bytes(half)), Set("l", bytes(half))])


@every_etcd()
async def test_transact_on_a_real_server(program):
    """Every level, ranges, phantoms, read-only runs, and a run that waits for a change."""
    async with EtcdServer(program) as server, open_coordinator(server.endpoint, namespace="ns") as infra:
        with trio.fail_after(60):
            await infra.execute([Set(f"p/{number:03}", number) for number in range(100)])

            async def total(tx):
                found = sum((await tx.list("p/")).values())
                tx.set("sum", found)
                return found

            for level in Isolation:
                assert 4950 == await infra.transact(total, level)
                assert 4950 == await infra.transact(lambda tx: tx.get("sum"), level)
            left = ["p/000"]

            async def disturbed(tx):
                found = await total(tx)
                if left:
                    await infra.state.delete(left.pop())
                    await infra.state.set("p/1", 50)
                return found

            await infra.state.delete("p/099")
            assert 4950 - 99 + 50 == await infra.transact(disturbed)

            async def wait(tx):
                if await tx.get("flag") is None:
                    await tx.retry()
                return await tx.get("flag")

            async with trio.open_nursery() as nursery:

                async def act() -> None:
                    await trio.sleep(0.3)
                    await infra.state.set("flag", "up")

                nursery.start_soon(act)
                assert "up" == await infra.transact(wait)


@every_etcd()
async def test_two_phases_on_a_real_server(program):
    """Prepare keeps the keys, commit and rollback free them; who is blocked for too long decides on TIMEOUT."""
    async with (
        EtcdServer(program) as server,
        open_coordinator(server.endpoint, namespace="ns") as one,
        open_coordinator(server.endpoint, namespace="ns") as two,
    ):
        with trio.fail_after(60):
            await one.execute([Set("a", 50), Set("b", 50)])
            async with one.begin(ttl=10) as tx:
                for number in range(110):
                    tx.add(Increment(f"k{number}"))
                await tx.prepare()
                assert (tx.transaction_id,) == tuple(
                    info.transaction_id for info in await two.inspect("transactions")
                )
                await tx.commit()
            async with one.begin(ttl=10) as tx:
                tx.add(Decrement("a", 5))
                tx.add(Increment("b", 5))
                await tx.prepare()
                with trio.move_on_after(0.5) as blocked:
                    await two.execute([Increment("a")])
                assert blocked.cancelled_caught
                await tx.commit()
            await two.execute([Increment("a")])
            assert (46, 55) == ((await two.state.get("a")).value, (await two.state.get("b")).value)
            async with one.begin(ttl=10) as tx:
                tx.add(Set("a", 0))
                await tx.prepare()
            assert TransactionStatus.ROLLED_BACK is tx.status
            async with one.begin(ttl=3) as tx:
                tx.add(Set("a", 0))
                await tx.prepare()
                await two.execute([Increment("a")])
                with pytest.raises(TransactionTimeoutError):
                    await tx.commit()
            assert 47 == (await two.state.get("a")).value
            assert () == await two.inspect("transactions")


@every_etcd()
async def test_lost_answers_count_once(program):
    """Connections break under 60 transactions of three kinds: each is applied exactly once."""
    async with EtcdServer(program) as server, open_proxy(server.endpoint) as proxy:
        async with open_coordinator(proxy.endpoint, namespace="ns") as infra:

            async def disturb() -> None:
                while True:
                    await trio.sleep(0.15)
                    proxy.reset()

            async def increment(tx):
                tx.set("n", (await tx.get("n") or 0) + 1)

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(disturb)
                    for _ in range(20):
                        await infra.execute([Increment("n")])
                        await infra.transact(increment)
                        async with infra.begin(ttl=20) as tx:
                            tx.add(Increment("n"))
                            await tx.prepare()
                            await tx.commit()
                    nursery.cancel_scope.cancel()
                assert 60 == (await infra.state.get("n")).value
