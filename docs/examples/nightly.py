"""Do something once, whoever comes first."""

from __future__ import annotations

import os

import trio

from etcd_infra import Coordinator, open_coordinator


async def nightly(infra: Coordinator, name: str) -> None:
    """Make the report, unless another task or process is making it."""
    async with infra.lock("nightly").attempt() as hold:
        if hold is None:
            print(f"{name}: another one does it tonight")
            return
        print(f"{name}: making the report")
        await trio.sleep(0.2)


async def main() -> None:
    """Let three tasks try at once."""
    endpoints = os.environ.get("ETCD_INFRA_ENDPOINTS", "memory://")
    async with open_coordinator(endpoints, namespace="reports") as infra, trio.open_nursery() as nursery:
        for name in ("ada", "bob", "cleo"):
            nursery.start_soon(nightly, infra, name)


if __name__ == "__main__":
    trio.run(main)
