"""
Run seeds of a primitive's simulation: one exactly, some thousands in CI, very many as a soak.

``python -m tests.simulation.running 17`` replays seed 17; ``--seeds 3000`` runs the seeds 0 to 2,999, ``--first``
lets them begin elsewhere, ``--jobs 2`` uses two processes, ``--of`` names the primitive. It ends with status 1
when an invariant was violated, or when a fault met an invariant that it threatens in fewer runs than `LEAST` per
3,000.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from etcd_infra.testing import Counters, Fault, FaultKind, shrink, simulate
from tests.simulation.election_checks import ELECTIONS
from tests.simulation.lock_checks import LOCKS
from tests.simulation.lock_family_checks import LOCK_FAMILY
from tests.simulation.state_checks import STATE
from tests.simulation.topic_checks import TOPICS
from tests.simulation.transaction_checks import TRANSACTIONS

WORKLOADS = {
    workload.name: workload for workload in (LOCKS, LOCK_FAMILY, STATE, TRANSACTIONS, ELECTIONS, TOPICS)
}

ROOT = Path(__file__).parents[2]
REGRESSIONS = Path(__file__).with_name("regressions.jsonl")
LEAST = 25
BATCH = 50


@dataclass
class Outcome:
    """What some seeds have shown."""

    counters: Counters = field(default_factory=Counters)
    failures: list[str] = field(default_factory=list)
    requests: int = 0
    seconds: float = 0.0
    errors: int = 0

    def merge(self, other):
        """Add what other seeds have shown."""
        self.counters.merge(other.counters)
        self.failures += other.failures
        self.requests += other.requests
        self.seconds += other.seconds
        self.errors += other.errors


def run_seed(seed, *, of=LOCKS, kinds=tuple(FaultKind), plan=None, shape=None):
    """Run one seed with all checks; return the run and what was checked."""
    shape = shape or of.shape_of(seed, kinds=kinds)
    run = simulate(of.program(shape), seed=seed, settings=shape.settings, plan=plan, at_rest=of.at_rest)
    checks = of.checks(run)
    run.violations.extend(checks())
    return run, checks.hits


def first_found(broken_product, symptoms, seeds, *, of=LOCKS):
    """Return the first seed that shows one of the symptoms of a broken product; None: none does."""
    with broken_product():
        for seed in seeds:
            run, _ = run_seed(seed, of=of)
            if symptoms & {violation.invariant for violation in run.violations}:
                return seed
    return None


def run_seeds(seeds, of=LOCKS):
    """Run some seeds; describe each that fails, with its plan shortened."""
    outcome = Outcome()
    began = time.process_time()
    for seed in seeds:
        run, hits = run_seed(seed, of=of)
        outcome.counters.add(run.strikes, hits)
        outcome.requests += run.requests
        if run.violations:
            outcome.failures.append(describe(run, of=of))
    outcome.seconds = time.process_time() - began
    gc.collect()
    return outcome


def run_seeds_of(name, seeds):
    """Run some seeds of the workload `name`: what another process can be asked for."""
    return run_seeds(seeds, WORKLOADS[name])


def describe(run, *, of=LOCKS, budget=200):
    """Describe a failure: seed, commit, violations, and the shortest plan that fails in the same way."""
    invariants = {violation.invariant for violation in run.violations}

    def fails(plan):
        again, _ = run_seed(run.seed, of=of, plan=plan)
        return bool(invariants & {violation.invariant for violation in again.violations})

    plan = shrink(run.plan, fails, budget=budget)
    what = "\n".join(f"  {violation}" for violation in run.violations[:5])
    return (
        f"seed {run.seed} at commit {commit()}:\n{what}\n"
        f"  {len(plan)} of {len(run.plan)} faults are needed; for the table of regressions:\n"
        f"{regression(of, run.seed, plan, run.violations[0])}"
    )


def regression(of, seed, plan, violation):
    """Write a line of the table of regressions: all options expanded."""
    shape = asdict(of.shape_of(seed))
    settings = shape.pop("settings")
    shape |= {"nodes": settings["nodes"], "seconds": settings["seconds"]}
    entry = {
        "of": of.name,
        "found": str(violation)[:100],
        "seed": seed,
        "shape": shape,
        "plan": [asdict(fault) for fault in plan],
    }
    return json.dumps(entry)


def commit():
    """Name the commit that is checked out."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def regressions():
    """Read the seeds that once failed: of which primitive, what went wrong, and all options."""
    for line in REGRESSIONS.read_text().splitlines():
        entry = json.loads(line)
        entry["of"] = WORKLOADS[entry["of"]]
        entry["plan"] = tuple(Fault(**(fault | {"kind": FaultKind(fault["kind"])})) for fault in entry["plan"])
        entry["shape"] = entry["of"].shape_from(**entry["shape"])
        yield entry


def replay(seed, of):
    """Run one seed, print its story line by line, and what is wrong with it."""
    run, _ = run_seed(seed, of=of)
    print("\n".join(run.log_lines()))
    print("\n".join(map(repr, run.plan)))
    if run.violations:
        print(describe(run, of=of))
    return int(bool(run.violations))


def run_many(of, first, seeds, jobs, least):
    """Run many seeds, in batches, in `jobs` processes."""
    logging.disable(logging.CRITICAL)
    total = Outcome()
    began = time.perf_counter()
    batches = [range(begin, min(begin + BATCH, first + seeds)) for begin in range(first, first + seeds, BATCH)]
    with ProcessPoolExecutor(jobs) as pool:
        for outcome in pool.map(partial(run_seeds_of, of.name), batches):
            total.merge(outcome)
            for failure in outcome.failures:
                print(failure, flush=True)
            if total.counters.runs % 5000 < BATCH:
                print(summary(total, time.perf_counter() - began), flush=True)
    print(total.counters.table())
    print(summary(total, time.perf_counter() - began))
    few = total.counters.too_few(of.cells, least * seeds // 3000)
    if few:
        print("met too rarely:", *few, sep="\n  ")
    return int(bool(total.failures or few))


def summary(total, wall):
    """Say how far it is, and how fast."""
    return (
        f"{total.counters.runs} seeds, {len(total.failures)} failed, {total.requests} requests in {wall:.0f} s; "
        f"{total.requests / max(total.seconds, 1e-9):.0f} requests/s of processor time"
    )


def main():
    """Take the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="replay this one")
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--least", type=int, default=LEAST, help="runs per 3,000 in which each cell must occur")
    parser.add_argument("--of", choices=WORKLOADS, default="locks")
    arguments = parser.parse_args()
    of = WORKLOADS[arguments.of]
    if arguments.seed is not None:
        return replay(arguments.seed, of)
    return run_many(of, arguments.first, arguments.seeds, arguments.jobs, arguments.least)


if __name__ == "__main__":
    sys.exit(main())
