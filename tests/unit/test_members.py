"""Members: who is there, who joined, who left and who died."""

from __future__ import annotations

import pytest
import trio

from etcd_infra import Member, MemberChange, TransitionKind
from etcd_infra._etcd.keys import Keys
from etcd_infra._etcd.model import KeyRange
from etcd_infra.errors import StorageFullError
from etcd_infra.testing import FaultyBackend, RecordingBackend
from tests.conftest import NAMESPACE, open_infra

KEYS = Keys(NAMESPACE)
LINE = KeyRange.prefix(KEYS.member_line("web"))


def registrations(etcd):
    """List the registrations at this very moment."""
    return [kv for kv in etcd.store.snapshot().kvs if kv.key in LINE]


async def node_ids(infra):
    return [member.node_id for member in await infra.members("web").list()]


async def test_registered_for_the_length_of_the_body(etcd, infra, autojump_clock):
    """A node is a member inside the body, with its metadata, and not after it."""
    members = infra.members("web")
    assert () == await members.list()
    async with members.register({"zone": "a", "weight": 3}):
        (mine,) = registrations(etcd)
        since = infra.session.clock.wall()
        expected = Member("node-1", {"zone": "a", "weight": 3}, pytest.approx(since), mine.create_revision)
        assert (expected,) == await members.list()
        assert infra.session.lease.id == mine.lease
    assert [] == registrations(etcd)


async def test_one_round_trip_each_way(etcd, autojump_clock):
    """Registering and leaving cost one round trip each."""
    recording = RecordingBackend(etcd.node("one"))
    async with open_infra(recording) as infra:
        recording.calls.clear()
        async with infra.members("web").register():
            assert 1 == len(recording.calls)
        assert 2 == len(recording.calls)


async def test_distinct_nodes_are_counted(etcd, infra, autojump_clock):
    """Two registrations of one node are one member; a quorum counts nodes."""
    async with infra.members("web").register(), infra.members("web").register({"second": True}):
        assert 2 == len(registrations(etcd))
        (member,) = await infra.members("web").list()
        assert member.meta == {"second": True}
        assert await infra.members("web").has_quorum(1)
        assert not await infra.members("web").has_quorum(2)
        async with open_infra(etcd.node("two"), seed=2) as two, two.members("web").register():
            assert await infra.members("web").has_quorum(2)


async def test_quorum_view_counts_nodes(etcd, infra, autojump_clock):
    """A node that is registered twice is one candidate: it does not lead where two nodes must be there."""
    async with infra.members("web").register(), infra.members("web").register():
        with trio.move_on_after(5) as patience:
            async with infra.election("web", quorum=2).lead():
                pytest.fail("it leads alone")
        assert patience.cancelled_caught
        async with (
            open_infra(etcd.node("two"), seed=2) as two,
            infra.election("web", quorum=2).transitions() as events,
        ):
            assert TransitionKind.PARTITIONED is (await anext(events)).kind
            async with two.members("web").register():
                assert TransitionKind.HEALED is (await anext(events)).kind
            with trio.fail_after(5):
                assert TransitionKind.PARTITIONED is (await anext(events)).kind


async def test_quorum_of_an_unknown_group_is_not_met(infra, autojump_clock):
    """Nobody registered: there is no quorum, not even of one."""
    assert not await infra.members("nobody").has_quorum(1)


async def test_restarted_node_is_not_removed_by_its_old_registration(etcd, infra, autojump_clock):
    """A pod dies and is back under its id before its old lease ends: it is a member throughout."""
    events = []

    async def follow(task_status) -> None:
        async with infra.members("web").observe() as watch:
            task_status.started()
            async for event in watch:
                events.append((event.change, event.member.node_id, event.member.meta))  # noqa: PERF401

    async with trio.open_nursery() as nursery:
        await nursery.start(follow)
        dead = etcd.node("pod")
        async with open_infra(dead, seed=2, node_id="pod-0", ttl=10) as first, trio.open_nursery() as old:
            old.start_soon(keep_registered, first, {"run": 1})
            await trio.sleep(1)
            async with open_infra(etcd.node("new"), seed=3, node_id="pod-0") as second:
                dead.partition()
                async with second.members("web").register({"run": 2}):
                    await trio.sleep(30)
                    assert ["pod-0"] == await node_ids(infra)
                    assert 1 == len(registrations(etcd))
            old.cancel_scope.cancel()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    expected = [
        (MemberChange.JOINED, "pod-0", {"run": 1}),
        (MemberChange.CHANGED, "pod-0", {"run": 2}),
        (MemberChange.LEFT, "pod-0", {"run": 2}),
    ]
    assert expected == events


