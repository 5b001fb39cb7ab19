"""Sets the stage, lets it be broken, waits until it is quiet again, and looks at what is left."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from statistics import quantiles

import trio

from etcd_infra import open_etcd
from etcd_infra.abc import KeyRange, Range
from etcd_infra.testing import EtcdCluster
from tests.helpers.proving import line_history
from tests.helpers.proving.nemesis import Nemesis
from tests.helpers.proving.observing import Observation, one_truth
from tests.helpers.proving.workers import Crew

NAMESPACE = "proving"
SETTLE_SECONDS = 3.0


@dataclass(frozen=True)
class Show:
    """How large a run is."""

    processes: int
    rounds: int
    locks: int
    broken_seconds: float
    kills_members: bool
    pace: float = 1.0
    ttl: int = 3
    rest: float = 0.02
    seed: int = 1
    patience: float = 90.0
    of: str = "lock"


@dataclass(frozen=True)
class Outcome:
    """What a run showed."""

    wrong: list[str]
    granted: int
    hand_overs: int
    under_fault: dict[str, int]
    faults: dict[str, int]
    late_leavers: int
    waits: list[float]
    seconds: float

    def __str__(self) -> str:
        waits = quantiles(self.waits, n=100, method="inclusive") if len(self.waits) > 1 else [0.0] * 99
        return (
            f"{self.granted} acquisitions in {self.seconds:.0f} s, {self.hand_overs} hand-overs,"
            f" under fault {self.under_fault}; faults {self.faults} ({sum(self.faults.values())});"
            f" places left to the janitor or the lease: {self.late_leavers};"
            f" told in quiet times after {waits[49]:.3f} s (median), {waits[98]:.3f} s (99th percentile),"
            f" {max(self.waits, default=0):.3f} s (longest of {len(self.waits)})"
        )


async def prove(program, directory, show: Show) -> Outcome:
    """Run the whole show, and hold what happened against the history."""
    began = time.monotonic()
    options = {
        "namespace": NAMESPACE,
        "ttl": show.ttl,
        "rest": show.rest,
        "of": show.of,
        "locks": [f"job-{number}" for number in range(show.locks)],
    }
    crew = Crew(directory, options)
    async with EtcdCluster(3, binary=program, log_directory=directory) as cluster:
        try:
            return await _on_stage(cluster, crew, show, directory, began)
        finally:
            crew.reap()


async def _on_stage(cluster, crew, show, directory, began):
    observations = [Observation() for _ in cluster.members]
    async with trio.open_nursery() as nursery, open_etcd([m.endpoint for m in cluster.members]) as backend:
        for member, observation in zip(cluster.members, observations, strict=True):
            nursery.start_soon(observation.run, member.endpoint, NAMESPACE.encode())
        for number in range(show.processes):
            road = await nursery.start(_open_road, cluster)
            crew.hire(f"w{number}.0", show.rounds, road)
        draws = random.Random(show.seed)
        nemesis = Nemesis(cluster, crew, observations, backend, draws, show.ttl, show.kills_members, show.pace)
        while not crew.granted():
            await trio.sleep(0.05)
        wrong = []
        async with trio.open_nursery() as breaking:
            breaking.start_soon(nemesis.run)
            await trio.sleep(show.broken_seconds)
            nemesis.stopping = True
        quiet_since = time.monotonic()
        with trio.move_on_after(show.patience) as patience:
            await crew.wait_done()
        if patience.cancelled_caught:
            waiting = [worker.name for worker in crew.alive.values() if not crew.is_done(worker)]
            wrong.append(f"they wait for ever: {waiting}")
        else:
            await trio.sleep_until(trio.current_time() + max(0, quiet_since + 2 * show.ttl - time.monotonic()))
            wrong += await _left_over(backend, crew)
        last = await backend.put(f"{NAMESPACE}/end".encode(), b"")
        with trio.move_on_after(10):
            while min(one.revision for one in observations) < last:
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    (directory / "nemesis.json").write_text(json.dumps(nemesis.diary, indent=1))
    return _judge(show, observations, crew, nemesis, wrong, time.monotonic() - began)


async def _open_road(cluster, task_status):
    async with cluster.open_road() as road:
        task_status.started(road)
        await trio.sleep_forever()


async def _left_over(backend, crew) -> list[str]:
    """List what is left although every lease that could remove it lives, and then what is left at the end."""
    wrong = []
    for kind in (*line_history.RULES, "member"):
        kvs = (await backend.range(Range(KeyRange.prefix(f"{NAMESPACE}/{kind}/".encode())))).kvs
        kvs = [kv for kv in kvs if kv.lease]
        if not kvs:
            continue
        wrong.append(f"places are left while their sessions live: {[(kv.key, kv.value) for kv in kvs]}")
    sessions = Range(KeyRange.prefix(f"{NAMESPACE}/session/".encode()))
    living = {kv.lease for kv in (await backend.range(sessions)).kvs}
    leases = set(await backend.lease_list())
    if not len(crew.alive) == len(living) == len(leases):
        wrong.append(f"{len(crew.alive)} processes, {len(living)} sessions, {len(leases)} leases")
    async with trio.open_nursery() as nursery:
        for worker in crew.alive.values():
            nursery.start_soon(worker.process.terminate)
    wrong += [
        f"{worker.name}: exit code {worker.process.returncode}: {worker.process.log_tail()}"
        for worker in crew.alive.values()
        if worker.process.returncode != 0
    ]
    # Well before the TTL is over: what is gone now was given back, it did not run out.
    if leases := await backend.lease_list():
        wrong.append(f"leases are left by processes that ended well: {leases}")
    rest = [kv.key for kv in (await backend.range(Range(KeyRange.everything()))).kvs]
    strange = [key for key in rest if b"/register/" not in key and not key.endswith((b"/epoch", b"/permits"))]
    return [*wrong, *([f"keys are left: {strange}"] if strange else [])]


def _judge(show, observations, crew, nemesis, wrong, seconds) -> Outcome:
    commits, times = one_truth(observations)
    logs = {name: worker.steps() for name, worker in crew.everybody.items()}
    noisy = [
        (entry["begin"], entry["end"] + SETTLE_SECONDS)
        for entry in nemesis.diary
        if entry["kind"] != "compaction"
    ]

    def quiet(begin, end):
        return not any(start <= end and begin <= stop for start, stop in noisy)

    ledger = line_history.Ledger(commits)
    handed = line_history.hand_overs(commits, NAMESPACE)
    return Outcome(
        wrong + line_history.check(commits, logs, NAMESPACE, quiet),
        granted=sum(step["event"] == "granted" for steps in logs.values() for step in steps),
        hand_overs=len(handed),
        under_fault=dict(line_history.under_fault(handed, times, nemesis.diary)),
        faults=dict(nemesis.counts),
        late_leavers=len(line_history.late_leavers(logs, ledger)),
        waits=line_history.waits(commits, logs, times, NAMESPACE, quiet),
        seconds=seconds,
    )
