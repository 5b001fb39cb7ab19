"""State, a counter and a watch: two clerks sell what is in stock, and a display follows."""

from __future__ import annotations

import os

import trio

from etcd_infra import StateChange, StateSnapshot, open_coordinator


async def sell(infra, clerk: str) -> None:
    stock = infra.state.typed(dict[str, int])
    await stock.update("stock/tea", lambda found: found | {"sold": found["sold"] + 1})
    receipt = await infra.counter("receipts").add()
    await infra.state.set(f"receipt/{receipt}", {"clerk": clerk}, ttl=3600)


async def show(infra, until: int, ready: trio.Event) -> None:
    async with infra.state.watch("stock/tea") as news:
        ready.set()
        async for item in news:
            match item:
                case StateSnapshot(entries=entries):
                    print("on opening", {key: entry.value for key, entry in entries.items()})
                case StateChange(entry=entry):
                    print("now", entry.value)
                    if entry.value["sold"] == until:
                        return


async def main() -> None:
    endpoints = os.environ.get("ETCD_INFRA_ENDPOINTS", "memory://")
    async with open_coordinator(endpoints, namespace="shop:demo") as infra:
        await infra.state.set("stock/tea", {"sold": 0})
        shown = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(show, infra, 4, shown)
            await shown.wait()
            for clerk in ("ann", "bob", "ann", "bob"):
                nursery.start_soon(sell, infra, clerk)
        print(sum([1 async for _ in infra.state.list("receipt/")]), "receipts")


if __name__ == "__main__":
    trio.run(main)
