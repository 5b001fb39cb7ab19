"""Take a lock, and write under its fence."""

from __future__ import annotations

import os

import trio

from etcd_infra import open_coordinator
from etcd_infra.abc import Put, Txn


async def charge_customer() -> None:
    """Stand for the work that must not be done twice."""
    await trio.sleep(0.1)


async def main() -> None:
    """Pay order 123 exactly while nobody else works on it."""
    endpoints = os.environ.get("ETCD_INFRA_ENDPOINTS", "memory://")
    async with open_coordinator(endpoints, namespace="orders:prod") as infra:
        async with infra.lock("order:123") as hold:
            await charge_customer()
            request = Txn(hold.fence.proof, (Put(b"orders/123", b"paid"),))
            answer = await infra.backend.txn(request)
            if not answer.succeeded:
                raise RuntimeError("somebody else has the order now; nothing was written")
        print(f"paid under token {hold.token}; the lock is {hold.status}")


if __name__ == "__main__":
    trio.run(main)
