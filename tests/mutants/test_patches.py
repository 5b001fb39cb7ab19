"""Every mutant can still be made, and its killer exists; `just mutants` runs them."""

from __future__ import annotations

import ast

import pytest

from tests.mutants import EVERY_MUTANT
from tests.mutants.mutant import ROOT


@pytest.mark.parametrize("mutant", EVERY_MUTANT, ids=lambda mutant: mutant.name)
def test_patch_applies_and_its_killer_exists(mutant):
    """The piece that a bug replaces occurs once, the result is Python, and the test that tells it is there."""
    mutated = mutant.applied((ROOT / "etcd_infra" / mutant.file).read_text())
    ast.parse(mutated)
    file, _, test = mutant.killer.partition("::")
    text = (ROOT / "tests" / file).read_text()
    assert f"def {test.partition('[')[0]}(" in text or not test
    assert mutant.bug.endswith(".")


def test_names_are_unique():
    """No two mutants have one name."""
    names = [mutant.name for mutant in EVERY_MUTANT]
    assert sorted(set(names)) == sorted(names)
