"""A topic: a shop tells of its orders, a display listens, and a ledger books each of them exactly once."""

from __future__ import annotations

import os
from dataclasses import dataclass

import trio

from etcd_infra import Increment, Publish, open_coordinator


@dataclass
class Order:
    number: int
    euros: int


async def show(infra, count: int, ready: trio.Event) -> None:
    async with infra.topic("orders", type=Order).subscribe() as messages:
        ready.set()
        async for message in messages:
            print("order", message.payload.number, "by", message.publisher_id)
            if message.payload.number == count:
                return


async def book(infra, count: int, ready: trio.Event) -> None:
    async with infra.topic("orders", type=Order).subscribe(group="ledger") as messages:
        ready.set()
        async for message in messages:
            async with message.transaction() as tx:
                booked = await tx.get("ledger/euros") or 0
                tx.set("ledger/euros", booked + message.payload.euros)
            if message.payload.number == count:
                return


async def main() -> None:
    endpoints = os.environ.get("ETCD_INFRA_ENDPOINTS", "memory://")
    async with open_coordinator(endpoints, namespace="shop:demo", node_id="shop-1") as infra:
        async with trio.open_nursery() as nursery:
            for work in (show, book):
                ready = trio.Event()
                nursery.start_soon(work, infra, 3, ready)
                await ready.wait()
            for number in (1, 2, 3):
                # The stock and the event change together, or not at all.
                await infra.execute([Increment("sold"), Publish("orders", Order(number, 20 * number))])
        print("booked", (await infra.state.get("ledger/euros", type=int)).value, "euros")
        print("sold", (await infra.state.get("sold", type=int)).value)


if __name__ == "__main__":
    trio.run(main)
