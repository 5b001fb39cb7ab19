"""
A small linearizability checker, for histories without an observer who knows the revisions.

Source: J. Wing and C. Gong, 1993; G. Lowe, "Testing for linearizability", 2017: a search over which
operation took
effect next, that never visits the same pair of done operations and state twice. The time that it takes grows
exponentially with the number of operations that overlap, not with the length of the history.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from etcd_infra.testing.violation import Violation

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

Request = TypeVar("Request")
Answer = TypeVar("Answer")
RequestIn_contra = TypeVar("RequestIn_contra", contravariant=True)
AnswerIn_contra = TypeVar("AnswerIn_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Operation(Generic[Request, Answer]):
    """
    One operation as its caller saw it.

    Attributes:
        call, reply: When it was sent and answered, on one clock; infinity: it was never answered, and may
        have taken
            effect at any later time, or never.
        request: What was asked.
        answer: What was answered; None if nothing was.
    """

    call: float
    reply: float
    request: Request
    answer: Answer | None = None


class Model(Protocol[RequestIn_contra, AnswerIn_contra]):
    """A sequential specification; its states must be hashable."""

    def initial(self) -> Hashable:
        """Return the first state."""
        ...

    def step(
        self, state: Hashable, request: RequestIn_contra, answer: AnswerIn_contra | None
    ) -> tuple[bool, Hashable]:
        """Say whether `answer` (None: any) is right in `state`, and what the state is afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class Read:
    """Ask a register for its value; answered with it."""


@dataclass(frozen=True, slots=True)
class Write:
    """Give a register a value; answered with True."""

    value: Hashable


@dataclass(frozen=True, slots=True)
class CompareAndSwap:
    """Give a register a value if it has another one; answered with whether it had."""

    expected: Hashable
    value: Hashable


class Register:
    """The model of one register: `Read`, `Write`, `CompareAndSwap`."""

    def __init__(self, value: Hashable = None) -> None:
        self._value = value

    def initial(self) -> Hashable:
        """See `Model`."""
        return self._value

    def step(
        self, state: Hashable, request: Read | Write | CompareAndSwap, answer: Hashable
    ) -> tuple[bool, Hashable]:
        """See `Model`."""
        match request:
            case Read():
                return answer is None or answer == (state,), state
            case Write(value):
                return True, value
            case CompareAndSwap(expected, value):
                holds = state == expected
                return answer is None or answer == holds, value if holds else state


def check_linearizable(
    history: Sequence[Operation[Request, Answer]], model: Model[Request, Answer]
) -> list[Violation]:
    """
    Check that the operations could have taken effect one after the other, each between its call and its reply.

    A `Register`'s read is answered with a tuple of one, so that a value None differs from no answer.

    Args:
        history: In any order; of one object (objects that do not depend on each other are checked one by one).
        model: What the object does.

    Returns:
        No violation, or one that names the operation beyond which no order was found.
    """
    operations = sorted(history, key=lambda each: (each.call, each.reply))
    answered = sum(1 << index for index, each in enumerate(operations) if each.reply < inf)
    farthest = 0
    stack: list[tuple[int, Hashable]] = [(0, model.initial())]
    visited = set(stack)
    while stack:
        done, state = stack.pop()
        if done & answered == answered:
            return []
        farthest = max(farthest, (done & answered).bit_count())
        for index in _candidates(operations, done):
            each = operations[index]
            right, after = model.step(state, each.request, each.answer)
            following = (done | 1 << index, after)
            if right and following not in visited:
                visited.add(following)
                stack.append(following)
    what = f"no order of {len(operations)} operations explains the answers; at most {farthest} are explained"
    return [Violation("linearizable", what)]


def _candidates(operations: Sequence[Operation[Request, Answer]], done: int) -> list[int]:
    """Name the operations that may take effect next: called before every reply that is still to come."""
    found: list[int] = []
    earliest_reply = inf
    for index, each in enumerate(operations):
        if each.call > earliest_reply:
            break
        if not done >> index & 1:
            found.append(index)
            earliest_reply = min(earliest_reply, each.reply)
    return [index for index in found if operations[index].call <= earliest_reply]
