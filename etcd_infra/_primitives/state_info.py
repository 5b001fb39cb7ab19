"""What state says of itself: keys, versions, leases, sizes. Needs no session, and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from etcd_infra._etcd.model import KeyRange
from etcd_infra._session.pages import Pages

if TYPE_CHECKING:
    from etcd_infra._etcd.backend import Backend
    from etcd_infra._etcd.keys import Keys

PREVIEW_CHARACTERS: Final = 60


@dataclass(frozen=True, slots=True)
class StateInfo:
    """
    One state key.

    Attributes:
        key: The user's key.
        version: Its mod revision.
        lease: The lease that it hangs on, in hex; None if it stays.
        ttl: Whole seconds left of that lease, as the server says.
        size_bytes: Of the stored value.
        preview: How the stored value begins.
    """

    key: str
    version: int
    lease: str | None
    ttl: int | None
    size_bytes: int
    preview: str


async def inspect_state(backend: Backend, keys: Keys, prefix: str = "") -> tuple[StateInfo, ...]:
    """Describe the state keys that begin with `prefix`; one round trip for each 256, and one for each lease."""
    pages = Pages(backend, KeyRange.prefix(keys.state_prefix(prefix)))
    infos: list[StateInfo] = []
    while not pages.finished:
        for kv in await pages.next():
            ttl = (await backend.lease_time_to_live(kv.lease)).ttl if kv.lease else None
            infos.append(
                StateInfo(
                    keys.parse_state(kv.key) or "",
                    kv.mod_revision,
                    f"{kv.lease:x}" if kv.lease else None,
                    ttl,
                    len(kv.value),
                    _preview(kv.value),
                )
            )
    return tuple(infos)


def _preview(value: bytes) -> str:
    # A character has four bytes at most: this is enough to see whether something was cut off.
    text = value[: PREVIEW_CHARACTERS * 4 + 4].decode(errors="replace")
    if not text.isprintable():
        text = repr(value[:PREVIEW_CHARACTERS])
    return text if len(text) <= PREVIEW_CHARACTERS else text[:PREVIEW_CHARACTERS] + "…"
