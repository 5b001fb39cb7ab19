"""What goes wrong in elections by vote and heartbeat, asked of ours: each is a fact about who leads, and who is told."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from etcd_infra import LeadershipLostError, LeaderStatus, TransitionKind
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange
from tests.conftest import NAMESPACE, open_infra

LINE = KeyRange.prefix(Keys(NAMESPACE).election_line("job"))


@asynccontextmanager
async def following(infra, *, quorum=1):
    """Gather a node's transitions for the length of a block."""
    seen = []
    async with trio.open_nursery() as nursery, infra.election("job", quorum=quorum).transitions() as events:

        async def follow() -> None:
            async for event in events:
                seen.append(event.kind)  # noqa: PERF401

        nursery.start_soon(follow)
        await trio.sleep(0.1)
        yield seen
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()


async def lead(infra, task_status=trio.TASK_STATUS_IGNORED, *, quorum=1):
    """Lead until cancelled."""
    async with infra.election("job", quorum=quorum).lead() as leadership:
        task_status.started(leadership)
        await trio.sleep_forever()


async def test_second_candidate_of_two_is_a_follower_and_no_partition(etcd, autojump_clock):
    """With a leader and a candidate, both healthy, the candidate follows, and nobody hears of a partition."""
    async with (
        open_infra(etcd.node("one"), seed=1) as one,
        open_infra(etcd.node("two"), seed=2) as two,
        following(one) as of_one,
        following(two) as of_two,
        trio.open_nursery() as nursery,
    ):
        leadership = await nursery.start(lead, one)
        for _ in range(3):  # asking again, and giving up, changes nothing
            with trio.move_on_after(5):
                await lead(two)
            state = await two.election("job").status()
            assert (LeaderStatus.FOLLOWER, "node-1") == (state.status, state.leader_id)
            assert leadership.is_held()
            assert leadership.term == state.term
        assert [TransitionKind.BECAME_LEADER] == of_one
        assert [] == of_two
        nursery.cancel_scope.cancel()


async def test_leader_stays_leader_for_hours(etcd, autojump_clock):
    """While the leader lives, its term stays, and a candidate stays a follower in line."""
    async with (
        open_infra(etcd.node("one"), seed=1) as one,
        open_infra(etcd.node("two"), seed=2) as two,
        trio.open_nursery() as nursery,
    ):
        leadership = await nursery.start(lead, one)
        nursery.start_soon(lead, two)
        for _ in range(6):
            await trio.sleep(600)
            state = await two.election("job").status()
            assert (LeaderStatus.FOLLOWER, leadership.term) == (state.status, state.term)
            assert leadership.remaining() > 10
        nursery.cancel_scope.cancel()


async def test_quorum_of_three_leads_once_and_asks_again_in_vain(etcd, autojump_clock):
    """The third of three brings the quorum: one leads and stays; the others are followers without a partition."""
    async with (
        open_infra(etcd.node("one"), seed=1) as one,
        open_infra(etcd.node("two"), seed=2) as two,
        open_infra(etcd.node("three"), seed=3) as three,
        following(two, quorum=3) as of_two,
        trio.open_nursery() as nursery,
    ):
        nodes = (one, two, three)
        for infra in nodes:
            leaders = [node for node in nodes if node.election("job").is_leader]
            assert [] == leaders
            nursery.start_soon(lambda infra=infra: lead(infra, quorum=3))
            await trio.sleep(5)
        (leader,) = [node for node in nodes if node.election("job").is_leader]
        term = (await leader.election("job").status()).term
        with trio.move_on_after(5):
            await lead(leader, quorum=3)
        await trio.sleep(100)
        states = [await node.election("job", quorum=3).status() for node in nodes]
        assert {(leader.node_id, term)} == {(state.leader_id, state.term) for state in states}
        assert [LeaderStatus.FOLLOWER] * 2 == [state.status for state in states if state.status != "leader"]
        # It was partitioned until the third one came, and is told that this is over.
        assert [TransitionKind.PARTITIONED, TransitionKind.HEALED] == [
            kind for kind in of_two if kind in {TransitionKind.PARTITIONED, TransitionKind.HEALED}
        ]
        nursery.cancel_scope.cancel()


async def test_lone_node_of_three_is_partitioned_and_told(infra, autojump_clock):
    """One node where three must be there: it does not lead, says PARTITIONED, and its listener is told once."""
    async with following(infra, quorum=3) as seen, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: lead(infra, quorum=3))
        await trio.sleep(60)
        assert LeaderStatus.PARTITIONED is (await infra.election("job", quorum=3).status()).status
        assert not infra.election("job").is_leader
        nursery.cancel_scope.cancel()
    assert [TransitionKind.PARTITIONED] == seen


