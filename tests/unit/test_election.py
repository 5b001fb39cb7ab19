"""Elections: who leads, who is told, and how leading ends."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from etcd_infra import Leader, LeaderStatus, LockStatus, Transition, TransitionKind
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import Compare, KeyRange, Put, Range, Txn
from etcd_infra.errors import (
    FencedError,
    InvalidRequestError,
    LeadershipLostError,
    NotHeldError,
    OutcomeUnknownError,
    SessionLostError,
    StorageFullError,
)
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import NAMESPACE, open_infra

KEYS = Keys(NAMESPACE)
LINE = KeyRange.prefix(KEYS.election_line("job"))
MEMBERS = KeyRange.prefix(KEYS.member_line("job"))


def line(etcd):
    """List the line at this very moment, oldest first."""
    return sorted((kv for kv in etcd.store.snapshot().kvs if kv.key in LINE), key=lambda kv: kv.create_revision)


def members(etcd):
    """List the registrations at this very moment."""
    return [kv for kv in etcd.store.snapshot().kvs if kv.key in MEMBERS]


@asynccontextmanager
async def nodes(etcd, count):
    """Open several coordinators, each on a node of its own."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(open_infra(etcd.node(f"n{number}"), seed=number))
            for number in range(count)
        ]


async def lead_for(infra, seconds, *, quorum=1, log=None, name="job"):
    """Lead once, for a while."""
    async with infra.election(name, quorum=quorum).lead(infra.node_id.encode()) as leadership:
        if log is not None:
            log.append(leadership.term)
        await trio.sleep(seconds)


# ── leading ─────────────────────────────────────────────────────────────────────────────────────


async def test_leads_for_the_length_of_the_body(etcd, infra, autojump_clock):
    """The key is there inside the body, with the proposal, on the session's lease, and not after it."""
    async with infra.election("job").lead(b"proposal") as leadership:
        (mine,) = line(etcd)
        assert (b"proposal", infra.session.lease.id) == (mine.value, mine.lease)
        assert mine.create_revision == leadership.term == leadership.token == leadership.fence.token
        assert infra.election("job").is_leader is infra.metrics()["is_leader"] is True
        assert 1 == len(members(etcd))
    assert [] == line(etcd) == members(etcd)
    assert LockStatus.RELEASED is leadership.status
    assert infra.election("job").is_leader is infra.metrics()["is_leader"] is False


async def test_round_trips_of_a_leadership(etcd, autojump_clock):
    """Two to lead at once, one for a proposal, two to end."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        recording.calls.clear()
        async with infra.election("job").lead() as leadership:
            assert 2 == len(recording.calls)
            await leadership.proclaim(b"value")
            assert 3 == len(recording.calls)
        assert 5 == len(recording.calls)


async def test_first_come_first_served_with_growing_terms(etcd, autojump_clock):
    """Candidates of several processes lead in the order in which they came."""
    terms = []

    async def campaign(infra) -> None:
        async with infra.election("job").lead() as leadership:
            terms.append((leadership.term, infra.node_id))
            await trio.sleep(1)

    async with nodes(etcd, 5) as infras, trio.open_nursery() as nursery:
        for infra in infras:
            nursery.start_soon(campaign, infra)
            await trio.sleep(0.1)
        await trio.sleep(20)
    assert [f"node-{number}" for number in range(5)] == [node for _, node in sorted(terms)]
    assert sorted(terms) == terms


async def test_key_goes_only_after_the_body_has_finished(etcd, autojump_clock):
    """Work that takes a second to stop: no second leader starts before it has, whatever ended it."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        order = []

        async def work() -> None:
            async with one.election("job").lead():
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(1)
                    order.append(("first stopped", len(line(etcd))))

        async def next_one() -> None:
            async with two.election("job").lead():
                order.append(("second leads", len(line(etcd))))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await trio.sleep(0.5)
            nursery.start_soon(next_one)
            await trio.sleep(1)
            await one.election("job").step_down()
    assert [("first stopped", 2), ("second leads", 1)] == order


