"""A leader that yields when it is asked to, the next one that takes over, and an observer of both."""

import trio

from etcd_infra import Leadership, open_coordinator
from etcd_infra.testing import MemoryEtcd


async def work(leadership: Leadership) -> str:
    """Lead until somebody asks for it; a service would ask at SIGTERM, by `election.step_down()`."""
    await leadership.proclaim(b"ready")
    await leadership.wait_asked_to_yield()
    return f"term {leadership.term} ended in good order"


async def main() -> None:
    """Let two nodes campaign."""
    etcd = MemoryEtcd()
    async with (
        open_coordinator(etcd.node("a"), node_id="a") as one,
        open_coordinator(etcd.node("b"), node_id="b") as two,
        two.election("workers").observe() as leaders,
        trio.open_nursery() as nursery,
    ):

        async def campaign(infra) -> None:
            print(infra.node_id, await infra.election("workers").run_while_leader(work, b"starting"))

        nursery.start_soon(campaign, one)
        async for leader in leaders:
            print("leader:", leader)
            if leader is not None and leader.value == b"ready":
                if leader.leader_id == "a":
                    nursery.start_soon(campaign, two)
                    await one.election("workers").step_down()
                else:
                    await two.election("workers").step_down()
                    break


trio.run(main)
