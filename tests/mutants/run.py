"""
Run the mutants: ``python -m tests.mutants.run [NAME…]``. Ends with 1 if one survives.

The tree is copied, each bug is put into the copy, and its test must fail there within the time limit; without a
bug the same tests must pass, or they would prove nothing.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.mutants import EVERY_MUTANT
from tests.mutants.mutant import ROOT

TIME_LIMIT_SECONDS = 30
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-x",
    "-p",
    "no:cacheprovider",
    "-m",
    "not slow and not real",
]
FAILED = 1


def copy_tree() -> Path:
    """Copy what the tests need to a directory of its own."""
    copy = Path(tempfile.mkdtemp(prefix="etcd-infra-mutants-"))
    for name in ("etcd_infra", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    return copy


def run_tests(copy: Path, tests: list[str], time_limit: float, *, jobs: int = 0) -> int | None:
    """Run tests in a copy; return pytest's exit code, or None if they took too long."""
    # Compiled files are told by time and size only, which a small change may leave alone.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*PYTEST, "-n", str(jobs), *(f"tests/{test}" for test in tests)]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=time_limit, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def verdict(copy: Path, mutant) -> str:
    """Put a bug into the copy, run its test, and take the bug out again."""
    path = copy / "etcd_infra" / mutant.file
    text = path.read_text()
    path.write_text(mutant.applied(text))
    try:
        code = run_tests(copy, [mutant.killer], TIME_LIMIT_SECONDS)
    finally:
        path.write_text(text)
    if code is None:
        return "killed (by the time limit)"
    return {0: "SURVIVED", FAILED: "killed"}.get(code, f"NOT RUN (pytest ended with {code})")


def work(waiting: queue.SimpleQueue, results: dict[str, str]) -> None:
    """Take mutants until there are none."""
    copy = copy_tree()
    try:
        while True:
            mutant = waiting.get_nowait()
            results[mutant.name] = verdict(copy, mutant)
            print(f"{results[mutant.name]:12} {mutant.name}: {mutant.bug}", flush=True)
    except queue.Empty:
        pass
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def main(names: list[str]) -> int:
    """Run the mutants named, or all."""
    began = time.monotonic()
    chosen = [mutant for mutant in EVERY_MUTANT if not names or mutant.name in names]
    copy = copy_tree()
    code = run_tests(copy, sorted({mutant.killer for mutant in chosen}), 20 * TIME_LIMIT_SECONDS, jobs=2)
    shutil.rmtree(copy, ignore_errors=True)
    if code != 0:
        print(f"without a bug the tests do not pass: pytest ended with {code}")
        return 1
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for mutant in chosen:
        waiting.put(mutant)
    results: dict[str, str] = {}
    threads = [threading.Thread(target=work, args=(waiting, results)) for _ in range(os.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    survivors = sorted(name for name, said in results.items() if not said.startswith("killed"))
    print(
        f"{len(results) - len(survivors)} of {len(chosen)} mutants killed in {time.monotonic() - began:.0f} s"
    )
    if survivors:
        print("not killed:", ", ".join(survivors))
    return bool(survivors) or len(results) != len(chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
