"""
A number that many tasks and processes add to, each exactly once.

Keys
    ``{ns}state/{name}``  the number, as state of type int has it: with JSON decimal text, of any size.

Algorithm
    1. One batch is in flight per counter and process; what is asked for meanwhile waits, and becomes the next
       batch. A `reset` is a batch of its own.
    2. A batch is one write: `[slot, version is the known one, no intent] → [put the sum] else [look]`.
    3. Refused: the first time again at once, with what was seen; then after a wait with full jitter. While
       others write, too, nobody takes more than his turn (see `_policy/pace.py`).
    4. Each caller gets its own result, as if applied one by one in the order of asking.

Guarantees
    Every add whose caller got a result was applied exactly once. Results of adds of 1 never repeat, unless
    somebody resets or deletes the counter. The more callers, the more adds per second on one key.

Does not guarantee
    That an add that was cancelled or is unknown was applied, or was not: at most once, that is all.

Source
    Flat combining: Hendler, Incze, Shavit and Tzafrir, "Flat Combining and the Synchronization-Parallelism
    Tradeoff", 2010; here the batch runs in the coordinator's background, so that cancelling one caller does
    not leave the others in doubt.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import trio

from etcd_infra._etcd.model import Compare, KeyRange, KeyValue, Put, Range
from etcd_infra._policy.pace import Pace
from etcd_infra._primitives._cas import Change, Refused, commit, found_in
from etcd_infra.errors import OutcomeUnknownError, SessionLostError

if TYPE_CHECKING:
    from etcd_infra._etcd.background import Background
    from etcd_infra._primitives._space import Space


@dataclass(slots=True, eq=False)
class _Request:
    """
    One caller's wish: an add, or a reset.

    Attributes:
        given_up: Its caller was cancelled.
        result: The counter right after it.
    """

    number: int
    is_reset: bool = False
    given_up: bool = False
    result: int = 0
    error: Exception | None = None
    done: trio.Event = field(default_factory=trio.Event)


class Combiner:
    """What waits for one key in this process, and the batch in flight."""

    def __init__(self, space: Space, background: Background, key: bytes) -> None:
        self._space = space
        self._background = background
        self._key = key
        self._waiting: deque[_Request] = deque()
        self._batch: list[_Request] = []
        self._running = False
        # What is under the key, as far as this process knows: a guess, until a write proves it.
        self._known: KeyValue | None = None
        self._pace = Pace()

    async def apply(self, request: _Request) -> int:
        """Have a request applied; return its result."""
        await self._space.sessions.current()
        self._waiting.append(request)
        if not self._running:
            self._running = True
            self._background.start_soon(self._run)
        try:
            await request.done.wait()
        except trio.Cancelled:
            request.given_up = True
            raise
        if request.error is not None:
            # Each caller raises an exception of its own: tracebacks are not shared.
            raise copy.copy(request.error) from request.error
        return request.result

    async def _run(self) -> None:
        try:
            while self._take():
                await self._finish_batch()
        except BaseException:
            lost = "an add that was in flight when the coordinator was closed"
            self._fail(OutcomeUnknownError(lost, (self._key,)))
            self._batch.extend(self._waiting)
            self._waiting.clear()
            self._fail(SessionLostError("the coordinator was closed"))
            raise
        finally:
            self._running = False

    def _take(self) -> bool:
        """Form the next batch; what was given up and not sent is left out."""
        while self._waiting and (self._waiting[0].given_up or self._fits(self._waiting[0])):
            request = self._waiting.popleft()
            if not request.given_up:
                self._batch.append(request)
        return bool(self._batch)

    def _fits(self, request: _Request) -> bool:
        return not self._batch or not (request.is_reset or self._batch[0].is_reset)

    async def _finish_batch(self) -> None:
        losses = 0
        try:
            pause = self._pace.before_next(trio.current_time(), self._space.random.random())
            if pause:
                await self._step_back(pause)
            while self._batch and not await self._write_batch():
                losses += 1
                pause = self._pace.lost(trio.current_time(), losses, self._space.random.random())
                await self._step_back(pause)
        except Exception as error:  # noqa: BLE001 - it is raised by every caller
            self._known = None
            self._fail(error)

    async def _step_back(self, seconds: float) -> None:
        """Nothing of the batch is out: whoever was cancelled, or is now, is not in the next one."""
        self._waiting.extendleft(reversed(self._batch))
        self._batch.clear()
        if seconds:
            await trio.sleep(seconds)
            found = await self._space.read(Range(KeyRange.one(self._key)))
            self._known = found.kvs[0] if found.kvs else None
        self._take()

    async def _write_batch(self) -> bool:
        known = self._known
        number = 0
        if known and not self._batch[0].is_reset:
            number = self._space.decode(known, int)
        for request in self._batch:
            number = request.number if request.is_reset else number + request.number
            request.result = number
        encoded = self._space.encode(number)
        change = Change(
            (Put(self._key, encoded, ignore_lease=known is not None),),
            (self._key,),
            (Compare.modified_at(self._key, known.mod_revision if known else 0),),
            (Range(KeyRange.one(self._key)),),
        )
        outcome = await commit(self._space.sessions, self._space.keys, change)
        if isinstance(outcome, Refused):
            self._known = next(iter(found_in(outcome.reads[0])), None)
            return False
        self._pace.won()
        self._known = KeyValue(self._key, encoded, mod_revision=outcome.revision)
        for request in self._batch:
            request.done.set()
        self._batch.clear()
        return True

    def _fail(self, error: Exception) -> None:
        for request in self._batch:
            request.error = error
            request.done.set()
        self._batch.clear()


class Combiners:
    """The combiners of one coordinator: one for all `Counter` objects of one name."""

    def __init__(self, space: Space, background: Background) -> None:
        self.space = space
        self._background = background
        self._by_key: WeakValueDictionary[bytes, Combiner] = WeakValueDictionary()

    def of(self, key: bytes) -> Combiner:
        """Return the combiner of a key; it lives as long as somebody keeps it."""
        combiner = self._by_key.get(key)
        if combiner is None:
            combiner = self._by_key[key] = Combiner(self.space, self._background, key)
        return combiner


class Counter:
    """
    The counter `name`: the state key of that name, an int; absent means 0.

    All objects of one name combine their adds. Keep the object: it remembers the last value.

    Raises (every operation):
        TypeError, ValueError: not an int, or not one that the codec can store; nothing was sent.
        CodecError: what is stored is no int; nothing was written.
        EtcdError: etcd refuses, or does not answer.

    Raises (every write):
        OutcomeUnknownError: the session ended while an answer was missing.
        SessionLostError: the coordinator was closed; nothing was written.

    Cancellation (every write):
        Withdrawn if it was not sent yet, or its batch was refused; else it counts. Others in its batch are
        not disturbed.
    """

    def __init__(self, combiners: Combiners, name: str) -> None:
        self.name = name
        self._space = combiners.space
        self._key = self._space.keys.state(name)
        self._combiner = combiners.of(self._key)

    def __repr__(self) -> str:
        return f"<Counter {self.name!r}>"

    async def get(self) -> int:
        """
        Read it, linearizable; 0 if it is absent.

        Round trips:
            One.
        """
        self._space.tally.state_operations += 1
        found = await self._space.read(Range(KeyRange.one(self._key)))
        return self._space.decode(found.kvs[0], int) if found.kvs else 0

    async def add(self, delta: int = 1) -> int:
        """
        Add, exactly once; return the number right after it.

        Round trips:
            One, shared by all adds of its batch; two if somebody else wrote in between, or nothing is known
            yet. Adds that arrive while a batch is in flight wait for it first.
        """
        return await self._apply(_Request(self._checked("delta", delta)))

    async def subtract(self, delta: int = 1) -> int:
        """Subtract, exactly once; return the number right after it. See `add`."""
        return await self._apply(_Request(-self._checked("delta", delta)))

    async def reset(self, value: int = 0) -> None:
        """Set it to `value`; adds before and after it are not mixed with it. See `add`."""
        await self._apply(_Request(self._checked("value", value), is_reset=True))

    async def _apply(self, request: _Request) -> int:
        self._space.tally.state_operations += 1
        return await self._combiner.apply(request)

    def _checked(self, name: str, number: int) -> int:
        if type(number) is not int:
            msg = f"{name} must be an int, not {number!r}"
            raise TypeError(msg)
        self._space.encode(number)
        return number
