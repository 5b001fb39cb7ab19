"""The fixtures that ship for users' own tests: in memory, on the program at hand, or skipped."""

from __future__ import annotations

import pytest

CONFIG = """
[pytest]
trio_mode = true
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run tests as a user would, in a process of their own, where no image is named."""
    monkeypatch.delenv("ETCD_INFRA_TEST_IMAGE", raising=False)
    pytester.makeini(CONFIG)

    def run(source):
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rs")

    return run


USE = """
from etcd_infra import open_etcd
from etcd_infra.testing import EtcdCluster, EtcdServer, MemoryEtcd

async def test_memory(etcd_infra_memory):
    assert isinstance(etcd_infra_memory, MemoryEtcd)
    assert await etcd_infra_memory.put(b"k", b"v") == 2

def test_server_without_trio(etcd_infra_server):
    assert isinstance(etcd_infra_server, EtcdServer)

async def test_server(etcd_infra_server):
    async with open_etcd(etcd_infra_server.endpoint) as etcd:
        assert await etcd.put(b"k", b"v") == 2

async def test_cluster(etcd_infra_cluster):
    assert isinstance(etcd_infra_cluster, EtcdCluster)
    async with open_etcd(etcd_infra_cluster.endpoints) as etcd:
        await etcd.put(b"k", b"v")

async def test_coordinator(etcd_infra_coordinator):
    async with etcd_infra_coordinator.lock("job") as hold:
        assert hold.token
"""


def test_fixtures_run_on_the_program_at_hand(run):
    """Each fixture works without any configuration but Trio's mode, a server without even that."""
    run(USE).assert_outcomes(passed=5)


def test_fixtures_do_without_a_program(run, monkeypatch):
    """Without an etcd a coordinator is in memory; what needs a server is skipped, with what to do about it."""
    monkeypatch.setenv("PATH", "/nonexistent")
    source = "import etcd_infra.testing.server as s\ns._find_packaged = lambda: None\n" + USE
    result = run(source)
    result.assert_outcomes(passed=2, skipped=3)
    result.stdout.fnmatch_lines(["*no etcd at hand: set ETCD_INFRA_TEST_IMAGE or install*"])


def test_plugin_costs_a_run_no_import_of_trio(run):
    """Loading the plugin imports nothing but pytest: whoever does not use it does not pay for it."""
    result = run(
        "import sys\nLOADED = set(sys.modules)\ndef test_modules():\n    assert 'grpc' not in LOADED\n"
    )
    result.assert_outcomes(passed=1)
