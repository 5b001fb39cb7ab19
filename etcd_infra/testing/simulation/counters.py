"""
"Sometimes" counters: in how many runs an invariant was really checked while a fault was at work.

A check that never meets the fault that it is there for proves nothing; these counters tell.

Source: W. Wilson, "Sometimes assertions" (Antithesis).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from etcd_infra.testing.simulation.faults import FaultKind
    from etcd_infra.testing.simulation.simulation import Strike

AFTER_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Hit:
    """
    An invariant was checked on something that really happened.

    Attributes:
        invariant: Its name.
        at: True seconds.
        node: Whose doing it was; empty: of no single node.
    """

    invariant: str
    at: float
    node: str = ""


class Counters:
    """
    How many runs had each fault together with each invariant.

    Attributes:
        runs: How many runs were added.
        cells: Runs by fault and invariant.
        struck: Runs by fault.
        checked: Hits by invariant.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.cells: Counter[tuple[str, str]] = Counter()
        self.struck: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()

    def add(self, strikes: Sequence[Strike], hits: Iterable[Hit]) -> None:
        """Add one run: a hit counts for every fault that was at work, or over since less than five seconds."""
        self.runs += 1
        self.struck.update({str(strike.kind) for strike in strikes})
        cells: set[tuple[str, str]] = set()
        for hit in hits:
            self.checked[hit.invariant] += 1
            for strike in strikes:
                if strike.begin <= hit.at <= strike.end + AFTER_SECONDS and (
                    not hit.node or not strike.node or hit.node == strike.node
                ):
                    cells.add((str(strike.kind), hit.invariant))
        self.cells.update(cells)

    def merge(self, other: Counters) -> None:
        """Add what another process counted."""
        self.runs += other.runs
        self.cells.update(other.cells)
        self.struck.update(other.struck)
        self.checked.update(other.checked)

    def too_few(self, required: Mapping[FaultKind, Iterable[str]], least: int) -> list[str]:
        """Name the cells that were met in fewer than `least` runs."""
        return [
            f"{kind} x {invariant}: {self.cells[kind, invariant]}"
            for kind, invariants in required.items()
            for invariant in invariants
            if self.cells[kind, invariant] < least
        ]

    def table(self) -> str:
        """Render all cells as a Markdown table."""
        invariants = sorted(self.checked)
        lines = [
            f"| fault | runs | {' | '.join(invariants)} |",
            f"| --- | {'---: | ' * (len(invariants) + 1)}".rstrip(),
        ]
        lines += [
            _row(kind, self.struck[kind], [self.cells[kind, each] for each in invariants])
            for kind in sorted(self.struck)
        ]
        lines.append(_row("checks", self.runs, [self.checked[each] for each in invariants]))
        return "\n".join(lines)


def _row(name: str, runs: int, numbers: list[int]) -> str:
    return f"| {name} | {runs} | {' | '.join(map(str, numbers))} |"
