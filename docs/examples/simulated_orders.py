"""A service of one's own, simulated: two workers, one lock, and a plan of faults for each seed."""

from __future__ import annotations

import trio

from etcd_infra import open_coordinator
from etcd_infra.abc import Put, Txn
from etcd_infra.errors import EtcdError, LostError, OutcomeUnknownError
from etcd_infra.testing import (
    Claim,
    Settings,
    SimulatedProcess,
    SimulationRun,
    Violation,
    check_fences,
    simulate,
)

SETTINGS = Settings(nodes=("worker-1", "worker-2"), seconds=10.0, prefix=b"shop/lock/")


async def worker(process: SimulatedProcess) -> None:
    """Write order after order under the lock, until it is calm; then once more, and rest."""
    while True:
        try:
            async with open_coordinator(
                process.backend,
                namespace="shop",
                ttl=3,
                node_id=process.id,
                random=process.random,
                boot_clock=process.boot_clock,
            ) as infra:
                served_last = False
                while not served_last:
                    served_last = process.calm
                    try:
                        async with infra.lock("orders") as hold:
                            order = Put(b"orders", str(hold.token).encode())
                            # Leave the fence out of this line, and a simulation of a few seeds will find it.
                            await process.backend.txn(Txn(hold.fence.proof, (order,)))
                            await trio.sleep(process.random.uniform(0, 1))
                    except (LostError, OutcomeUnknownError):
                        served_last = False
                await process.rest()
                return
        except (EtcdError, LostError):
            await trio.sleep(0.5)


def only_owners_write(run: SimulationRun) -> list[Violation]:
    """Check every revision: who wrote an order was first in the lock's line."""
    # After a restore a token of before may stand for somebody else; see the guarantees.
    commits = [timed.commit for timed in run.lineages[0]]
    return check_fences(
        commits,
        b"shop/lock/",
        lambda event: Claim(b"shop/lock/orders/", int(event.kv.value)) if event.key == b"orders" else None,
    )


def test_orders() -> None:
    """Twenty seeds, each with faults of its own: nobody writes who does not hold the lock."""
    for seed in range(20):
        run = simulate(worker, seed=seed, settings=SETTINGS, checks=[only_owners_write])
        assert not run.violations, (seed, run.plan, run.violations)


if __name__ == "__main__":
    test_orders()
    print("20 simulated runs, no violation")
