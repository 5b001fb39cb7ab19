"""What the runner needs to know of a primitive's simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Workload:
    """
    A program under simulation, and what must hold of its runs.

    Attributes:
        name: For the command line.
        shape_of: Draws what a seed decides besides its faults, from the seed and the kinds of fault; a frozen
            dataclass with `settings`.
        shape_from: Makes a shape of its fields as JSON has them, with `nodes` and `seconds` for `settings`.
        program: Makes the program of a shape.
        checks: Makes the checker of a run: calling it yields violations, and fills its `hits`.
        at_rest: Yields what must not be left while everything is still open.
        cells: Which invariants each kind of fault threatens: these pairs must really meet.
    """

    name: str
    shape_of: Callable
    shape_from: Callable
    program: Callable
    checks: Callable
    at_rest: Callable
    cells: dict
