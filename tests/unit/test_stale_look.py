"""A waiter whose look and whose watch do not show the same."""

from __future__ import annotations

import pytest
import trio

from etcd_infra._etcd.model import KeyRange, Put, Range, SortTarget
from etcd_infra._etcd.wrapping import Wrapping
from etcd_infra.testing import FaultyBackend
from tests.conftest import NAMESPACE, open_infra

LINE = KeyRange.prefix(f"{NAMESPACE}/lock/job/".encode())


class StaleOnce(Wrapping):
    """Answers the first look at the line as it was when the waiter had joined, before the holder went."""

    def __init__(self, inner, release):
        super().__init__(inner)
        self._release = release
        self._stale = None
        self.looks = 0

    async def around(self, verb, request, call):
        """See `Wrapping`."""
        if verb == "range" and request.range == LINE:
            self.looks += 1
            if self._stale is not None:
                stale, self._stale = self._stale, None
                await trio.lowlevel.checkpoint()
                return stale
        answer = await call()
        if verb == "txn" and any(isinstance(op, Put) and op.key in LINE for op in request.success):
            newest_two = Range(LINE, sort_by=SortTarget.CREATE, descending=True, keys_only=True, limit=2)
            self._stale = await self.inner.range(newest_two)
            await self._release()
        return answer


async def test_look_that_is_older_than_the_watch_is_made_again(etcd, autojump_clock):
    """The holder goes before the waiter's watch exists, and the look shows it all the same: the waiter looks again."""
    async with open_infra(etcd.node("one"), ttl=60) as one:
        hold = await one.lock("job").acquire()
        stale = StaleOnce(etcd.node("two"), hold.release)
        async with open_infra(stale, seed=2, ttl=60) as two:
            with trio.fail_after(5):
                async with two.lock("job"):
                    assert 2 == stale.looks


async def test_release_before_the_watch_exists_is_not_missed(etcd, autojump_clock):
    """The watch takes a second to be made, and the holder goes meanwhile: the waiter is granted all the same."""
    slow = FaultyBackend(etcd.node("two"))
    slow.only = lambda verb, _: verb == "watch"
    async with open_infra(etcd.node("one"), ttl=60) as one, open_infra(slow, seed=2, ttl=60) as two:
        hold = await one.lock("job").acquire()
        slow.delay_next(1)

        async def let_go() -> None:
            await trio.sleep(0.5)
            await hold.release()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_go)
            with trio.fail_after(5):
                async with two.lock("job") as mine:
                    assert mine.token > hold.token
        assert 1 == slow.struck


@pytest.mark.parametrize("fault", ["gone", "gone while the watch is broken"])
async def test_predecessor_that_goes_before_the_joins_answer_is_not_waited_for(etcd, autojump_clock, fault):
    """The watch is open, and the holder goes while the join's answer is on its way: the lock is granted at once."""
    node = etcd.node("two")
    slow = FaultyBackend(node)
    slow.only = lambda verb, request: verb == "txn" and any(isinstance(op, Put) for op in request.success)
    async with open_infra(etcd.node("one"), ttl=60) as one, open_infra(slow, seed=2, ttl=60) as two:
        async with two.lock("other"):
            await trio.sleep(1)  # long enough for its key to be watched
            hold = await one.lock("job").acquire()
            slow.delay_next_answer(1)

            async def let_go() -> None:
                await trio.sleep(0.5)
                if fault == "gone while the watch is broken":
                    node.partition()
                await hold.release()
                node.heal()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(let_go)
                began = trio.current_time()
                with trio.fail_after(5):
                    async with two.lock("job") as mine:
                        assert mine.token > hold.token
                assert trio.current_time() - began < 2
        assert 1 == slow.struck