@pytest.mark.parametrize("how", ["key deleted", "lease revoked", "partition"])
async def test_loss_cancels_the_body_and_raises(how, etcd, autojump_clock):
    """Whatever takes leadership away cancels the body; leaving raises, and says why."""
    node = etcd.node("one")
    async with open_infra(node, ttl=10) as infra:
        began = trio.current_time()
        with pytest.raises(LeadershipLostError, match="key was deleted" if how == "key deleted" else "lease"):
            async with infra.election("job").lead() as leadership:
                await trio.sleep(2)
                if how == "key deleted":
                    await etcd.delete(LINE)
                elif how == "lease revoked":
                    await etcd.lease_revoke(infra.session.lease.id)
                else:
                    node.partition()
                await trio.sleep_forever()
        assert trio.current_time() - began < 12
        expected = LockStatus.FENCED if how == "key deleted" else LockStatus.EXPIRED
        assert expected is leadership.status
        assert leadership.was_lost
        with pytest.raises(LeadershipLostError):
            leadership.check()
        write = Txn(leadership.fence.proof, (Put(b"data"),))
        if how != "partition":
            assert not (await etcd.txn(write)).succeeded
        node.heal()


async def test_partitioned_leader_stops_before_the_next_one_leads(etcd, autojump_clock):
    """A leader that can not renew has finished while its key still exists."""
    node = etcd.node("one")
    order = []
    async with open_infra(node, ttl=10) as one, open_infra(etcd.node("two"), seed=2) as two:

        async def first() -> None:
            with pytest.raises(LeadershipLostError):
                async with one.election("job").lead():
                    node.partition()
                    try:
                        await trio.sleep_forever()
                    finally:
                        order.append(("stopped", len(line(etcd))))
            node.heal()

        async def second() -> None:
            await trio.sleep(1)
            async with two.election("job").lead():
                order.append(("leads", len(line(etcd))))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            nursery.start_soon(second)
    assert [("stopped", 2), ("leads", 1)] == order


async def test_leader_after_a_long_pause_knows_at_the_first_look(etcd, autojump_clock):
    """After a pause beyond the TTL nothing says "leader" any more, without any await."""
    boot = [0.0]
    async with open_infra(etcd.node("one"), ttl=10, boot_clock=lambda: boot[0]) as infra:
        election = infra.election("job")
        with pytest.raises(LeadershipLostError):
            async with election.lead() as leadership:
                assert election.is_leader
                boot[0] += 60
                assert not election.is_leader
                assert not infra.metrics()["is_leader"]
                assert LockStatus.EXPIRED is leadership.status
                with pytest.raises(LeadershipLostError):
                    leadership.check()


async def test_renewed_campaign_demotes_nobody(etcd, infra, autojump_clock):
    """The leading task that campaigns again is told so; another task of its process waits in line."""
    election = infra.election("job")
    waited = []

    async def second() -> None:
        async with election.lead(b"second") as leadership:
            waited.append(leadership.term)

    async with trio.open_nursery() as nursery:
        async with election.lead() as leadership:
            with pytest.raises(RuntimeError, match="already"):
                async with infra.election("job").lead():
                    pytest.fail("it leads twice")
            nursery.start_soon(second)
            await trio.sleep(1)
            assert [] == waited
            leadership.check()
            assert LeaderStatus.LEADER is (await election.status()).status
        await trio.sleep(1)
    assert 1 == len(waited)
    assert waited[0] > leadership.term


async def test_two_elections_per_coordinator_are_independent(etcd, infra, autojump_clock):
    """Ending one leadership leaves the other alone, for hours."""
    async with infra.election("other").lead() as other:
        async with infra.election("job").lead():
            await trio.sleep(100)
        await trio.sleep(3600)
        other.check()
        assert infra.election("other").is_leader
        assert infra.metrics()["is_leader"]
        assert not infra.election("job").is_leader


