"""Two-phase transactions: promised, decided once, and in nobody's way for ever."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager, nullcontext

import pytest
import trio

from etcd_infra import (
    Cas,
    ConflictError,
    Decrement,
    Delete,
    Increment,
    InvalidRequestError,
    NotHeldError,
    OutcomeUnknownError,
    Set,
    StorageFullError,
    TransactionStatus,
    TransactionTimeoutError,
)
from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import Put, Txn
from etcd_infra.testing import FaultyBackend, MemoryEtcd, RecordingBackend
from tests.conftest import open_infra
from tests.helpers.cancelling import cancelled_at

FAULTS = ["lose_next_answer", "lose_next_request", "refuse_next", "late"]
PENDING, PREPARED, COMMITTED, ROLLED_BACK, FAILED, TIMEOUT = TransactionStatus


def keys(etcd, prefix):
    """List the keys under a prefix."""
    return [kv.key.decode() for kv in etcd.store.snapshot().kvs if kv.key.startswith(prefix)]


def left(etcd):
    """List the records and intents that are there."""
    return keys(etcd, b"test/txn/") + keys(etcd, b"test/intent/")


def values(etcd):
    """List what is stored."""
    return {
        kv.key.decode().removeprefix("test/state/"): kv.value
        for kv in etcd.store.snapshot().kvs
        if kv.key.startswith(b"test/state/")
    }


def strike(faulty, fault):
    if fault == "late":
        faulty.apply_next_late(4)
    elif fault != "none":
        getattr(faulty, fault)()


def transfer(tx, amount=5):
    tx.add(Decrement("a", amount))
    tx.add(Increment("b", amount))


@asynccontextmanager
async def renewed(etcd, tx):
    """Keep a transaction's lease alive. etcd: it may live much longer than its TTL, as after a change of leader."""

    async def renew() -> None:
        while True:
            await etcd.lease_keep_alive(tx._promise.kv.lease)
            await trio.sleep(1)

    async with open_background() as background:
        background.start_soon(renew)
        yield


async def test_prepared_and_committed(infra, etcd):
    """Nothing is changed before the commit, everything at one revision by it, nothing is left after it."""
    await infra.execute([Set("a", 50), Set("b", 50), Set("gone", 1)])
    async with infra.begin(ttl=10) as tx:
        assert PENDING is tx.status
        transfer(tx)
        tx.add(Delete("gone"))
        await tx.prepare()
        assert PREPARED is tx.status
        assert {"a": b"50", "b": b"50", "gone": b"1"} == values(etcd)
        before = etcd.store.revision
        result = await tx.commit()
        assert before + 1 == etcd.store.revision == result.revision
        assert COMMITTED is tx.status is result.status
    assert {"a": b"45", "b": b"55"} == values(etcd)
    assert [45, 55, None] == [one.value for one in result.results]
    assert [before + 1, before + 1, 0] == [one.version for one in result.results]
    assert [] == left(etcd)
    assert 1 == len(await etcd.lease_list())


@pytest.mark.parametrize("how", ["leave", "rollback", "raise"])
@pytest.mark.parametrize("prepared", [False, True])
async def test_rolled_back(infra, etcd, how, prepared):
    """Left, rolled back or raised through: nothing was changed, nothing is left, others may write at once."""
    await infra.execute([Set("a", 50), Set("b", 50)])
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") if how == "raise" else nullcontext() as caught:
        async with infra.begin() as tx:
            transfer(tx)
            if prepared:
                await tx.prepare()
            if how == "rollback":
                await tx.rollback()
                await tx.rollback()
                assert [] == keys(etcd, b"test/intent/")
            if how == "raise":
                raise error
    assert caught is None or error is caught.value
    assert ROLLED_BACK is tx.status
    assert {"a": b"50", "b": b"50"} == values(etcd)
    assert [] == left(etcd)
    assert 1 == len(await etcd.lease_list())
    with trio.fail_after(0.1):
        await infra.state.set("a", 1)


