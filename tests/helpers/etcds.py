"""The etcd programs that can be had here."""

from __future__ import annotations

import os
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