async def test_candidate_whose_session_is_lost_campaigns_again(etcd, autojump_clock):
    """A candidate whose session or key goes stands at the line's end with a new key, and leads in its turn."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        terms = []
        async with trio.open_nursery() as nursery:
            async with one.election("job").lead():
                nursery.start_soon(collect_term, two, terms)
                await trio.sleep(1)
                before = line(etcd)
                await etcd.lease_revoke(two.session.lease.id)
                await trio.sleep(40)
                after = line(etcd)
                assert before[0].key == after[0].key
                assert not {kv.key for kv in before[1:]} & {kv.key for kv in after[1:]}
                await etcd.delete(KeyRange.one(after[1].key))
                await trio.sleep(40)
            await trio.sleep(1)
        assert 1 == len(terms)
    assert [] == line(etcd)


async def collect_term(infra, terms) -> None:
    async with infra.election("job").lead() as leadership:
        terms.append(leadership.term)


async def test_two_nodes_and_one_dies(etcd, autojump_clock):
    """The survivor of two leads as soon as the dead one's lease has run out, and goes on leading."""
    node = etcd.node("one")
    async with open_infra(etcd.node("two"), seed=2) as two:
        async with open_infra(node, seed=1, ttl=10) as one, trio.open_nursery() as nursery:
            nursery.start_soon(swallow_loss, one)
            await trio.sleep(1)
            node.partition()
            died_at = trio.current_time()
            async with two.election("job").lead() as leadership:
                assert trio.current_time() - died_at < 10 + 1.5
                await trio.sleep(100)
                leadership.check()
                assert ["node-2"] == [member.node_id for member in await two.members("job").list()]
            nursery.cancel_scope.cancel()


async def swallow_loss(infra) -> None:
    with pytest.raises(LeadershipLostError):
        await lead_for(infra, 1000)


async def test_six_restarts_under_fresh_ids(etcd, autojump_clock):
    """One node that dies six times, each time under another id, leads each time; the dead count for nothing."""
    terms = []
    for restart in range(6):
        node = etcd.node(f"n{restart}")
        async with open_infra(node, seed=restart, ttl=10) as infra:
            with trio.fail_after(12):
                with pytest.raises(LeadershipLostError):
                    async with infra.election("job").lead() as leadership:
                        state = await infra.election("job").status()
                        assert (LeaderStatus.LEADER, infra.node_id) == (state.status, state.leader_id)
                        terms.append(leadership.term)
                        node.partition()
                        await trio.sleep_forever()
    assert sorted(set(terms)) == terms


async def test_election_of_a_closed_coordinator_says_so(etcd, autojump_clock):
    """Campaigning, registering and looking after the end raise `SessionLostError`; so does waiting into it."""
    async with open_infra(etcd.node("one")) as infra:
        election, members = infra.election("job"), infra.members("job")
    for use in (election.lead, members.register, election.observe):
        with pytest.raises(SessionLostError, match="closed"):
            async with use():
                pytest.fail("it is closed")
    node = etcd.node("two")
    raised = []

    async def campaign(infra) -> None:
        try:
            async with infra.election("job").lead():
                pytest.fail("it leads")
        except SessionLostError as error:
            raised.append(str(error))

    async with trio.open_nursery() as nursery:
        async with open_infra(node, seed=2) as infra:
            node.partition()
            nursery.start_soon(campaign, infra)
            await trio.sleep(1)
    assert 1 == len(raised)


# ── yielding ────────────────────────────────────────────────────────────────────────────────────


async def test_step_down_without_anybody_listening_cancels_the_body(etcd, infra, autojump_clock):
    """The scope ends at once and without an error."""
    began = trio.current_time()
    async with infra.election("job").lead() as leadership:
        await leadership.step_down()
        await trio.sleep_forever()
    assert trio.current_time() == began
    assert LockStatus.RELEASED is leadership.status
    assert not leadership.was_lost
    assert [] == line(etcd)