async def test_round_trips(etcd, autojump_clock):
    """Three to prepare, one to commit, one to leave; none to begin and leave."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        recording.calls.clear()
        async with infra.begin() as tx:
            transfer(tx)
        assert [] == recording.calls
        async with infra.begin() as tx:
            transfer(tx)
            await tx.prepare()
            await tx.commit()
        assert ["lease_grant", "txn", "txn", "txn", "lease_revoke"] == recording.verbs()


async def test_prepared_keys_are_kept(infra, etcd, autojump_clock):
    """No writer of this library changes a promised key before the verdict; each goes on right after it."""
    done = []

    async def write(two, name, *operations):
        await two.execute(operations) if operations else await two.state.set("a", 0)
        done.append(name)

    async def function(tx):
        tx.set("a", (await tx.get("a")) + 1000)

    await infra.execute([Set("a", 50), Set("b", 50)])
    async with open_infra(etcd.node("two"), seed=2) as two, trio.open_nursery() as nursery:
        async with infra.begin(ttl=30) as tx:
            transfer(tx)
            await tx.prepare()
            nursery.start_soon(write, two, "execute", Increment("b", 100))
            nursery.start_soon(write, two, "many", *[Set(f"b{i}", 1) for i in range(20)], Increment("b", 100))
            nursery.start_soon(two.transact, function)
            await trio.sleep(20)
            assert [] == done
            await tx.commit()
        await trio.sleep(2)
        assert ["execute", "many"] == sorted(done)
    assert b"1045" == values(etcd)["a"]
    assert b"255" == values(etcd)["b"]


async def test_blocked_writers_do_not_poll(etcd, autojump_clock):
    """100 writers of one process wait for a promised key: one look each, one watch, and no call meanwhile."""
    recording = RecordingBackend(etcd.node("two"))
    async with (
        open_infra(etcd.node("one"), ttl=3600) as one,
        open_infra(recording, seed=2, ttl=3600) as two,
        trio.open_nursery() as nursery,
    ):
        async with one.begin(ttl=60) as tx:
            tx.add(Increment("n"))
            await tx.prepare()
            for _ in range(100):
                nursery.start_soon(two.execute, [Set("n", 1)])
            await trio.sleep(5)
            assert 1 == recording.verbs().count("watch")
            recording.calls.clear()
            await trio.sleep(20)
            assert [] == recording.calls
            await tx.commit()


async def test_crashed_owner_is_resolved_by_anybody(etcd, autojump_clock):
    """The owner crashes after its prepare: a blocked writer goes on when the transaction's time is over."""
    node = etcd.node("one")
    async with open_infra(etcd.node("two"), seed=2) as two:
        await two.execute([Set("a", 50), Set("b", 50)])
        async with trio.open_nursery() as nursery:

            async def own() -> None:
                async with open_infra(node) as one, one.begin(ttl=10) as tx:
                    transfer(tx)
                    await tx.prepare()
                    await trio.sleep_forever()

            nursery.start_soon(own)
            await trio.sleep(1)
            node.crash()
            began = trio.current_time()
            await two.execute([Increment("a")])
            assert 5 < trio.current_time() - began < 12
            nursery.cancel_scope.cancel()
        assert {"a": b"51", "b": b"50"} == values(etcd)


async def test_timeout_is_written_and_the_late_commit_is_refused(infra, etcd, autojump_clock):
    """A blocked writer writes TIMEOUT when it has waited for the TTL; the owner's later commit changes nothing."""
    await infra.execute([Set("a", 50), Set("b", 50)])
    async with open_infra(etcd.node("two"), seed=2) as two:
        with pytest.raises(TransactionTimeoutError):
            async with infra.begin(ttl=10) as tx:
                transfer(tx)
                await tx.prepare()
                async with renewed(etcd, tx):
                    began = trio.current_time()
                    await two.execute([Increment("a")])
                    assert 10 <= trio.current_time() - began < 11
                    (record,) = keys(etcd, b"test/txn/")
                    assert b'"timeout"' in (await etcd.get(record.encode())).value
                    assert PREPARED is tx.status
                    await tx.commit()
        assert TIMEOUT is tx.status
    assert {"a": b"51", "b": b"50"} == values(etcd)
    assert [] == left(etcd)


