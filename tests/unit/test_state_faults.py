"""State under lost answers, lost requests, refusals, late applications and cancellations."""

from __future__ import annotations

import random

import pytest
import trio

from etcd_infra import DELETE, ConflictError, FencedError, OutcomeUnknownError
from etcd_infra._etcd.model import KeyRange
from etcd_infra.testing import FaultRates, FaultyBackend, MemoryEtcd
from tests.conftest import open_infra
from tests.helpers.cancelling import cancelled_at

KEY = b"test/state/k"
FAULTS = {
    "answered": lambda _: None,
    "refused": lambda backend: backend.refuse_next(),
    "request lost": lambda backend: backend.lose_next_request(),
    "answer lost": lambda backend: backend.lose_next_answer(),
    "answer lost twice": lambda backend: (backend.lose_next_answer(), backend.lose_next_answer()),
    "applied late": lambda backend: backend.apply_next_late(3),
    "applied late, then lost": lambda backend: (backend.apply_next_late(3), backend.lose_next_answer()),
    "slow": lambda backend: backend.delay_next(1),
}
WRITES = {
    "set": (lambda state: state.set("k", "new"), b'"new"'),
    "set with TTL": (lambda state: state.set("k", "new", ttl=3600), b'"new"'),
    "get_or_set": (lambda state: state.get_or_set("k", lambda: "new"), None),
    "update": (lambda state: state.update("k", lambda value: f"{value}+"), b'"old+"'),
    "update to DELETE": (lambda state: state.update("k", lambda _: DELETE), "deleted"),
    "swap by value": (lambda state: state.compare_and_swap("k", "new", expected_value="old"), b'"new"'),
    "failing swap": (lambda state: state.compare_and_swap("k", "new", expected_version=0), None),
    "delete": (lambda state: state.delete("k"), "deleted"),
}
TXNS = {"set with TTL": lambda verb, request: verb == "txn" and not request.is_read_only}


def history(etcd, key=KEY):
    """List what was ever under the key, in order."""
    commits = etcd.store.history.between(2, etcd.store.revision)
    return [
        "deleted" if event.is_delete else event.kv.value
        for commit in commits
        for event in commit.events
        if event.key == key
    ]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("write", WRITES)
async def test_every_write_is_applied_once(etcd, autojump_clock, write, fault):
    """Whatever happens to a write's messages, it is applied exactly once, and later copies change nothing."""
    operation, expected = WRITES[write]
    faulty = FaultyBackend(etcd.node("one"))
    faulty.only = TXNS.get(write, faulty.only)
    async with open_infra(faulty) as infra:
        await infra.state.set("k", "old")
        FAULTS[fault](faulty)
        await operation(infra.state)
        faulty.forget_faults()
        wanted = [b'"old"'] + ([expected] if expected else [])
        assert wanted == history(etcd)
        await etcd.put(KEY, b"1")
        await trio.sleep(10)
        assert [*wanted, b"1"] == history(etcd)


@pytest.mark.parametrize("fault", FAULTS)
async def test_results_are_true(etcd, autojump_clock, fault):
    """Versions, booleans and conflicts that are told with a lost answer are those of the store."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        state = infra.state

        async def under_fault(operation):
            FAULTS[fault](faulty)
            try:
                return await operation
            finally:
                faulty.forget_faults()

        async def version():
            found = await etcd.get(KEY)
            return found.mod_revision if found else 0

        assert await under_fault(state.set("k", 1)) == await version()
        first = await version()
        entry = await under_fault(state.update("k", lambda value: value + 1))
        assert entry == await state.get("k")
        result = await under_fault(state.compare_and_swap("k", 3, expected_version=entry.version))
        assert (True, await version(), 3) == (result.swapped, result.version, result.current_value)
        result = await under_fault(state.compare_and_swap("k", 4, expected_version=first))
        assert (False, await version(), 3) == (result.swapped, result.version, result.current_value)
        with pytest.raises(ConflictError):
            await under_fault(state.delete("k", expected_version=first))
        assert True is await under_fault(state.delete("k", expected_version=await version()))
        assert False is await under_fault(state.delete("k"))
        entry = await under_fault(state.get_or_set("k", lambda: 9))
        assert entry == await state.get("k")
        assert True is await under_fault(state.delete("k"))
        async with infra.lock("job") as hold:
            fence = hold.fence
        with pytest.raises(FencedError):
            await under_fault(state.set("k", 5, fence=fence))
        await trio.sleep(10)
        assert 0 == await version()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("write", WRITES)
async def test_cancelled_at_every_step(autojump_clock, write, fault):
    """A write cancelled at any step, under any fault, is applied once or not at all, and not after the next."""
    operation, expected = WRITES[write]
    step = 0
    while True:
        step += 1
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"))
        async with open_infra(faulty) as infra:
            await infra.state.set("k", "old")
            FAULTS[fault](faulty)
            reached = await cancelled_at(step, lambda infra=infra: operation(infra.state))
            faulty.forget_faults()
            await infra.state.set("k", "next")
            told = [entry for entry in history(etcd) if entry != b'"next"']
            if not reached:
                assert [b'"old"'] + ([expected] if expected else []) == told
            assert told in ([b'"old"'], [b'"old"', expected])
            await trio.sleep(10)
            assert 1 == history(etcd).count(b'"next"')
            late = [entry for entry in history(etcd) if entry != b'"next"']
            # Nobody reused the slot before the janitor had settled it: the late copy is in no doubt then.
            assert late in ([b'"old"'], [b'"old"', expected])
            assert infra.session.janitor.known_keys >= {infra.session.own_key.key}
        if not reached:
            break
    assert step > 2


async def test_read_to_decide(etcd, autojump_clock):
    """A first copy that lands 5 s after its answer was lost has no double effect, and loses no update."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        await infra.state.set("k", 1)
        faulty.apply_next_late(5)
        await infra.state.update("k", lambda value: value + 1)
        await infra.state.update("k", lambda value: value * 10)
        await trio.sleep(10)
        assert [b"1", b"2", b"20"] == history(etcd)