async def test_leader_that_listens_yields_in_its_own_time(etcd, infra, autojump_clock):
    """Who waits to be asked is not cancelled, and ends by itself."""
    async with trio.open_nursery() as nursery, infra.election("job").lead() as leadership:

        async def ask() -> None:
            await trio.sleep(1)
            await infra.election("job").step_down()

        nursery.start_soon(ask)
        await leadership.wait_asked_to_yield()
        await trio.sleep(5)
        assert 1 == len(line(etcd))
        ended_at = trio.current_time()
    assert 6 == pytest.approx(ended_at, abs=0.1)
    assert not leadership.was_lost
    assert [] == line(etcd)


async def test_step_down_of_who_does_not_lead_does_nothing(etcd, infra, autojump_clock):
    """A follower, or nobody at all, is asked in vain."""
    await infra.election("job").step_down()
    async with open_infra(etcd.node("two"), seed=2) as two, two.election("job").lead() as leadership:
        await infra.election("job").step_down()
        await trio.sleep(5)
        leadership.check()


# ── proposals ───────────────────────────────────────────────────────────────────────────────────


async def test_proposal_keeps_lease_term_and_fence(etcd, infra, autojump_clock):
    """A proclaimed value hangs on the lease as before; the fence still holds, and leaving still works."""
    async with infra.election("job").lead(b"first") as leadership:
        await leadership.proclaim(b"second")
        await leadership.proclaim(b"third")
        (mine,) = line(etcd)
        expected = (b"third", infra.session.lease.id, leadership.term)
        assert expected == (mine.value, mine.lease, mine.create_revision)
        assert (await etcd.txn(Txn(leadership.fence.proof))).succeeded
    assert [] == line(etcd)


async def test_proposal_vanishes_with_its_leader(etcd, autojump_clock):
    """Proclaim, then die: the key goes with the lease."""
    node = etcd.node("one")
    async with open_infra(node, ttl=10) as infra:
        with pytest.raises(LeadershipLostError):
            async with infra.election("job").lead() as leadership:
                await leadership.proclaim(b"value")
                node.partition()
                await trio.sleep_forever()
        await trio.sleep(12)
        assert () == (await etcd.range(Range(LINE))).kvs


@pytest.mark.parametrize("fault", ["lose_next_request", "lose_next_answer", "refuse_next"])
async def test_proposal_survives_lost_messages(fault, etcd, autojump_clock):
    """A proposal whose request or answer is lost is there when `proclaim` returns."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra, infra.election("job").lead(b"first") as leadership:
        getattr(faulty, fault)()
        await leadership.proclaim(b"second")
        assert [b"second"] == [kv.value for kv in line(etcd)]
        await leadership.proclaim(b"third")
        assert [b"third"] == [kv.value for kv in line(etcd)]


async def test_late_copy_undoes_no_later_proposal(etcd, autojump_clock):
    """A cancelled proposal whose copy comes late never replaces the one that was made after it."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty, ttl=60) as infra, infra.election("job").lead(b"first") as leadership:
        faulty.apply_next_late(3)
        with trio.move_on_after(1):
            await leadership.proclaim(b"second")
        await leadership.proclaim(b"third")
        await trio.sleep(10)
        assert [b"third"] == [kv.value for kv in line(etcd)]


async def test_proposal_of_a_deposed_leader_changes_nothing(etcd, infra, autojump_clock):
    """The key is gone: proclaiming raises at once, and puts nothing."""
    with pytest.raises(LeadershipLostError):
        async with infra.election("job").lead() as leadership:
            await etcd.delete(LINE)
            await leadership.proclaim(b"value")
    assert [] == line(etcd)


async def test_proposal_after_the_end_is_the_callers_mistake(infra, autojump_clock):
    """Proclaiming after leaving raises, and puts nothing."""
    async with infra.election("job").lead() as leadership:
        pass
    with pytest.raises(NotHeldError):
        await leadership.proclaim(b"value")


