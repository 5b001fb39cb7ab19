"""
A plan that fails, made as short as possible.

Source: A. Zeller and R. Hildebrandt, "Simplifying and isolating failure-inducing input", 2002 (ddmin).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from etcd_infra.testing.simulation.faults import Fault

SHORT_SECONDS: Final = 0.1


def shrink(
    plan: Sequence[Fault], still_fails: Callable[[tuple[Fault, ...]], bool], *, budget: int = 300
) -> tuple[Fault, ...]:
    """
    Return a part of `plan` that still fails and from which no single fault can be left out.

    Args:
        plan: It fails.
        still_fails: Runs a plan; whether it fails in the same way.
        budget: Runs at most; after that the shortest plan so far is returned.
    """
    runs = _Runs(still_fails, budget)
    return _shorten(_without_chunks(tuple(plan), runs), runs)


class _Runs:
    def __init__(self, still_fails: Callable[[tuple[Fault, ...]], bool], budget: int) -> None:
        self._still_fails = still_fails
        self.left = budget

    def fails(self, plan: tuple[Fault, ...]) -> bool:
        if not self.left:
            return False
        self.left -= 1
        return self._still_fails(plan)


def _without_chunks(plan: tuple[Fault, ...], runs: _Runs) -> tuple[Fault, ...]:
    size = max(1, len(plan) // 2)
    while plan and runs.left:
        for begin in range(0, len(plan), size):
            rest = plan[:begin] + plan[begin + size :]
            if runs.fails(rest):
                plan = rest
                break
        else:
            if size == 1:
                return plan
            size = max(1, size // 2)
        size = min(size, max(1, len(plan)))
    return plan


def _shorten(plan: tuple[Fault, ...], runs: _Runs) -> tuple[Fault, ...]:
    """Try to halve how long each fault lasts: smaller is easier to read."""
    for index, fault in enumerate(plan):
        smaller = fault
        while smaller.seconds > SHORT_SECONDS:
            candidate = replace(smaller, seconds=round(smaller.seconds / 2, 3))
            if not runs.fails((*plan[:index], candidate, *plan[index + 1 :])):
                break
            smaller = candidate
        plan = (*plan[:index], smaller, *plan[index + 1 :])
    return plan