async def test_own_time_over(infra, etcd, autojump_clock):
    """A commit after the TTL, with nobody else around: TIMEOUT, also if the lease still lives."""
    for lives in (False, True):
        async with infra.begin(ttl=5) as tx:
            tx.add(Set("a", 1))
            await tx.prepare()
            async with renewed(etcd, tx) if lives else nullcontext():
                await trio.sleep(6)
                assert lives == (await etcd.get(b"test/intent/a") is not None)
                assert 0 == tx.remaining()
                with pytest.raises(TransactionTimeoutError, match="5 s"):
                    await tx.commit()
            assert TIMEOUT is tx.status
            await tx.rollback()
            assert TIMEOUT is tx.status
            with pytest.raises(NotHeldError):
                await tx.commit()
        assert {} == values(etcd)


async def test_prepare_that_waits_too_long_times_out(infra, etcd, autojump_clock):
    """A prepare that is blocked by another transaction for longer than its own time is TIMEOUT; nothing is left."""
    async with infra.begin(ttl=60) as one:
        one.add(Set("a", 1))
        await one.prepare()
        async with infra.begin(ttl=5) as two:
            two.add(Set("a", 2))
            with pytest.raises(TransactionTimeoutError):
                await two.prepare()
            assert TIMEOUT is two.status
        assert 2 == len(left(etcd))
        await one.commit()
    assert {"a": b"1"} == values(etcd)


async def test_failed_prepare(infra, etcd):
    """A Cas on another version fails the prepare: FAILED, ConflictError, nothing is promised."""
    version = await infra.state.set("k", 1)
    async with infra.begin() as tx:
        tx.add(Set("a", 1))
        tx.add(Cas("k", 2, expected_version=version + 1))
        with pytest.raises(ConflictError) as caught:
            await tx.prepare()
        assert (1, "k", version) == (caught.value.index, caught.value.key, caught.value.version)
        assert FAILED is tx.status
        assert [] == left(etcd)
        with pytest.raises(NotHeldError):
            await tx.commit()
        await tx.rollback()
    assert FAILED is tx.status
    assert 1 == len(await etcd.lease_list())


async def test_foreign_writer_is_noticed(infra, etcd):
    """`etcdctl` minds no intents: the commit finds its version, fails, and changes nothing."""
    await infra.execute([Set("a", 50), Set("b", 50)])
    async with infra.begin() as tx:
        transfer(tx)
        await tx.prepare()
        await etcd.put(b"test/state/a", b"7")
        with pytest.raises(ConflictError):
            await tx.commit()
        assert FAILED is tx.status
    assert {"a": b"7", "b": b"50"} == values(etcd)
    assert [] == left(etcd)


async def test_wrong_order_is_a_mistake(infra, etcd):
    """What is out of order raises NotHeldError: above all a rollback after the commit."""
    async with infra.begin() as tx:
        with pytest.raises(NotHeldError):
            await tx.commit()
        tx.add(Set("a", 1))
        await tx.prepare()
        for wrong in (tx.prepare,):
            with pytest.raises(NotHeldError):
                await wrong()
        with pytest.raises(NotHeldError):
            tx.add(Set("b", 1))
        await tx.commit()
        with pytest.raises(NotHeldError, match="committed"):
            await tx.rollback()
        with pytest.raises(NotHeldError):
            await tx.commit()
        assert COMMITTED is tx.status
    with pytest.raises(NotHeldError):
        await tx.prepare()
    assert {"a": b"1"} == values(etcd)


@pytest.mark.parametrize(
    ("ttl", "error"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), (2.5, TypeError), (10**12, ValueError)],
)
async def test_bad_ttls(infra, ttl, error):
    """A TTL is whole seconds, at least one; what is none is refused by `begin` itself."""
    with pytest.raises(error):
        infra.begin(ttl=ttl)


