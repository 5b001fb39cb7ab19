"""The documentation's examples run, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_in_memory(example):
    """Each example runs to its end on the in-memory etcd."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_INFRA_")}
    command = [sys.executable, str(example)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert 0 == done.returncode, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    """Each relative link of a page names a file that exists."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_index_names_every_page(page):
    """Every page can be reached from the index."""
    assert (
        page.name in {"index.md", "README.md"} or f"({page.name})" in (ROOT / "docs" / "index.md").read_text()
    )


def test_readme_begins_with_two_commands():
    """README's first code block is the two lines that do everything."""
    first, second = (
        re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1].strip().splitlines()
    )
    assert "'.[server]'" in first
    assert first.endswith("etcd-infra demo")
    assert "'.[dev]'" in second
    assert second.endswith("python -m pytest")
