"""Real-time order, linearizability and leaks, on histories made by hand."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from math import inf

import pytest
import trio

from etcd_infra._etcd.model import KeyRange
from etcd_infra.testing import (
    CompareAndSwap,
    Inventory,
    MemoryEtcd,
    Operation,
    Read,
    Register,
    Timed,
    Write,
    check_linearizable,
    check_real_time_order,
    find_leaks,
    take_inventory,
)


def write(call, reply, revision):
    """Make a write."""
    return Timed(call, reply, revision)


def read(call, reply, revision):
    """Make a read."""
    return Timed(call, reply, revision, writes=False)


GOOD_ORDER = {
    "nothing": [],
    "one after the other": [write(0, 1, 2), write(2, 3, 3)],
    "overlapping, either way": [write(0, 5, 3), write(1, 4, 2)],
    "reads the last write": [write(0, 1, 2), read(2, 3, 2)],
    "reads on": [read(0, 1, 2), read(2, 3, 2), read(4, 5, 7)],
    "reads past while it overlaps": [write(0, 5, 2), read(1, 2, 1)],
    "no answer": [write(0, inf, 9), write(1, 2, 2), write(20, 21, 3)],
    "meets at a moment": [write(0, 1, 3), write(1, 2, 2)],
}
BAD_ORDER = {
    "order turned round": [write(0, 1, 3), write(2, 3, 2)],
    "stale read": [write(0, 1, 2), read(2, 3, 1)],
    "reads go back": [read(0, 1, 5), read(2, 3, 4)],
    "one revision for two": [write(0, 5, 2), write(1, 4, 2)],
    "write at the revision that was read": [read(0, 1, 5), write(2, 3, 5)],
    "far apart": [write(0, 1, 9), write(2, 30, 10), write(3, 31, 11), read(40, 41, 8)],
    "write without an answer in the past": [write(0, 1, 5), write(2, inf, 4)],
}


@pytest.mark.parametrize("name", GOOD_ORDER)
def test_good_order_passes(name):
    """Operations whose revisions follow real time have no violation, in whatever order they are given."""
    assert [] == check_real_time_order(GOOD_ORDER[name])
    assert [] == check_real_time_order(GOOD_ORDER[name][::-1])


@pytest.mark.parametrize("name", BAD_ORDER)
def test_bad_order_is_found(name):
    """An operation that goes back behind one that was answered before is found."""
    assert check_real_time_order(BAD_ORDER[name])
    assert check_real_time_order(BAD_ORDER[name][::-1])


def did(call, reply, request, answer=None):
    """Make an operation."""
    return Operation(call, reply, request, answer)


def swap(expected, value):
    """Ask for a compare-and-swap."""
    return CompareAndSwap(expected, value)


GOOD_REGISTER = {
    "nothing": [],
    "empty at first": [did(0, 1, Read(), (None,))],
    "write, read": [did(0, 1, Write(1), True), did(2, 3, Read(), (1,))],
    "read before an overlapping write": [did(0, 9, Write(1), True), did(1, 2, Read(), (None,))],
    "read after an overlapping write": [did(0, 9, Write(1), True), did(1, 2, Read(), (1,))],
    "two writes, either last": [
        did(0, 9, Write(1), True),
        did(0, 9, Write(2), True),
        did(10, 11, Read(), (1,)),
    ],
    "lost write that was applied": [did(0, inf, Write(1)), did(5, 6, Read(), (1,))],
    "lost write that was not": [did(0, inf, Write(1)), did(5, 6, Read(), (None,))],
    "lost write that comes late": [
        did(0, inf, Write(1)),
        did(1, 2, Write(2), True),
        did(3, 4, Read(), (2,)),
        did(5, 6, Read(), (1,)),
    ],
    "swap": [did(0, 1, Write(1), True), did(2, 3, swap(1, 2), True), did(4, 5, Read(), (2,))],
    "refused swap": [did(0, 1, Write(1), True), did(2, 3, swap(5, 2), False), did(4, 5, Read(), (1,))],
    "one of two swaps wins": [did(0, 9, swap(None, 1), True), did(0, 9, swap(None, 2), False)],
    "lost swap": [did(0, inf, swap(None, 1)), did(1, 2, Read(), (None,)), did(3, 4, Read(), (1,))],
}
BAD_REGISTER = {
    "never written": [did(0, 1, Read(), (7,))],
    "stale read": [did(0, 1, Write(1), True), did(2, 3, Write(2), True), did(4, 5, Read(), (1,))],
    "lost update": [did(0, 1, Write(1), True), did(2, 3, Read(), (None,))],
    "read from the future": [did(0, 1, Read(), (1,)), did(2, 3, Write(1), True)],
    "new, then old": [did(0, 9, Write(1), True), did(1, 2, Read(), (1,)), did(3, 4, Read(), (None,))],
    "both swaps win": [did(0, 9, swap(None, 1), True), did(0, 9, swap(None, 2), True)],
    "swap fails for no reason": [did(0, 1, swap(None, 1), False)],
    "applied twice": [
        did(0, inf, Write(1)),
        did(1, 2, Read(), (1,)),
        did(3, 4, Write(2), True),
        did(5, 6, Read(), (1,)),
    ],
    "refused and applied": [did(0, 1, swap(5, 1), False), did(2, 3, Read(), (1,))],
    "readers disagree": [
        did(0, 9, Write(1), True),
        did(0, 9, Write(2), True),
        did(10, 11, Read(), (1,)),
        did(12, 13, Read(), (2,)),
    ],
    "two orders at once": [
        did(0, 20, Write(1), True),
        did(0, 20, Write(2), True),
        did(1, 2, Read(), (1,)),
        did(3, 4, Read(), (2,)),
        did(5, 6, Read(), (1,)),
    ],
}


@pytest.mark.parametrize("name", GOOD_REGISTER)
def test_good_register_passes(name):
    """A history that some order explains is linearizable, in whatever order it is given."""
    assert [] == check_linearizable(GOOD_REGISTER[name], Register())
    assert [] == check_linearizable(GOOD_REGISTER[name][::-1], Register())


@pytest.mark.parametrize("name", BAD_REGISTER)
def test_bad_register_is_found(name):
    """A history that no order explains is not linearizable."""
    assert check_linearizable(BAD_REGISTER[name], Register())
    assert check_linearizable(BAD_REGISTER[name][::-1], Register())


@pytest.mark.parametrize("seed", range(10))
def test_random_histories(seed):
    """What a register really did passes; with one answer changed to what was never written it does not."""
    history = register_history(random.Random(seed))
    assert [] == check_linearizable(history, Register())
    index = next(index for index, each in enumerate(history) if isinstance(each.request, Read))
    history[index] = replace(history[index], answer=(-1,))
    assert check_linearizable(history, Register())


def register_history(draw):
    """Let 5 clients use a register 200 times; each operation takes effect somewhere between call and reply."""
    value, history = None, []
    for number in range(200):
        call, effect, reply = number - draw.uniform(0, 3), number, number + draw.uniform(0, 3)
        kind = draw.choice((Read(), Write(effect), swap(value, -effect), swap(-5, 0)))
        right, after = Register().step(value, kind, None)
        assert right
        answer = (value,) if isinstance(kind, Read) else True if isinstance(kind, Write) else after != value
        if isinstance(kind, CompareAndSwap):
            answer = value == kind.expected
        lost = not isinstance(kind, Read) and draw.random() < 0.05
        history.append(did(call, inf if lost else reply, kind, None if lost else answer))
        value = after
    draw.shuffle(history)
    return history


BASE = Inventory(
    keys=(b"epoch",), leases=(7,), watches=1, tasks=("main", "work"), threads=("Main",), descriptors=("a", "a")
)
NO_LEAKS = {
    "the same": (BASE, ()),
    "less": (Inventory(), ()),
    "allowed key": (replace(BASE, keys=(b"epoch", b"data")), (b"data",)),
    "another order": (replace(BASE, tasks=("work", "main")), ()),
}
LEAKS = {
    "key": replace(BASE, keys=(b"epoch", b"lock/job/1")),
    "lease": replace(BASE, leases=(7, 8)),
    "another lease": replace(BASE, leases=(8,)),
    "watch": replace(BASE, watches=2),
    "task": replace(BASE, tasks=("main", "work", "work")),
    "thread": replace(BASE, threads=("Main", "Thread-1")),
    "descriptor": replace(BASE, descriptors=("a", "a", "a")),
}


@pytest.mark.parametrize("name", NO_LEAKS)
def test_nothing_left(name):
    """What was there before, or is allowed, is no leak."""
    after, allowed = NO_LEAKS[name]
    assert [] == find_leaks(BASE, after, allowed_keys=allowed)


@pytest.mark.parametrize("name", LEAKS)
def test_left_over_is_found(name):
    """Whatever is there now and was not before is a leak, and named."""
    (violation,) = find_leaks(BASE, LEAKS[name])
    assert name.split()[-1] in violation.what


async def test_inventory_sees_what_is_there(autojump_clock):
    """An inventory lists keys, leases, watches, tasks, threads and descriptors of this very moment."""
    etcd = MemoryEtcd()
    before = take_inventory(etcd)
    await etcd.lease_grant(10, lease=7)
    await etcd.put(b"k", b"", lease=7)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left-over")
    thread.start()
    async with trio.open_nursery() as nursery, etcd.node("one").watch(KeyRange.everything()):
        nursery.start_soon(trio.sleep_forever, name="left-over")
        await trio.testing.wait_all_tasks_blocked()
        with open("/dev/null"):  # noqa: ASYNC230, PTH123
            found = [violation.what for violation in find_leaks(before, take_inventory(etcd))]
        nursery.cancel_scope.cancel()
    stop.set()
    thread.join()
    assert [
        "key b'k'",
        "lease 7",
        "task 'left-over'",
        "thread 'left-over'",
        "descriptor '/dev/null'",
        "1 open watches more",
    ] == found
    await trio.sleep(10)
    assert [] == find_leaks(before, take_inventory(etcd))
