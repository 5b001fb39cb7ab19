"""The etcd programs that can be had here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from etcd_infra.testing import find_etcd


def etcd_programs() -> list[str]:
    """Name the programs: `ETCD_INFRA_TEST_ETCDS`, separated by colons, or the one at hand."""
    if named := os.environ.get("ETCD_INFRA_TEST_ETCDS"):
        return named.split(":")
    found = find_etcd()
    return [str(found)] if found else []


def every_etcd():
    """Parametrise a test with `program`, one etcd each."""
    programs = etcd_programs()
    missing = [pytest.param("", marks=pytest.mark.skip(reason="no etcd program here"))]
    return pytest.mark.parametrize("program", programs or missing)


def etcdctl_beside(program: str) -> str:
    """Find the `etcdctl` that came with an etcd."""
    path = Path(program).with_name("etcdctl")
    assert path.is_file(), f"there is no etcdctl beside {program}"
    return str(path)


def version_of(program: str) -> tuple[int, ...]:
    """Ask a program which etcd it is."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return tuple(int(part) for part in done.stdout.split("etcd Version: ")[1].split()[0].split("."))


def is_crash_safe(program: str) -> bool:
    """Whether this etcd keeps acknowledged writes when a member is killed."""
    version = version_of(program)
    return version >= (3, 5, 5) or (3, 4, 21) <= version < (3, 5)


def crash_safe_etcd() -> str | None:
    """Name the first program whose members may be killed."""
    return next((program for program in etcd_programs() if is_crash_safe(program)), None)