async def test_refused_swap_never_comes_later(etcd, autojump_clock):
    """A create-if-absent that was refused while a copy was out is refused for good, also once the key is gone."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        await infra.state.set("k", 1)
        faulty.apply_next_late(5)
        assert not (await infra.state.compare_and_swap("k", 2, expected_version=0)).swapped
        await infra.state.delete("k")
        await trio.sleep(10)
        assert [b"1", "deleted"] == history(etcd)


async def test_timeout_does_not_mean_failed(etcd, autojump_clock):
    """An answer that never comes, and a session that ends: OutcomeUnknownError with the key, never "failed"."""
    node = etcd.node("one")
    faulty = FaultyBackend(node)
    async with open_infra(faulty, ttl=5) as infra:
        faulty.lose_next_answer()

        async def cut():
            await trio.sleep(0.001)
            node.partition()
            await trio.sleep(20)
            node.heal()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            with pytest.raises(OutcomeUnknownError) as caught:
                await infra.state.set("k", 1)
        assert KEY in caught.value.keys
        assert [b"1"] == history(etcd)


@pytest.mark.parametrize("applied", [True, False], ids=["applied", "lost"])
async def test_ttl_lease_that_ends_while_an_answer_is_missing(etcd, autojump_clock, applied):
    """The TTL's lease ends before a copy is repeated: the slot tells whether the first one was applied."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra:
        mine = set(await etcd.lease_list())
        faulty.only = TXNS["set with TTL"]
        if applied:
            faulty.lose_next_answer()
        else:
            faulty.lose_next_request()

        async def end_lease():
            await trio.sleep(0.001)
            (lease,) = set(await etcd.lease_list()) - mine
            await etcd.lease_revoke(lease)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_lease)
            version = await infra.state.set("k", 1, ttl=60)
        if applied:
            # It was written, and its time was over: both are true.
            assert [b"1", "deleted"] == history(etcd)
        else:
            assert version == (await etcd.get(KEY)).mod_revision
            assert [b"1"] == history(etcd)


async def test_cancelled_ttl_write_leaves_no_key_for_ever(autojump_clock):
    """A write with a TTL, cancelled at any step: neither key nor lease outlives the TTL."""
    step = 0
    while True:
        step += 1
        etcd = MemoryEtcd()
        faulty = FaultyBackend(etcd.node("one"))
        async with open_infra(faulty, ttl=60) as infra:
            leases = set(await etcd.lease_list())
            faulty.delay_next_answer(0.5)
            reached = await cancelled_at(step, lambda infra=infra: infra.state.set("k", 1, ttl=10))
            await trio.sleep(15)
            assert None is await etcd.get(KEY)
            assert leases == set(await etcd.lease_list())
        if not reached:
            break
    assert step > 3


async def test_random_faults_lose_no_update(autojump_clock):
    """40 seeds, two nodes, random faults: every told update is in the value, and none twice."""
    for seed in range(40):
        etcd = MemoryEtcd()
        rates = FaultRates(lost_request=0.05, lost_answer=0.08, late=0.08, duplicate=0.08, latest=8.0)
        nodes = [FaultyBackend(etcd.node(str(n)), random.Random(seed * 2 + n), rates) for n in range(2)]
        told, unknown = [], []
        async with open_infra(nodes[0], seed=seed + 1) as one, open_infra(nodes[1], seed=seed + 1000) as two:

            async def work(infra, name, told=told, unknown=unknown):
                for number in range(4):
                    mark = f"{name}.{number}"
                    try:
                        await infra.state.update("k", lambda value, mark=mark: [*(value or ()), mark])
                        told.append(mark)
                    except OutcomeUnknownError:
                        unknown.append(mark)

            async with trio.open_nursery() as nursery:
                for name in range(4):
                    nursery.start_soon(work, (one, two)[name % 2], name)
            for node in nodes:
                node.stop()
            await trio.sleep(10)
            final = (await one.state.get("k")).value
        assert len(final) == len(set(final)), seed
        assert set(told) <= set(final) <= set(told) | set(unknown), seed


async def test_deleting_a_slot_by_hand_harms_no_write(infra, etcd, autojump_clock):
    """An operator deletes all slots: the next write is applied once."""
    await infra.state.set("k", 1)
    await etcd.delete(KeyRange.prefix(infra.session.own_key.key + b"/op/"))
    await infra.state.set("k", 2)
    assert [b"1", b"2"] == history(etcd)
