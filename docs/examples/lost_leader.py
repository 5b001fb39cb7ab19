"""A lock is kept while the leader of a real cluster is stopped (skipped where there is no etcd)."""

import trio

from etcd_infra import open_coordinator
from etcd_infra.testing import EtcdCluster, find_etcd


async def main() -> None:
    if find_etcd() is None:
        print("there is no etcd program here")
        return
    async with (
        EtcdCluster(3) as cluster,
        open_coordinator(cluster.endpoints, ttl=10, call_timeout=1.0) as infra,
    ):
        async with infra.lock("nightly") as hold:
            old = await cluster.leader()
            old.pause()
            new = await cluster.leader()
            is_mine = await infra.lock("nightly").validate(hold.fence)
            print("a new leader:", new is not old, "- the lock is mine still:", is_mine)
            old.resume()


trio.run(main)
