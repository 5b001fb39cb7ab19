"""
One leader at a time among the nodes that campaign, first come, first served.

Keys
    ``{ns}election/{name}/{lease}-{n}``  a place in line, on the session's lease; the value is the proposal.
    ``{ns}member/{name}/…``              whoever campaigns is a member of the group of that name (`Members`).

Algorithm
    1. Register as a member; then join the line (see `_waitqueue`) and wait to come first, as for a lock.
    2. With a quorum: the joining Txn compares the create revisions of so many members' keys, so that who
       lacks a quorum is not in line. When fewer are seen, a candidate leaves the line and waits, and a leader
       ends its scope, finishes its body, and then deletes its key.
    3. The proposal is changed by ``[mod(mine) == the last known] → [put mine, on the lease]``.

Guarantees
    Terms grow strictly from leader to leader. A write that carries ``leadership.fence`` in its Txn is
    applied only while this leader is not replaced. Losing leadership cancels the body, and the key is
    deleted after the body has finished.

Does not guarantee
    That nobody else *acts* as leader while this process believes that it leads: that is what the fence is
    for. A quorum is a minimum at the moment of joining, and a step-down soon after it is lost.

Source
    etcd ``client/v3/concurrency/election.go``, whose layout it is: ``etcdctl elect`` sees ours and competes
    with them. That a leader finishes before it lets go is what client-go's ``leaderelection`` warns about.
"""

# Over the budget of 250 lines: half of them are the docstrings of the public surface.

from __future__ import annotations

import logging
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from etcd_infra._etcd.background import open_background
from etcd_infra._etcd.model import Compare, KeyRange
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._owner import check_not_owner, take_once
from etcd_infra._primitives._turn import come_first
from etcd_infra._primitives._waitqueue import NotAdmittedError, Spot
from etcd_infra._primitives.fence import Fence
from etcd_infra._primitives.leader_state import LeaderState, read_leader_state
from etcd_infra._primitives.leader_watch import LeaderWatch
from etcd_infra._primitives.leadership import Leadership, check_proposal
from etcd_infra._primitives.members import check_quorum
from etcd_infra._primitives.transitions import Standing, Transition
from etcd_infra._session.mirror import open_mirror
from etcd_infra.errors import FencedError, LockLostError, LostError, SessionLostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._primitives._candidacy import Candidacy, RollView
    from etcd_infra._session.session import Session

T = TypeVar("T")

logger = logging.getLogger("etcd_infra.election")

MAX_QUORUM: Final = 100


