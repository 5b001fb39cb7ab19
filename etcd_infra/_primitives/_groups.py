"""
Long lists, cut for nested transactions.

etcd: 128 operations fit, the longest list of each level added up: so small groups need but little of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

TOGETHER: Final = 16


def in_groups(items: Sequence[T], size: int = TOGETHER) -> list[tuple[T, ...]]:
    """Cut `items` into groups of `size`, the last one maybe smaller."""
    return [tuple(items[at : at + size]) for at in range(0, len(items), size)]
