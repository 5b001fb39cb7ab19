"""Proof that something is held, which travels with every write."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from etcd_infra._etcd.model import Compare  # noqa: TC001 - a public field's type


@dataclass(frozen=True, slots=True)
class Fence:
    """
    Proof of one hold: picklable, and worthless once the hold has ended.

    Attributes:
        resource: The name of what is held.
        token: Create revision of the ownership key: grows strictly from owner to owner of a resource,
            within one `epoch`.
        epoch: The lineage of the store; after a restore, tokens of another epoch can not be compared. For
            data outside etcd keep (epoch, highest token seen) and refuse anything lower.
        proof: Compares that are true only while the hold lasts: put them into the write's own Txn.
    """

    resource: str
    token: int
    epoch: str
    proof: tuple[Compare, ...]

    def to_json(self) -> str:
        """Render resource, token and epoch, for storage outside etcd that checks tokens itself."""
        fields = {"resource": self.resource, "token": self.token, "epoch": self.epoch}
        return msgspec.json.encode(fields, order="sorted").decode()
