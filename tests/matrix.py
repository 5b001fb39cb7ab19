"""
Every etcd by every road: run the contract and the primitives' stories, and print a table of what passed.

``just matrix`` runs it on the etcds of `ETCD_INFRA_TEST_ETCDS` (paths, with colons), or on the one at hand. The
contract and the tests of the roads themselves run in full; the primitives' tests on real servers are given the
road by `ETCD_INFRA_TRANSPORT`, and leave out those that last minutes. It ends with status 1 if anything failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from etcd_infra.testing import find_etcd

ROOT = Path(__file__).parents[1]
ROADS = ("http2", "grpcio", "gateway")
STORIES = ("locks", "elections", "state", "transactions", "topics")
FIGURE = re.compile(r"(\d+) (passed|failed|error)")


def etcds():
    """List the programs with their versions, oldest first."""
    named = os.environ.get("ETCD_INFRA_TEST_ETCDS") or str(find_etcd())
    found = {}
    for program in named.split(":"):
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        version = said.partition("etcd Version: ")[2].split()[0]
        found.setdefault(tuple(map(int, version.split("."))), program)
    return {".".join(map(str, version)): found[version] for version in sorted(found)}


def run(program, road, *what):
    """Run tests on one etcd by one road; return what was counted."""
    environment = os.environ | {
        "ETCD_INFRA_TEST_ETCDS": program,
        "ETCD_INFRA_ETCD_BIN": program,
        "ETCD_INFRA_TRANSPORT": road,
    }
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *what]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    counted = {word: int(number) for number, word in FIGURE.findall(done.stdout.splitlines()[-1])}
    if done.returncode:
        print(done.stdout[-5000:], file=sys.stderr)
    return counted


def shown(counted):
    """Write a cell of the table."""
    bad = counted.get("failed", 0) + counted.get("error", 0)
    return f"{counted.get('passed', 0)} passed" + (f", **{bad} failed**" if bad else "")


def main():
    """Run everything; print the table."""
    stories = [f"tests/integration/test_{name}.py" for name in STORIES]
    print("| etcd | road | contract | the road itself | primitives |\n| --- | --- | --- | --- | --- |")
    failed = False
    for version, program in etcds().items():
        for road in ROADS:
            cells = [
                run(program, road, "tests/contract", "-m", "slow or not slow", "-k", road),
                run(
                    program,
                    road,
                    *("tests/integration/test_grpc.py", "tests/integration/test_grpc_watch.py"),
                    *("tests/integration/test_security.py", "-m", "slow or not slow", "-k", road),
                ),
                run(program, road, *stories, "-m", "not slow"),
            ]
            failed |= any(not cell.get("passed") or {"failed", "error"} & cell.keys() for cell in cells)
            print(f"| {version} | {road} | {' | '.join(map(shown, cells))} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