async def keep_registered(infra, meta=None) -> None:
    async with infra.members("web").register(meta):
        await trio.sleep_forever()


async def test_who_left_is_told_from_who_died(etcd, infra, autojump_clock):
    """A member that unregisters LEFT; one whose session ends DIED."""
    async with open_infra(etcd.node("two"), seed=2) as two, infra.members("web").observe() as watch:
        async with two.members("web").register():
            joined = await anext(watch)
        left = await anext(watch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_registered, two)
            again = await anext(watch)
            await etcd.lease_revoke(two.session.lease.id)
            died = await anext(watch)
            back = await anext(watch)
            nursery.cancel_scope.cancel()
    changes = [event.change for event in (joined, left, again, died, back)]
    expected = [
        MemberChange.JOINED,
        MemberChange.LEFT,
        MemberChange.JOINED,
        MemberChange.DIED,
        MemberChange.JOINED,
    ]
    assert expected == changes
    assert {"node-2"} == {event.member.node_id for event in (joined, left, again, died, back)}
    assert joined.revision < left.revision < again.revision < died.revision < back.revision


async def test_departure_while_history_was_compacted_is_gone(etcd, infra, autojump_clock):
    """What happened to a member while nobody could look is not invented."""
    faulty = FaultyBackend(etcd.node("watcher"))
    async with (
        open_infra(faulty, seed=3) as watcher,
        open_infra(etcd.node("two"), seed=2) as two,
        watcher.members("web").observe() as watch,
    ):
        async with two.members("web").register():
            assert MemberChange.JOINED is (await anext(watch)).change
            faulty.inner.partition()
            await trio.sleep(1)
        await etcd.put(b"other", b"")
        await etcd.compact(etcd.store.revision)
        faulty.inner.heal()
        gone = await anext(watch)
    assert (MemberChange.GONE, "node-2", 0) == (gone.change, gone.member.node_id, gone.revision)


async def test_registration_survives_its_session(etcd, infra, autojump_clock):
    """The session is lost: the body goes on, and the node is registered under the next one."""
    async with infra.members("web").register({"zone": "a"}):
        (old,) = registrations(etcd)
        await etcd.lease_revoke(infra.session.lease.id)
        await trio.sleep(40)
        (new,) = registrations(etcd)
        assert old.lease != new.lease == infra.session.lease.id
    assert [] == registrations(etcd)


async def test_deleted_registration_is_made_anew(etcd, infra, autojump_clock):
    """An operator deletes the key of a living member: it registers again."""
    async with infra.members("web").register():
        await trio.sleep(1)
        await etcd.delete(LINE)
        await trio.sleep(1)
        assert 1 == len(registrations(etcd))


async def test_foreign_keys_are_no_members(etcd, infra, autojump_clock):
    """A key that is no registration is passed over."""
    await etcd.put(KEYS.member_line("web") + b"junk", b"\xff")
    await etcd.put(KEYS.member_line("web") + b"number", b"7")
    async with infra.members("web").register(), infra.members("web").observe() as watch:
        assert ["node-1"] == await node_ids(infra)
        assert "node-1" == (await anext(watch)).member.node_id
        await etcd.delete(KeyRange.one(KEYS.member_line("web") + b"junk"))


async def test_refused_registration_is_told(etcd, autojump_clock):
    """Etcd has no room for the registration: entering raises, and the body does not run."""
    async with open_infra(etcd.node("one")) as infra:
        etcd.store.full = True
        with pytest.raises(StorageFullError):
            async with infra.members("web").register():
                pytest.fail("the body ran")
        etcd.store.full = False
        assert [] == registrations(etcd)


@pytest.mark.parametrize(
    ("required", "error"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), ("2", TypeError), (1.5, TypeError)],
)
async def test_bad_quorum_is_refused(infra, required, error, autojump_clock):
    """A quorum is a positive int; nothing is sent otherwise."""
    with pytest.raises(error, match=str(required)):
        await infra.members("web").has_quorum(required)
    with pytest.raises(error, match=str(required)):
        infra.election("web", quorum=required)


@pytest.mark.parametrize("meta", [7, "zone", {"x": float("nan")}, {"x": object()}])
async def test_bad_metadata_is_refused(etcd, infra, meta, autojump_clock):
    """Metadata that JSON can not express is refused before anything is sent."""
    revision = etcd.store.revision
    with pytest.raises((TypeError, ValueError)):
        async with infra.members("web").register(meta):
            pytest.fail("the body ran")
    assert revision == etcd.store.revision