async def test_refused_proposal_is_told(etcd, autojump_clock):
    """Etcd refuses: nothing was changed; after a lost answer that is not known."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra, infra.election("job").lead(b"first") as leadership:
        etcd.store.full = True
        with pytest.raises(StorageFullError):
            await leadership.proclaim(b"second")
        etcd.store.full = False
        assert [b"first"] == [kv.value for kv in line(etcd)]
        faulty.apply_next_late(2)
        etcd.store.full = True
        with pytest.raises(OutcomeUnknownError):
            await leadership.proclaim(b"second")
        etcd.store.full = False
        with pytest.raises(InvalidRequestError):
            await leadership.proclaim(b"x" * 2_000_000)


@pytest.mark.parametrize("value", ["text", None, 7])
async def test_bad_proposal_is_refused(etcd, infra, value, autojump_clock):
    """A proposal is bytes; nothing is sent otherwise."""
    revision = etcd.store.revision
    with pytest.raises(TypeError, match=repr(value)):
        async with infra.election("job").lead(value):
            pytest.fail("it leads")
    assert revision == etcd.store.revision
    async with infra.election("job").lead() as leadership:
        with pytest.raises(TypeError, match=repr(value)):
            await leadership.proclaim(value)


# ── working ─────────────────────────────────────────────────────────────────────────────────────


async def test_work_runs_again_under_the_next_leadership(etcd, infra, autojump_clock):
    """Lost in the middle: cancelled, elected again, run again; the result is the function's."""
    runs = []

    async def work(leadership):
        runs.append(leadership.term)
        if len(runs) < 3:
            await trio.sleep(1)
            await etcd.delete(LINE)
            await trio.sleep_forever()
        return "done"

    assert "done" == await infra.election("job").run_while_leader(work, b"value")
    assert 3 == len(runs)
    assert sorted(runs) == runs


async def test_stale_write_of_work_counts_as_the_loss(etcd, infra, autojump_clock):
    """A fenced write is refused before the loss is seen: that is the loss, not the work's failure."""
    runs = []

    async def work(leadership):
        runs.append(leadership.term)
        if len(runs) == 1:
            await etcd.delete(LINE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: infra.state.set("key", len(runs), fence=leadership.fence))
        return len(runs)

    assert 2 == await infra.election("job").run_while_leader(work)


async def test_exceptions_of_work_pass(etcd, infra, autojump_clock):
    """What the work raises ends it, also a `FencedError` that is not about this leadership."""

    async def fail(leadership):
        raise ZeroDivisionError

    async def fenced(leadership):
        msg = "another fence"
        raise FencedError(msg)

    with pytest.raises(ZeroDivisionError), trio.fail_after(1):
        await infra.election("job").run_while_leader(fail)
    with pytest.raises(FencedError), trio.fail_after(1):
        await infra.election("job").run_while_leader(fenced)
    assert [] == line(etcd)


# ── quorum ──────────────────────────────────────────────────────────────────────────────────────


async def test_who_lacks_a_quorum_is_not_in_line(etcd, autojump_clock):
    """With two of three nobody stands in line; the third one's coming elects one of them."""
    async with nodes(etcd, 3) as infras, trio.open_nursery() as nursery:
        terms = []
        for infra in infras[:2]:
            nursery.start_soon(lambda infra=infra: lead_for(infra, 1, quorum=3, log=terms))
        await trio.sleep(5)
        assert [] == line(etcd)
        assert 2 == len(members(etcd))
        state = await infras[0].election("job", quorum=3).status()
        assert (LeaderStatus.PARTITIONED, ("node-0", "node-1")) == (state.status, state.quorum.members)
        async with AsyncExitStack() as stack:
            for infra in infras:
                await stack.enter_async_context(infra.members("job").register())
            await trio.sleep(5)
            assert 2 == len(terms)
        nursery.cancel_scope.cancel()