async def test_bad_operations(infra, etcd):
    """What is no operation, or can not be stored, is refused by `add`."""
    async with infra.begin() as tx:
        for bad, error in [("set", TypeError), (Set("", 1), ValueError), (Set("a", float("nan")), ValueError)]:
            with pytest.raises(error):
                tx.add(bad)
        await tx.prepare()
        await tx.commit()
    assert {} == values(etcd)


async def test_budget(etcd, autojump_clock):
    """The largest transaction is prepared and committed; one key more, or too many bytes, is refused at once."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        async with infra.begin() as tx:
            for number in range(110):
                tx.add(Increment(f"k{number}"))
            await tx.prepare()
            await tx.commit()
        assert 110 == len(values(etcd))
        recording.calls.clear()
        for operations in ([Set(f"k{number}", 1) for number in range(111)], [Set("a", bytes(1_572_864))]):
            async with infra.begin() as tx:
                for operation in operations:
                    tx.add(operation)
                with pytest.raises(InvalidRequestError, match="over the budget"):
                    await tx.prepare()
        assert [] == recording.calls


@pytest.mark.parametrize("strikes", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", ["prepare", "commit", "rollback"])
async def test_lost_messages(etcd, autojump_clock, fault, strikes, step):
    """Whatever is lost at whichever step: the outcome is told truthfully, and happens once."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        await infra.execute([Set("a", 50), Set("b", 50)])
        async with infra.begin(ttl=20) as tx:
            transfer(tx)
            for name in ("prepare", "rollback" if step == "rollback" else "commit"):
                if name == step:
                    for _ in range(strikes):
                        strike(faulty, fault)
                await getattr(tx, name)()
        assert (ROLLED_BACK if step == "rollback" else COMMITTED) is tx.status
        # A grant that arrives after its revocation leaves a lease without keys until its TTL.
        await trio.sleep(40 if step == "prepare" and fault == "late" else 10)
        assert ({"a": b"50", "b": b"50"} if step == "rollback" else {"a": b"45", "b": b"55"}) == values(etcd)
        assert [] == left(etcd)
        assert 1 == len(await etcd.lease_list())


async def both(infra):
    async with infra.begin(ttl=20) as tx:
        transfer(tx)
        await tx.prepare()
        await tx.commit()


async def prepared_only(infra):
    async with infra.begin(ttl=20) as tx:
        transfer(tx)
        await tx.prepare()
        await tx.rollback()


@pytest.mark.parametrize("fault", ["none", *FAULTS])
@pytest.mark.parametrize("skipped", [0, 1, 2])
@pytest.mark.parametrize("operation", [both, prepared_only])
async def test_cancelled_at_every_step(autojump_clock, operation, fault, skipped):
    """Cancelled at any step under any fault: all or nothing, nothing left, and the keys are free within seconds."""
    step = 0
    while True:
        step += 1
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"))
        writes = faulty.only
        seen = 0

        def only(verb, request, writes=writes):
            nonlocal seen
            seen += writes(verb, request)
            return writes(verb, request) and seen > skipped

        async with open_infra(faulty, ttl=60) as infra:
            await infra.execute([Set("a", 50), Set("b", 50)])
            faulty.only, seen = only, 0
            strike(faulty, fault)
            reached = await cancelled_at(step, lambda infra=infra: operation(infra))
            faulty.forget_faults()
            with trio.fail_after(3):
                await infra.execute([Increment("a", 100)])
            settled = values(etcd)
            outcomes = [{"a": b"150", "b": b"50"}]
            if operation is both:
                outcomes.append({"a": b"145", "b": b"55"})
            assert settled in outcomes
            await trio.sleep(30 if fault == "late" else 10)
            assert settled == values(etcd)
            assert [] == left(etcd)
            assert 1 == len(await etcd.lease_list())
        if not reached:
            break
    assert step > 8


