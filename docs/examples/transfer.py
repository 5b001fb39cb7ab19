"""Three ways to move money, and a payment provider that takes part in the third."""

from __future__ import annotations

import os

import trio
import trio.lowlevel

from etcd_infra import Cas, ConflictError, Decrement, Increment, Set, open_coordinator


class Provider:
    """A payment provider: an authorisation can be captured or voided, each once, under an id of ours."""

    def __init__(self) -> None:
        self.payments: dict[str, str] = {}

    async def authorise(self, payment: str) -> None:
        await trio.lowlevel.checkpoint()
        self.payments[payment] = "authorised"

    async def capture(self, payment: str) -> None:
        await trio.lowlevel.checkpoint()
        self.payments[payment] = "captured"

    async def void(self, payment: str) -> None:
        await trio.lowlevel.checkpoint()
        self.payments[payment] = "voided"


async def top_up(infra, provider: Provider, account: str, amount: int) -> None:
    async with infra.begin(ttl=30) as tx:
        payment = tx.transaction_id
        tx.add(Increment(account, amount))
        tx.add(Cas(f"payment/{payment}", "authorised", expected_version=0))
        await tx.prepare()  # from here on the account is kept for us
        await provider.authorise(payment)  # the outside says yes, or raises: then all is rolled back
        await tx.commit()
    await provider.capture(payment)
    await infra.state.set(f"payment/{payment}", "captured")


async def recover(infra, provider: Provider) -> None:
    """Run by anybody, at any time: finish what a crashed `top_up` has left at the provider."""
    for payment, status in list(provider.payments.items()):
        if status != "authorised":
            continue
        try:
            # Waits until the transaction is decided; succeeds only if it was not committed, and never will be.
            await infra.execute([Cas(f"payment/{payment}", "voided", expected_version=0)])
        except ConflictError:
            if (await infra.state.get(f"payment/{payment}")).value != "voided":
                await provider.capture(payment)
                continue
        await provider.void(payment)


async def main() -> None:
    endpoints = os.environ.get("ETCD_INFRA_ENDPOINTS", "memory://")
    async with open_coordinator(endpoints, namespace="bank:demo") as infra:
        await infra.execute([Set("account/ann", 100), Set("account/bob", 0)])

        result = await infra.execute([Decrement("account/ann", 30), Increment("account/bob", 30)])
        print("by execute:", [one.value for one in result.results])

        async def move_half(tx):
            ann = await tx.get("account/ann")
            tx.set("account/ann", ann - ann // 2)
            tx.set("account/bob", await tx.get("account/bob") + ann // 2)
            return await tx.list("account/")

        print("by transact:", await infra.transact(move_half))

        provider = Provider()
        await top_up(infra, provider, "account/bob", 50)
        provider.payments["left by a crash"] = "authorised"
        await recover(infra, provider)
        print(
            "in two phases:", (await infra.state.get("account/bob")).value, sorted(provider.payments.values())
        )


if __name__ == "__main__":
    trio.run(main)