async def test_leader_without_its_quorum_gives_up_after_its_body(etcd, autojump_clock):
    """Members go: the body is cancelled and finished, then the key is deleted, and leaving raises."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        left = trio.Event()

        async def member() -> None:
            async with two.members("job").register():
                await left.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(member)
            seen = []
            with trio.fail_after(20), pytest.raises(LeadershipLostError, match="fewer than 2"):
                async with one.election("job", quorum=2).lead() as leadership:
                    await trio.sleep(1)
                    left.set()
                    try:
                        await trio.sleep_forever()
                    finally:
                        seen.append(len(line(etcd)))
                        with pytest.raises(LeadershipLostError):
                            leadership.check()
            assert [1] == seen
            assert [] == line(etcd)


async def test_candidate_without_its_quorum_leaves_the_line(etcd, autojump_clock):
    """A candidate whose quorum goes while it waits is in line no more, and comes back with the quorum."""
    async with nodes(etcd, 3) as (one, two, three), trio.open_nursery() as nursery:
        async with one.election("job").lead():
            async with three.members("job").register():
                nursery.start_soon(lambda: lead_for(two, 1, quorum=3))
                await trio.sleep(1)
                assert 2 == len(line(etcd))
            await trio.sleep(1)
            assert 1 == len(line(etcd))
            async with three.members("job").register():
                await trio.sleep(1)
                assert 2 == len(line(etcd))
            await trio.sleep(1)
            assert 1 == len(line(etcd))
        nursery.cancel_scope.cancel()


async def test_join_proves_the_quorum_at_one_revision(etcd, autojump_clock):
    """A member goes right before the join: the join is refused, though this process had seen a quorum."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording, seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        async with two.members("job").register():
            recording.calls.clear()
            async with one.election("job", quorum=2).lead():
                pass
        joins = [call.request for call in recording.calls if writes(call.request, LINE)]
        compared = {compare.range.key for compare in joins[0].compare if compare.range.key in MEMBERS}
        assert 2 == len(compared)
        assert all(isinstance(compare, Compare) for compare in joins[0].compare)


def writes(request, keys):
    """Whether a request puts a key of a range."""
    return isinstance(request, Txn) and any(isinstance(op, Put) and op.key in keys for op in request.success)


# ── looking ─────────────────────────────────────────────────────────────────────────────────────


