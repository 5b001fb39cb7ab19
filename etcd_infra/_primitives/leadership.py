"""What a leader holds: its term, its proposal, and how it is asked to yield."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import trio

from etcd_infra._etcd.model import Compare, KeyRange, Put, Range, Txn
from etcd_infra._policy.backoff import delay
from etcd_infra._primitives._cas import found_in
from etcd_infra._primitives._hold import Hold
from etcd_infra.errors import (
    EtcdError,
    LeadershipLostError,
    LostError,
    OutcomeUnknownError,
    SessionLostError,
    UnavailableError,
)

if TYPE_CHECKING:
    from etcd_infra._primitives._waitqueue import Place
    from etcd_infra._primitives.fence import Fence
    from etcd_infra._session.session import Session


class Leadership(Hold):
    """
    One leadership, from being elected to its end: a `Hold` with a term and a proposal.

    The key in etcd is deleted after the body of `Election.lead` has finished, never before.

    Attributes:
        was_lost: Whether it ended by no doing of its own.
    """

    lost_error: ClassVar[type[LostError]] = LeadershipLostError

    def __init__(self, session: Session, place: Place, fence: Fence) -> None:
        super().__init__(session, place, fence, own=None)
        self._key = place.key
        self._modified = place.token
        self._proclaiming = trio.Lock()
        self._asked = trio.Event()
        self._yielding = 0
        self._given_up: str | None = None
        self.was_lost = False

    @property
    def term(self) -> int:
        """Larger than every earlier leader's; not dense. The fencing token."""
        return self.token

    def check(self) -> None:
        """
        Do nothing while it leads.

        Raises:
            LeadershipLostError: leadership was taken away, or is being given up for want of a quorum.
            NotHeldError: it has ended.
        """
        super().check()
        if self._given_up is not None:
            raise self._gave_up(self._given_up)

    async def proclaim(self, value: bytes) -> None:
        """
        Change the proposal that observers see, if this still leads.

        Raises:
            TypeError: `value` is no bytes; nothing was sent.
            LeadershipLostError: leadership was taken away; the proposal was not changed.
            NotHeldError: it has ended.
            OutcomeUnknownError: etcd refused after an answer was lost.
            EtcdError: etcd refuses; nothing was changed.

        Cancellation:
            Changed or not; a late copy never undoes a later proposal.

        Round trips:
            One; one more for each answer that was lost.
        """
        check_proposal(value)
        self.check()
        with self._session.tether():
            async with self._proclaiming:
                await self._write(value)
            return
        self.check()
        raise SessionLostError(str(self._session.lease.error))

    async def _write(self, value: bytes) -> None:
        key, lease = self._key, self._session.lease.id
        unanswered = False
        failures = 0
        while True:
            self.check()
            # The own key's mod revision makes every earlier copy stale: it is its own slot. And a put that
            # named no lease would make the key immortal.
            guard = Compare.modified_at(key, self._modified)
            request = Txn((guard,), (Put(key, value, lease=lease),), (Range(KeyRange.one(key)),))
            try:
                answer = await self._session.backend.txn(request)
            except (OutcomeUnknownError, UnavailableError) as error:
                unanswered = unanswered or isinstance(error, OutcomeUnknownError)
                await trio.sleep(delay(failures, self._session.random.random()))
                failures += 1
                continue
            except EtcdError as error:
                if unanswered:
                    msg = f"an earlier copy of a proposal that was refused now ({error})"
                    raise OutcomeUnknownError(msg, (key,)) from error
                raise
            if answer.succeeded:
                self._modified = answer.revision
                return
            mine = found_in(answer.results[0])
            if not mine or mine[0].create_revision != self.token:
                self._on_key_gone()
                self.check()
            self._modified = mine[0].mod_revision
            if unanswered and mine[0].value == value:
                return

    async def step_down(self) -> None:
        """
        Ask this leader to yield: wake `wait_asked_to_yield`, or, if nobody waits there, cancel the body.

        The scope of `Election.lead` then ends without an error. It does not wait for that.
        """
        self.ask_to_yield()
        await trio.lowlevel.checkpoint()

    async def release(self) -> None:
        """Do as `step_down`: the key goes after the body has finished."""
        await self.step_down()

    async def wait_asked_to_yield(self) -> None:
        """Wait until somebody asks this leader to step down; it then ends its body in its own time."""
        self._yielding += 1
        try:
            await self._asked.wait()
        finally:
            self._yielding -= 1

    # ── for the election ────────────────────────────────────────────────────────────────────────

    def ask_to_yield(self) -> None:
        """See `step_down`."""
        self._asked.set()
        if not self._yielding:
            self._cancel_body()

    def give_up(self, reason: str) -> None:
        """Cancel the body; leaving the scope raises `LeadershipLostError`."""
        self._given_up = self._given_up or reason
        self._cancel_body()

    async def finish(self) -> LostError | None:
        """See `Hold.finish`."""
        loss = await super().finish()
        if loss is None and self._given_up is not None:
            loss = self._gave_up(self._given_up)
        self.was_lost = loss is not None
        return loss

    def _gave_up(self, reason: str) -> LeadershipLostError:
        return LeadershipLostError(f"{self.fence.resource!r} (term {self.term}): {reason}")


def check_proposal(value: bytes) -> None:
    """
    Refuse what is no proposal.

    Raises:
        TypeError: it is no bytes.
    """
    if not isinstance(value, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
        msg = f"a proposal must be bytes, not {value!r}"
        raise TypeError(msg)
