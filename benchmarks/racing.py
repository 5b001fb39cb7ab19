"""
Races between clients of etcd: what the programs that compare us with others share.

Each peer lives in a virtual environment of its own (aetcd and etcetra can not be installed together).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

HERE = Path(__file__).parent
PEERS = {
    "aetcd": ["aetcd"],
    "etcetra": ["etcetra"],
    "tooz": ["tooz", "etcd3gw"],
    "kazoo": ["kazoo"],
    "etcd-client-py": ["etcd-client-py"],
}
OURS = "etcd-infra"


def install(peers: list[str], where: Path) -> dict[str, str]:
    """Make one environment per peer; return each one's interpreter."""
    pythons = {OURS: sys.executable}
    for peer in peers:
        home = where / peer
        python = home / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[peer]], check=True)
        pythons[peer] = str(python)
    return pythons


def version(peer: str, python: str) -> str:
    """Ask a peer's environment which version it has."""
    code = f"import importlib.metadata as m; print(m.version({peer!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def command_of(python: str, event: str, peer: str, *arguments: object) -> list[str]:
    """Return the command line of a peer's script of an event (a folder of `peers`)."""
    script = HERE / "peers" / event / f"with_{peer.replace('-', '_')}.py"
    return [python, "-W", "ignore", str(script), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return what a peer's script needs around it."""
    return os.environ | {"PYTHONPATH": str(HERE / "peers")}


def race(python: str, event: str, peer: str, *arguments: object, seconds: float) -> dict | None:
    """Run a peer's script of an event; return what it reports, None if it fails."""
    try:
        done = subprocess.run(
            command_of(python, event, peer, *arguments),
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds * 10 + 60,
            env=environment(),
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        tail = (getattr(error, "stderr", None) or str(error))[-300:]
        print(f"  {peer} {arguments}: failed: {tail}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def quantile(samples: list[float], share: float) -> float:
    """Return the sample below which that share of the sorted samples lies."""
    return samples[min(len(samples) - 1, int(len(samples) * share))] if samples else float("nan")


def add_options(parser: argparse.ArgumentParser, peers: list[str]) -> None:
    """Add what every comparison can be told."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--tasks", default="1,16,128")
    parser.add_argument("--peers", nargs="*", default=peers, choices=peers)
    parser.add_argument("--environments", type=Path, default=HERE / ".environments")
