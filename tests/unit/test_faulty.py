"""`FaultyBackend` by chance: a seed decides what is lost, late or doubled."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import trio

from etcd_infra._etcd.model import KeyRange
from etcd_infra.errors import CompactedError, EtcdError, OutcomeUnknownError, UnavailableError
from etcd_infra.testing import FaultRates, FaultyBackend, MemoryEtcd
from tests.conftest import open_infra

NONE = {"lost_request": 0, "lost_answer": 0, "delay": 0, "late": 0, "duplicate": 0, "cut_stream": 0}


def faulty(etcd, seed=1, **rates):
    """Wrap a node so that only these faults strike."""
    return FaultyBackend(etcd.node("one"), random.Random(seed), FaultRates(**(NONE | rates)))


async def history(seed):
    """Let a session and a lock meet faults; return what was applied when."""
    etcd = MemoryEtcd()
    backend = FaultyBackend(etcd.node("one"), random.Random(seed))
    with trio.move_on_after(120):
        async with open_infra(backend, seed=seed) as infra:
            for _ in range(10):
                try:
                    async with infra.lock("job"):
                        await trio.sleep(1)
                except EtcdError:
                    continue
    return [commit.revision for commit in etcd.store.history.commits], backend.struck


async def test_without_a_source_nothing_strikes(autojump_clock):
    """Without a source of randomness nothing strikes unless it is demanded."""
    etcd = MemoryEtcd()
    backend = FaultyBackend(etcd.node("one"))
    for _ in range(100):
        await backend.put(b"k", b"")
    assert 0 == backend.struck
    assert 101 == etcd.store.revision


async def test_same_seed_same_faults(autojump_clock):
    """The same seed strikes the same calls; another seed strikes others."""
    outcomes = []
    for seed in (1, 1, 2):
        backend = faulty(MemoryEtcd(), seed, lost_request=0.3)
        outcomes.append([await applied(backend) for _ in range(50)])
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != outcomes[2]


async def applied(backend):
    """Write once; say whether an answer came."""
    try:
        await backend.put(b"k", b"")
    except OutcomeUnknownError:
        return False
    return True


@pytest.mark.parametrize(("rate", "revision"), [("lost_request", 1), ("lost_answer", 101)])
async def test_lost_messages(rate, revision, autojump_clock):
    """A lost request is not applied, a lost answer hides a write that was; a read has no answer either way."""
    etcd = MemoryEtcd()
    backend = faulty(etcd, **{rate: 1.0})
    for _ in range(100):
        with pytest.raises(OutcomeUnknownError):
            await backend.put(b"k", b"")
    with pytest.raises(UnavailableError):
        await backend.get(b"k")
    assert revision == etcd.store.revision
    assert 101 == backend.struck


async def test_late_application(autojump_clock):
    """A late write has no answer, and is applied up to 30 s later."""
    etcd = MemoryEtcd()
    backend = faulty(etcd, late=1.0)
    for _ in range(50):
        with pytest.raises(OutcomeUnknownError):
            await backend.put(b"k", b"")
    early = etcd.store.revision
    assert 10 > early
    await trio.sleep(15)
    assert 15 < etcd.store.revision < 40
    await trio.sleep(16)
    assert 51 == etcd.store.revision


async def test_duplicates(autojump_clock):
    """A doubled write is answered once, and applied twice, the second time later."""
    etcd = MemoryEtcd()
    backend = faulty(etcd, duplicate=1.0, latest=5)
    for _ in range(20):
        await backend.put(b"k", b"")
    await trio.sleep(6)
    assert 41 == etcd.store.revision


async def test_delays(autojump_clock):
    """A delayed call takes up to `longest_delay`, and is applied before or after it."""
    etcd = MemoryEtcd()
    backend = faulty(etcd, delay=1.0, longest_delay=4)
    took = []
    for _ in range(50):
        began = trio.current_time()
        await backend.put(b"k", b"")
        took.append(trio.current_time() - began)
    assert 4 >= max(took) > 3
    assert min(took) < 1
    assert 51 == etcd.store.revision


async def test_rates_are_met(autojump_clock):
    """Over 4,000 calls each fault strikes about as often as its rate says."""
    backend = FaultyBackend(MemoryEtcd().node("one"), random.Random(1), FaultRates(latest=0, longest_delay=0))
    outcomes = Counter([await applied(backend) for _ in range(4000)])
    assert 180 < outcomes[False] < 300  # 6 %
    assert 420 < backend.struck < 620  # 13 %


@pytest.mark.parametrize("coordination", [False, True])
async def test_cut_streams_lose_nothing(coordination, autojump_clock):
    """A watch that is cut after every second batch says so each time, and loses nothing unless it starts from now."""
    etcd = MemoryEtcd()
    backend = faulty(etcd, cut_stream=0.5)
    seen, created = [], 0
    async with backend.watch(KeyRange.everything(), coordination=coordination) as stream:
        for _ in range(40):
            written = await etcd.put(b"k", b"")
            while not seen or seen[-1] < written:
                batch = await stream.receive()
                created += batch.created
                assert not batch.created or batch.revision == stream.created_revision
                seen += [event.revision for event in batch.events]
                if batch.created and coordination:
                    break
    assert 10 < created
    if not coordination:
        assert [*range(2, 42)] == seen


async def test_cut_streams_catch_up(autojump_clock):
    """A watch that is cut while it catches up goes on where it was."""
    etcd = MemoryEtcd()
    backend = faulty(etcd, cut_stream=1.0)
    for _ in range(2500):
        await etcd.put(b"k", b"")
    seen = []
    async with backend.watch(KeyRange.everything(), start_revision=2) as stream:
        while len(seen) < 2500:
            seen += [event.revision for event in (await stream.receive()).events]
    assert [*range(2, 2502)] == seen


async def test_failure_of_a_cut_stream_is_told(autojump_clock):
    """What ends the watch inside reaches whoever listens, at its creation and later."""
    etcd = MemoryEtcd()
    backend = faulty(etcd, cut_stream=1.0)
    for _ in range(3):
        await etcd.put(b"k", b"")
    await etcd.compact(3)
    async with backend.watch(KeyRange.everything(), start_revision=2) as stream:
        for _ in range(2):
            with pytest.raises(CompactedError):
                await stream.receive()


async def test_stop(autojump_clock):
    """After `stop` nothing strikes any more."""
    etcd = MemoryEtcd()
    backend = faulty(etcd, lost_request=1.0)
    backend.lose_next_answer()
    backend.stop()
    await backend.put(b"k", b"")
    assert 0 == backend.struck


async def test_demand_comes_before_chance(autojump_clock):
    """A demanded fault strikes first, and chance the calls after it."""
    etcd = MemoryEtcd()
    backend = faulty(etcd, lost_request=1.0)
    backend.lose_next_answer()
    for revision in (2, 2):
        with pytest.raises(OutcomeUnknownError):
            await backend.put(b"k", b"")
        assert revision == etcd.store.revision


@pytest.mark.parametrize(
    "rates", [{"late": -0.1}, {"late": 1.1}, {"late": 0.6, "delay": 0.6}, {"latest": -1}, {"cut_stream": 2}]
)
def test_bad_rates(rates):
    """Rates outside of 0 to 1, or above 1 together, and negative delays are refused."""
    with pytest.raises(ValueError, match=r"must not|between"):
        FaultRates(**rates)


def test_rates_need_a_source():
    """Rates without a source of randomness are refused."""
    with pytest.raises(ValueError, match="randomness"):
        FaultyBackend(MemoryEtcd(), rates=FaultRates())


async def test_locks_get_through_by_chance(autojump_clock):
    """A coordinator whose calls meet faults by chance takes and gives back a lock ten times; faults did strike."""
    for seed in range(5):
        revisions, struck = await history(seed)
        assert revisions
        assert struck
