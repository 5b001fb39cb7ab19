"""What is stored under a key, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final, Generic, TypeVar

T = TypeVar("T")


class Consistency(StrEnum):
    """
    What a read may answer.

    LINEARIZABLE: what is there now, confirmed by a majority. SERIALIZABLE: what one member knows, maybe
    from the past; answered even if there is no majority.
    """

    LINEARIZABLE = "linearizable"
    SERIALIZABLE = "serializable"


class Deletion(Enum):
    """The type of `DELETE`."""

    DELETE = "delete"


DELETE: Final = Deletion.DELETE
"""What the function of an `update` returns to delete the key."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """
    A key's value at one version.

    Attributes:
        key: The user's key.
        value: Decoded.
        version: Mod revision: the key never has it again, not even after a deletion. (0 is "absent".)
        create_revision: When the key was created: who holds on to it notices a deletion in between.
        lease: The lease on which the key hangs, 0 for none: the key goes when the lease ends.
    """

    key: str
    value: T
    version: int
    create_revision: int = 0
    lease: int = 0


@dataclass(frozen=True, slots=True)
class CasResult(Generic[T]):
    """
    Whether a compare-and-swap swapped, and what is there afterwards.

    Attributes:
        swapped: Whether the new value was written.
        version: The key's: the new one, or that which stood in the way (0: the key is absent).
        current_value: The key's: the new one, or that which stood in the way (None if the key is absent).
    """

    swapped: bool
    version: int
    current_value: T | None