class Election:
    """
    The election `name`; all objects of one name and coordinator share its part in it.

    Args:
        candidacy: This process's part in the election.
        quorum: So many distinct nodes must be members, 1 to 100, for anybody to lead.
    """

    def __init__(self, candidacy: Candidacy, *, quorum: int = 1) -> None:
        check_quorum(quorum)
        if quorum > MAX_QUORUM:
            msg = f"a quorum must be at most {MAX_QUORUM}, not {quorum}"
            raise ValueError(msg)
        self.name = candidacy.name
        self.quorum = quorum
        self._candidacy = candidacy
        self._line = candidacy.keys.election_line(candidacy.name)

    def __repr__(self) -> str:
        return f"<Election {self.name!r}>"

    @property
    def is_leader(self) -> bool:
        """Whether this process leads, by the clocks of this moment; local and free."""
        return self._candidacy.is_leader

    # ── leading ─────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def lead(self, value: bytes = b"") -> AsyncGenerator[Leadership]:
        """
        Wait until this process leads, and lead for the length of a body that is cancelled on loss.

        While it waits, a session that is lost, or a place in line that somebody deletes, is replaced: it
        then stands at the line's end.

        Args:
            value: The proposal that observers see.

        Raises:
            TypeError: `value` is no bytes; nothing was sent.
            RuntimeError: this task leads here, or campaigns, already.
            LeadershipLostError: on leaving: leadership was taken away, or the quorum was lost.
            SessionLostError: the coordinator was closed.
            StorageFullError, AccessDeniedError: etcd refuses.

        Cancellation:
            The body is finished, then the line is left, within two seconds or by the session's janitor.

        Round trips:
            Two to lead at once: to register, unless this process takes part already, and to join; one more
            for each predecessor seen. One to end, and one to unregister.
        """
        check_proposal(value)
        candidacy = self._candidacy
        async with candidacy.registered.use(), self._view() as view:
            with candidacy.campaigning():
                leadership = await self._campaign(view, value)
            with candidacy.leading(leadership):
                give_up = partial(leadership.give_up, f"fewer than {self.quorum} nodes are members")
                async with leadership.scope():
                    with self._on_lack(view, give_up):
                        yield leadership

    async def run_while_leader(self, function: Callable[[Leadership], Awaitable[T]], value: bytes = b"") -> T:
        """
        Run `function` while this process leads; when leadership ends first, campaign and run it again.

        A `FencedError` or `LostError` out of `function` whose leadership was lost counts as that loss.

        Returns:
            What `function` returns.

        Raises:
            Exception: what `function` raises; and as `lead`, except `LeadershipLostError`.

        Cancellation:
            As `lead`.
        """
        while True:
            results: list[T] = []
            leadership: Leadership | None = None
            try:
                async with self.lead(value) as leadership:
                    results.append(await function(leadership))
            except Exception as error:
                if leadership is None or not leadership.was_lost or not _is_loss(error):
                    raise
                logger.warning("%r was lost: %s", self, error)
            if results:
                return results[0]

    async def step_down(self) -> None:
        """
        Ask this process's leader to yield, if it leads; see `Leadership.step_down`.

        It does not wait until the leader has: the scope of `lead` does.
        """
        for leadership in tuple(self._candidacy.leaderships):
            leadership.ask_to_yield()
        await trio.lowlevel.checkpoint()

    def _view(self) -> AbstractAsyncContextManager[RollView | None]:
        return self._candidacy.view.use() if self.quorum > 1 else nullcontext()

    async def _campaign(self, view: RollView | None, value: bytes) -> Leadership:
        while True:
            session = await self._candidacy.sessions.current()
            check_not_owner(session, self._line, self)
            try:
                leadership = await take_once(session, self._line, partial(self._stand, session, view, value))
            except SessionLostError:
                continue  # whether there is a next one, `current` says
            except LockLostError as error:
                logger.warning("%r: campaigning again: %s", self, error)
                continue
            if leadership is not None:
                return leadership

    async def _stand(self, session: Session, view: RollView | None, value: bytes) -> Leadership | None:
        """Stand in line until it is this place's turn; None: there was no quorum, or not for so long."""
        conditions = () if view is None else await self._wait_quorum(session, view)
        place = Spot(self._candidacy.keys.elections, self._line).place(session, value)
        with trio.CancelScope() as lacking, self._on_lack(view, lacking.cancel):
            try:
                await come_first(place, conditions)
                proof = (Compare.created_at(place.key, place.token),)
                fence = Fence(self.name, place.token, session.own_key.epoch, proof)
                return Leadership(session, place, fence)
            except NotAdmittedError:
                await place.leave(until=session.clean_up_deadline())
            except BaseException:
                await place.leave(until=session.clean_up_deadline())
                raise
        # The view was ahead of the store's, or behind: not at once again.
        await trio.sleep(delay(1, session.random.random()))
        return None

    async def _wait_quorum(self, session: Session, view: RollView) -> tuple[Compare, ...]:
        while not (proof := view.proof(session, self.quorum)):
            await view.wait_changed()
        return proof

    @contextmanager
    def _on_lack(self, view: RollView | None, tell: Callable[[], object]) -> Generator[None]:
        """Call `tell` whenever there are fewer members than the quorum, for the length of a body."""

        def look() -> None:
            if view is not None and len(view.roll) < self.quorum:
                tell()

        look()
        with nullcontext() if view is None else view.told(look):
            yield

    # ── looking ─────────────────────────────────────────────────────────────────────────────────

    async def status(self) -> LeaderState:
        """
        Tell where this process stands, and who leads; `docs/elections.md` has the table of states.

        Raises:
            EtcdError: etcd refuses. (No answer is no error: it is PARTITIONED.)

        Round trips:
            One; none if the session is suspended or lost.
        """
        return await read_leader_state(self._candidacy, self.quorum)

    @asynccontextmanager
    async def observe(self) -> AsyncGenerator[LeaderWatch]:
        """
        Follow who leads: the leader of now, or None, then every change; see `LeaderWatch`.

        Raises:
            EtcdError: etcd refuses.

        Round trips:
            Two to enter, and one for each new leader's name.
        """
        keys = self._candidacy.keys
        session = await self._candidacy.sessions.current()
        async with open_mirror(session.backend, KeyRange.prefix(self._line), session.random) as mirror:
            yield LeaderWatch(session.backend, keys, mirror, session.random)

    @asynccontextmanager
    async def transitions(self) -> AsyncGenerator[AsyncIterator[Transition]]:
        """
        Follow what becomes of this process in the election: `Transition`s, what holds already first.

        BECAME_LEADER and LOST come in pairs, LOST after the body of `lead` has finished; PARTITIONED and
        HEALED likewise, for the union of "the session can not confirm itself" and "too few members".

        Raises:
            EtcdError: etcd refuses to let the members be read.

        Round trips:
            None; with a quorum two to enter.
        """
        # Unbounded, but one leadership adds two and costs several round trips.
        send, receive = trio.open_memory_channel[Transition](inf)
        async with self._view() as view, open_background() as background:
            standing = Standing(self._candidacy, send, view, self.quorum)
            background.start_soon(standing.follow)
            with standing.told_of_leaderships():
                yield receive


def _is_loss(error: BaseException) -> bool:
    """Whether an exception says nothing but that something was lost."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_loss, error.exceptions))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return isinstance(error, LostError | FencedError)