async def test_crash_at_every_step_is_resolved_by_another_node(autojump_clock):
    """The owner's process dies at each of its steps: another node writes within the TTL; all or nothing, for good."""
    step, outcomes = 0, set()
    while True:
        step += 1
        etcd = MemoryEtcd()
        node = etcd.node("one")
        async with open_infra(etcd.node("two"), seed=2, ttl=60) as two:
            await two.execute([Set("a", 50), Set("b", 50)])

            reached = []

            async def own(node=node, step=step, reached=reached) -> None:
                async with open_infra(node, ttl=60) as one:
                    await one.state.set("warm", 1)
                    await crashed_at(node, step, one, reached)

            with trio.move_on_after(0.5):
                await own()
            node.crash()
            began = trio.current_time()
            await two.execute([Increment("a", 100), Increment("b", 0)])
            assert trio.current_time() - began <= 21
            settled = values(etcd)
            outcomes.add((settled["a"], settled["b"]))
            await trio.sleep(30)
            assert settled == values(etcd)
            assert [] == left(etcd)
        if not reached:
            break
    assert {(b"150", b"50"), (b"145", b"55")} == outcomes
    assert step > 8


async def crashed_at(node, step, infra, reached):
    """Run a transaction whose process dies at `step`; note if it had that many steps."""

    class Crash(trio.abc.Instrument):
        left, task = step, trio.lowlevel.current_task()

        def before_task_step(self, task) -> None:
            if task is self.task and self.left:
                self.left -= 1
                if not self.left:
                    reached.append(step)
                    node.crash()

    crash = Crash()
    trio.lowlevel.add_instrument(crash)
    try:
        await both(infra)
    finally:
        trio.lowlevel.remove_instrument(crash)


@pytest.mark.parametrize("writes", [True, False])
async def test_zombie_commit_changes_nothing(infra, etcd, autojump_clock, writes):
    """The owner sleeps with its commit on the way, another decides TIMEOUT, the commit arrives: one verdict."""
    faulty = FaultyBackend(etcd.node("zombie"))
    async with open_infra(faulty, seed=3, ttl=300) as zombie:
        await infra.execute([Set("a", 50), Set("b", 50)])
        async with zombie.begin(ttl=10) as tx:
            transfer(tx)
            await tx.prepare()
            faulty.apply_next_late(25)
            with trio.move_on_after(0.001):
                await tx.commit()
            async with renewed(etcd, tx):
                async with infra.begin(ttl=30) as other:
                    other.add(Increment("a"))
                    await other.prepare()
                    if writes:
                        await other.commit()
                await trio.sleep(20)
                assert {"a": b"51" if writes else b"50", "b": b"50"} == values(etcd)
                with pytest.raises(TransactionTimeoutError):
                    await tx.commit()


async def test_cancelled_commit_whose_record_has_ended_is_unknown(etcd, autojump_clock):
    """A commit is cancelled without an answer and its record ends: nobody can tell, and nobody claims to."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=300) as infra:
        async with infra.begin(ttl=5) as tx:
            tx.add(Set("a", 1))
            await tx.prepare()
            faulty.lose_next_answer()
            with trio.move_on_after(0.001):
                await tx.commit()
            await trio.sleep(20)
            for end in (tx.commit, tx.rollback):
                with pytest.raises(OutcomeUnknownError):
                    await end()
            assert PREPARED is tx.status
        assert PREPARED is tx.status


async def test_commit_that_can_not_be_settled_is_unknown(etcd, autojump_clock):
    """A commit's answer is lost for longer than the record lives: OutcomeUnknownError, and it was applied."""
    node = etcd.node("one")
    faulty = FaultyBackend(node)
    async with open_infra(faulty, ttl=300) as infra:
        async with infra.begin(ttl=5) as tx:
            tx.add(Set("a", 1))
            await tx.prepare()
            faulty.lose_next_answer()

            async def cut() -> None:
                node.partition()
                await trio.sleep(20)
                node.heal()

            async with trio.open_nursery() as nursery:

                async def when_struck() -> None:
                    while "a" not in values(etcd):
                        await trio.sleep(0.0001)
                    await cut()

                nursery.start_soon(when_struck)
                with pytest.raises(OutcomeUnknownError):
                    await tx.commit()
        assert {"a": b"1"} == values(etcd)