async def test_registering_is_no_quorum(etcd, infra, autojump_clock):
    """A group is judged by who is registered now: unknown, registered alone, two, and alone again."""
    members = infra.members("job")
    assert not await members.has_quorum(2)
    async with members.register():
        assert not await members.has_quorum(2)
        async with open_infra(etcd.node("two"), seed=2) as two:
            async with two.members("job").register():
                assert await members.has_quorum(2)
        assert not await members.has_quorum(2)


async def test_three_leaderships_of_a_lone_node(etcd, autojump_clock):
    """Each is a term of its own, told once at its beginning and once at its end, on a lease of the TTL asked for."""
    async with open_infra(etcd.node("one"), ttl=5) as infra, following(infra) as seen:
        terms = []
        for _ in range(3):
            async with infra.election("job").lead() as leadership:
                terms.append(leadership.term)
                await trio.sleep(20)
                assert 0 < leadership.remaining() <= 5
                assert 5 == (await etcd.lease_time_to_live(infra.session.lease.id)).granted_ttl
        await trio.sleep(1)
        assert sorted(set(terms)) == terms
        assert [TransitionKind.BECAME_LEADER, TransitionKind.LOST] * 3 == seen


async def test_deposed_leader_is_told_once_and_within_a_second(etcd, infra, autojump_clock):
    """Its key is deleted by somebody else: the work is cancelled, the listener hears LOST, nothing says leader."""
    async with following(infra) as seen:
        with pytest.raises(LeadershipLostError):
            async with infra.election("job").lead():
                await trio.sleep(2)
                await etcd.delete(LINE)
                with trio.fail_after(1):
                    await trio.sleep_forever()
        assert not infra.election("job").is_leader
        assert LeaderStatus.LEADER is not (await infra.election("job").status()).status
    assert [TransitionKind.BECAME_LEADER, TransitionKind.LOST] == seen


async def test_resigned_at_once_is_resigned(infra, autojump_clock):
    """Leading and leaving in one breath: nothing that was on its way says leader afterwards."""
    async with following(infra) as seen:
        for _ in range(5):
            async with infra.election("job").lead():
                pass
            assert not infra.election("job").is_leader
        await trio.sleep(10)
        assert not infra.election("job").is_leader
        state = await infra.election("job").status()
        assert (None, LeaderStatus.FOLLOWER, 0) == (state.leader_id, state.status, state.term)
    assert TransitionKind.LOST is seen[-1]
    assert seen.count(TransitionKind.BECAME_LEADER) == seen.count(TransitionKind.LOST)


async def test_leader_whose_renewals_fail_is_none_before_the_next_one(etcd, autojump_clock):
    """Its renewals get no answer: it has stopped, and says so, when another node's term begins."""
    node = etcd.node("one")
    async with (
        open_infra(node, seed=1, ttl=10) as one,
        open_infra(etcd.node("two"), seed=2, ttl=10) as two,
        trio.open_nursery() as nursery,
    ):
        stopped_at = []

        async def work() -> None:
            with pytest.raises(LeadershipLostError):
                try:
                    await lead(one)
                finally:
                    stopped_at.append(trio.current_time())

        nursery.start_soon(work)
        await trio.sleep(1)
        node.partition()
        next_one = await nursery.start(lead, two)
        assert [] != stopped_at
        assert stopped_at[0] < trio.current_time()
        assert not one.election("job").is_leader
        assert next_one.is_held()
        node.heal()
        nursery.cancel_scope.cancel()


async def test_ending_one_election_leaves_the_other_s_lease_alone(etcd, infra, autojump_clock):
    """Two elections of one coordinator, the first one is left: the second one's listener and flag see nothing."""
    other = infra.election("other")
    seen = []
    async with trio.open_nursery() as nursery, other.lead() as leadership, other.transitions() as events:

        async def follow() -> None:
            async for event in events:
                seen.append(event.kind)  # noqa: PERF401

        nursery.start_soon(follow)
        async with infra.election("job").lead():
            await trio.sleep(1)
        await trio.sleep(3600)
        assert other.is_leader
        assert leadership.is_held()
        assert [TransitionKind.BECAME_LEADER] == seen
        nursery.cancel_scope.cancel()


async def test_two_coordinators_on_one_backend_have_one_leader(etcd, autojump_clock):
    """They share a connection and a node id, and are two candidates all the same."""
    backend = etcd.node("one")
    async with (
        open_infra(backend, seed=1, node_id="same") as one,
        open_infra(backend, seed=2, node_id="same") as two,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(lead, one)
        nursery.start_soon(lead, two)
        await trio.sleep(60)
        assert one.election("job").is_leader
        assert not two.election("job").is_leader
        nursery.cancel_scope.cancel()