async def test_states_of_leader_follower_candidate(etcd, autojump_clock):
    """Nobody, a leader, a follower in line, a bystander: each says where it stands."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        mine, other = one.election("job"), two.election("job")
        state = await mine.status()
        assert (None, LeaderStatus.FOLLOWER, 0) == (state.leader_id, state.status, state.term)
        async with trio.open_nursery() as nursery, mine.lead() as leadership:
            nursery.start_soon(lead_for, two, 100)
            await trio.sleep(1)
            state, seen = await mine.status(), await other.status()
            assert ("node-1", LeaderStatus.LEADER, leadership.term) == (
                state.leader_id,
                state.status,
                state.term,
            )
            assert ("node-1", LeaderStatus.FOLLOWER, leadership.term) == (
                seen.leader_id,
                seen.status,
                seen.term,
            )
            assert ("node-1", "node-2") == state.quorum.members == seen.quorum.members
            nursery.cancel_scope.cancel()


async def test_candidate_while_nobody_leads(etcd, autojump_clock):
    """First in line by etcd, and not told yet since the answer is on its way: a candidate."""
    faulty = FaultyBackend(etcd.node("one"))
    async with open_infra(faulty) as infra, infra.members("job").register():
        election = infra.election("job")
        seen = []
        async with trio.open_nursery() as nursery, election.transitions() as events:
            faulty.only = lambda _, request: writes(request, LINE)
            faulty.delay_next(3)
            nursery.start_soon(lead_for, infra, 1)
            await trio.sleep(1)
            seen.append(await election.status())
            assert TransitionKind.BECAME_LEADER is (await anext(events)).kind
            seen.append(await election.status())
        assert [LeaderStatus.CANDIDATE, LeaderStatus.LEADER] == [state.status for state in seen]
        assert "node-1" == seen[1].leader_id


async def test_deposed_leader_that_still_cleans_up_is_none(etcd, autojump_clock):
    """Its key is gone and its body takes a while to stop: it is no leader any more, and the next one is."""
    async with nodes(etcd, 2) as (one, two), trio.open_nursery() as nursery:
        stopping = trio.Event()

        async def deposed() -> None:
            with pytest.raises(LeadershipLostError):
                async with one.election("job").lead():
                    try:
                        await trio.sleep_forever()
                    finally:
                        with trio.CancelScope(shield=True):
                            stopping.set()
                            await trio.sleep(5)

        nursery.start_soon(deposed)
        await trio.sleep(1)
        await etcd.delete(LINE)
        await stopping.wait()
        assert LeaderStatus.FOLLOWER is (await one.election("job").status()).status
        async with two.election("job").lead():
            state = await one.election("job").status()
            assert (LeaderStatus.FOLLOWER, "node-1") == (state.status, state.leader_id)
            assert not one.election("job").is_leader


async def test_partitioned_while_the_session_can_not_confirm_itself(etcd, autojump_clock):
    """A renewal is overdue: PARTITIONED, at once and without a request; healed, it is the leader again."""
    node = etcd.node("one")
    async with open_infra(node, ttl=30) as infra:
        election = infra.election("job")
        async with election.lead():
            await trio.sleep(1)
            node.partition()
            await trio.sleep(9)
            began = trio.current_time()
            state = await election.status()
            assert (LeaderStatus.PARTITIONED, None, began) == (
                state.status,
                state.leader_id,
                trio.current_time(),
            )
            node.heal()
            await trio.sleep(5)
            assert LeaderStatus.LEADER is (await election.status()).status


async def test_partition_that_no_renewal_has_noticed_yet(etcd, autojump_clock):
    """The question itself brings no answer: PARTITIONED."""
    node = etcd.node("one")
    async with open_infra(node, ttl=30) as infra:
        node.partition()
        assert LeaderStatus.PARTITIONED is (await infra.election("job").status()).status


async def test_observer_sees_every_leader_and_proposal(etcd, autojump_clock):
    """Nobody, a leader, its proposals, the next leader, nobody; terms never decrease."""
    seen = []

    async def follow(infra, task_status) -> None:
        async with infra.election("job").observe() as leaders:
            task_status.started()
            async for leader in leaders:
                seen.append(leader)  # noqa: PERF401

    async with (
        open_infra(etcd.node("one"), seed=1) as one,
        open_infra(etcd.node("two"), seed=2) as two,
        open_infra(etcd.node("three"), seed=3) as three,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(follow, three)
        async with one.election("job").lead(b"a") as first:
            nursery.start_soon(lead_for, two, 5)
            await trio.sleep(1)
            nursery.start_soon(lead_for, three, 1)
            await first.proclaim(b"b")
            await trio.sleep(1)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    second, third = seen[3].term, seen[4].term
    expected = [
        None,
        Leader("node-1", first.term, b"a"),
        Leader("node-1", first.term, b"b"),
        Leader("node-2", second, b"node-2"),
        Leader("node-3", third, b"node-3"),
        None,
    ]
    assert expected == seen
    assert first.term < second < third


async def test_observer_survives_partition_and_compaction(etcd, autojump_clock):
    """Cut off while leaders change and history is compacted: then it tells the leader of now."""
    node = etcd.node("three")
    async with (
        open_infra(etcd.node("one"), seed=1) as one,
        open_infra(node, seed=3) as three,
        three.election("job").observe() as leaders,
    ):
        assert None is await anext(leaders)
        node.partition()
        for _ in range(3):
            await lead_for(one, 1)
        async with one.election("job").lead(b"now") as leadership:
            await etcd.compact(etcd.store.revision)
            node.heal()
            with trio.fail_after(20):
                assert Leader("node-1", leadership.term, b"now") == await anext(leaders)


async def test_observer_names_foreign_leaders_by_their_lease(etcd, infra, autojump_clock):
    """`etcdctl elect` has no session key of ours: its lease is its name."""
    lease = (await etcd.lease_grant(60)).lease
    await etcd.put(KEYS.election_line("job") + b"%x" % lease, b"go", lease=lease)
    async with infra.election("job").observe() as leaders:
        leader = await anext(leaders)
    assert (f"lease {lease:x}", b"go") == (leader.leader_id, leader.value)
    assert f"lease {lease:x}" == (await infra.election("job").status()).leader_id


async def test_transitions_come_in_pairs(etcd, autojump_clock):
    """Became leader, partitioned, healed, lost: each once, in order, with the term."""
    node = etcd.node("one")
    seen = []
    async with open_infra(node, ttl=30) as infra, trio.open_nursery() as nursery:

        async def follow(task_status) -> None:
            async with infra.election("job").transitions() as events:
                task_status.started()
                async for event in events:
                    seen.append(event)  # noqa: PERF401

        await nursery.start(follow)
        async with infra.election("job").lead() as leadership:
            await trio.sleep(1)
            node.partition()
            await trio.sleep(10)
            node.heal()
            await trio.sleep(10)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    expected = [
        Transition(TransitionKind.BECAME_LEADER, leadership.term),
        Transition(TransitionKind.PARTITIONED),
        Transition(TransitionKind.HEALED),
        Transition(TransitionKind.LOST, leadership.term),
    ]
    assert expected == seen


async def test_missing_quorum_is_a_partition_from_the_start(etcd, autojump_clock):
    """One node of a quorum of two: PARTITIONED; the second one heals it; what holds already comes first."""
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(etcd.node("two"), seed=2) as two:
        async with one.election("job", quorum=2).transitions() as events:
            assert Transition(TransitionKind.PARTITIONED) == await anext(events)
            async with one.members("job").register(), two.members("job").register():
                assert Transition(TransitionKind.HEALED) == await anext(events)
            assert Transition(TransitionKind.PARTITIONED) == await anext(events)
        async with one.election("job").lead() as leadership, one.election("job").transitions() as events:
            assert Transition(TransitionKind.BECAME_LEADER, leadership.term) == await anext(events)


async def test_lost_session_is_a_partition_until_the_next_one(etcd, infra, autojump_clock):
    """The lease is revoked: lost and partitioned; with the next session healed."""
    seen = []
    async with infra.election("job").transitions() as events:
        with pytest.raises(LeadershipLostError):
            async with infra.election("job").lead():
                await etcd.lease_revoke(infra.session.lease.id)
                await trio.sleep_forever()
        seen = [(await anext(events)).kind for _ in range(4)]
    assert TransitionKind.BECAME_LEADER is seen[0]
    assert {TransitionKind.LOST, TransitionKind.PARTITIONED, TransitionKind.HEALED} == set(seen[1:])
    assert seen.index(TransitionKind.PARTITIONED) < seen.index(TransitionKind.HEALED)


async def test_one_resignation_wakes_one_of_a_thousand(etcd, autojump_clock):
    """A thousand candidates wait: a hand-over costs the next one a look, and the others nothing."""
    recording = RecordingBackend(etcd.node("many"))
    async with open_infra(etcd.node("one"), seed=1) as one, open_infra(recording, seed=2, ttl=60) as many:
        terms = []
        async with trio.open_nursery() as nursery:
            async with one.election("job").lead():
                for _ in range(1000):
                    nursery.start_soon(lambda: lead_for(many, 1, log=terms))
                await trio.sleep(5)
                assert 1001 == len(line(etcd))
                recording.calls.clear()
            await trio.sleep(0.2)
            assert 1 == len(terms)
            assert ["range"] == recording.verbs()
            nursery.cancel_scope.cancel()
    assert [] == line(etcd)
