"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """
    One bug.

    Attributes:
        name: Short, for the command line.
        bug: One sentence: what goes wrong, as a user would see it.
        file: Which file it is in, below `etcd_infra`.
        search: A piece of that file which occurs in it once.
        replace: What the bug writes instead.
        killer: The test that fails with it, below `tests`.
        also: More pieces of the same file, and what the bug writes instead: where two defences guard one thing.
    """

    name: str
    bug: str
    file: str
    search: str
    replace: str
    killer: str
    also: tuple[tuple[str, str], ...] = ()

    def applied(self, text: str) -> str:
        """
        Return the file's text with the bug in it.

        Raises:
            ValueError: the piece is not there, or more than once.
        """
        for search, replace in ((self.search, self.replace), *self.also):
            if text.count(search) != 1:
                raise ValueError(f"{self.name}: found {text.count(search)} times in {self.file}: {search!r}")
            text = text.replace(search, replace)
        return text