async def test_session_lost_while_the_lease_is_granted(etcd, autojump_clock):
    """The session ends while prepare waits for its lease: it goes on with the next one, and commits."""
    node = etcd.node("one")
    async with open_infra(node, ttl=3) as infra, infra.begin(ttl=60) as tx:
        session = infra.session
        tx.add(Set("a", 1))
        async with open_background() as background:

            async def cut() -> None:
                node.partition()
                await trio.sleep(10)
                node.heal()

            background.start_soon(cut)
            await tx.prepare()
        assert session.lease.is_lost()
        await tx.commit()
    assert {"a": b"1"} == values(etcd)
    assert [] == left(etcd)


@pytest.mark.parametrize("fault", ["lose_next_answer", "lose_next_request", "late"])
async def test_commit_without_an_answer_and_then_refused_is_unknown(etcd, autojump_clock, fault):
    """A commit's answer is missing and its second copy is refused (no space): nobody says that it was not applied."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=300) as infra, infra.begin(ttl=30) as tx:
        tx.add(Set("a", 1))
        await tx.prepare()
        strike(faulty, fault)
        etcd.store.full = fault == "lose_next_request"
        async with open_background() as background:

            async def fill() -> None:
                while fault == "lose_next_answer" and "a" not in values(etcd):
                    await trio.sleep(0.0001)
                etcd.store.full = True

            background.start_soon(fill)
            with pytest.raises(OutcomeUnknownError):
                await tx.commit()
        etcd.store.full = False


@pytest.mark.parametrize("commits", [False, True])
async def test_full_store_lets_go(infra, etcd, commits):
    """With etcd's quota used up a rollback still works, also after a commit that was refused: the lease is revoked."""
    async with infra.begin() as tx:
        tx.add(Set("a", 1))
        await tx.prepare()
        etcd.store.full = True
        if commits:
            with pytest.raises(StorageFullError):
                await tx.commit()
        await tx.rollback()
        assert ROLLED_BACK is tx.status
    assert [] == keys(etcd, b"test/intent/")


async def test_intent_without_its_record_blocks_nobody(infra, etcd, autojump_clock):
    """An intent whose record is missing (it should not be) is removed by whoever meets it."""
    await etcd.txn(Txn(success=(Put(b"test/intent/a", b"nobody"),)))
    with trio.fail_after(1):
        await infra.execute([Increment("a")])
    assert [] == left(etcd)


async def test_inspect_shows_prepared_transactions(infra, etcd):
    """`inspect` names id, status, owner, keys, time left and begin of what is prepared."""
    async with infra.begin(ttl=30) as tx:
        transfer(tx)
        await tx.prepare()
        (info,) = await infra.inspect("transactions")
        assert (tx.transaction_id, PREPARED, "node-1") == (info.transaction_id, info.status, info.node_id)
        assert ("a", "b") == info.keys
        assert 28 <= info.ttl <= 30
    assert () == await infra.inspect("transactions")


async def test_three_transactions_in_a_ring_take_turns(autojump_clock):
    """Transactions that want each other's keys in different order never dead-lock: 3 processes, 10 rounds each."""
    etcd = MemoryEtcd()

    async def work(number: int) -> None:
        faulty = FaultyBackend(etcd.node(f"n{number}"), random.Random(number))
        async with open_infra(faulty, seed=number, ttl=300) as infra:
            done = 0
            while done < 10:
                try:
                    async with infra.begin(ttl=60) as tx:
                        tx.add(Increment("xyz"[number]))
                        tx.add(Increment("xyz"[(number + 1) % 3]))
                        await tx.prepare()
                        await trio.sleep(0.1)
                        await tx.commit()
                    done += 1
                except TransactionTimeoutError:
                    pass
            faulty.stop()

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(work, number)
    assert {"x": b"20", "y": b"20", "z": b"20"} == values(etcd)
