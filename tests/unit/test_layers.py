"""The architecture's import table, kept true."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "etcd_infra"

# Folder or module: what of ours it may import, and what it must never import.
MAY = {
    "errors": set(),
    "_etcd": {"errors", "_etcd"},
    "_policy": {"errors", "_policy"},
    "_backends": {"errors", "_etcd", "_policy", "_backends"},
    "_wrappers": {"errors", "_etcd", "_policy", "_wrappers"},
    "_session": {"errors", "_etcd", "_policy", "_session"},
    "_primitives": {"errors", "_etcd", "_policy", "_session", "_primitives"},
    "testing": {"errors", "_etcd", "_backends", "testing"},
    "abc": {"_etcd"},
    "_inspect": {"", "abc", "testing", "_inspect"},
    "coordinator": {
        "errors",
        "_etcd",
        "_policy",
        "_backends",
        "_wrappers",
        "_session",
        "_primitives",
        "inspector",
        "metrics",
    },
}
NEVER = {
    "_etcd": {"grpc", "etcd3gw", "google"},
    "_etcd/model.py": {"trio"},
    "_etcd/keys.py": {"trio"},
    "_policy": {"trio", "time", "random"},
    "_backends/memory_store.py": {"trio", "time", "random"},
    "_backends/memory_history.py": {"trio", "time", "random"},
    "_backends/memory_watch.py": {"trio", "time", "random"},
    "_backends/memory_leases.py": {"trio", "time", "random"},
    "_backends/watch_cursor.py": {"trio", "time", "random"},
    "_backends/http2_frames.py": {"trio", "time", "random"},
    "_backends/http2_stream.py": {"trio", "time", "random"},
    "_backends/http2_protocol.py": {"trio", "time", "random"},
    "_backends/grpc_headers.py": {"trio", "time", "random"},
    "_backends/gateway_json.py": {"trio", "time", "random"},
}
ONLY_IN = {
    "grpc": {"_backends/grpcio_channel.py"},
    "etcd3gw": {"_backends/gateway.py"},
    "requests": {"_backends/gateway.py", "_backends/gateway_connections.py"},
    "urllib3": {"_backends/gateway_connections.py"},
    "h11": {"_backends/gateway_watch.py"},
    "hpack": {"_backends/grpc_headers.py"},
    "pytest": {"testing/pytest_plugin.py"},
    "testcontainers": {"testing/container.py"},
    "typer": {"_inspect/cli.py", "_inspect/dev_server.py"},
    "rich": {"_inspect/cli.py", "_inspect/render.py", "_inspect/demo.py"},
    "time": {"_session/clock.py", "_inspect", "_backends/grpcio_channel.py", "testing/container.py"},
}
# Composite primitives: what they are made of.
PARTS = {
    "_state_reading.py": {"state_watch"},
    "_run.py": {"publish"},
    "members.py": {"member_watch"},
    "rwlock.py": {"rwlock_info"},
    "semaphore.py": {"semaphore_info"},
    "_receipt_of.py": {"receipt"},
    "topic.py": {"messages", "publish", "receipt"},
    "transitions.py": {"leadership"},
    "_candidacy.py": {"leadership", "members"},
    "election.py": {"leader_state", "leader_watch", "leadership", "members", "transitions"},
}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(module: str) -> set[str]:
    """List what a module imports, also inside functions and for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            found.add(node.module or "")
    return found


def ours(name: str) -> str | None:
    """Name the folder or module of ours that an import leads to; None for foreign ones."""
    parts = name.split(".")
    if parts[0] != "etcd_infra":
        return None
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_layer_may(module):
    """Each module keeps to the table of the architecture."""
    folder = module.partition("/")[0].removesuffix(".py")
    if module == "testing/pytest_plugin.py":
        assert {ours(name) for name in imports(module)} - {None} <= MAY["testing"] | {"", "coordinator"}
    elif folder in MAY:
        assert {ours(name) for name in imports(module)} - {None} <= MAY[folder]
    roots = {name.partition(".")[0] for name in imports(module)}
    for place in (folder, module):
        assert not roots & NEVER.get(place, set())
    for library, places in ONLY_IN.items():
        assert library not in roots or {folder, module} & places, f"{library} in {module}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("_primitives/")])
def test_primitives_do_not_import_each_other(module):
    """A primitive imports underscore siblings and plain values, not another primitive."""
    values = {"entry", "fence", "lock_history", "lock_info", "message", "operations", "rwlock_info"}
    siblings = {name.split(".")[2] for name in imports(module) if ours(name) == "_primitives"}
    parts = PARTS.get(module.removeprefix("_primitives/"), set())
    assert {name for name in siblings if not name.startswith("_")} <= values | parts


def test_heavy_packages_are_imported_on_first_use():
    """Importing the package loads neither a road's libraries nor the command line's."""
    heavy = "{'grpc', 'hpack', 'h11', 'etcd3gw', 'requests', 'rich', 'typer', 'pytest', 'testcontainers'}"
    code = f"import sys, etcd_infra, etcd_infra.testing; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
