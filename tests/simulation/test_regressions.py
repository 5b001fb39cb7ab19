"""What once failed under simulation."""

from __future__ import annotations

import pytest

from tests.simulation.running import describe, regressions, run_seed


@pytest.mark.parametrize(("entry"), [*regressions()], ids=lambda entry: entry["found"][:60])
def test_what_once_failed(entry):
    """Each seed that once found something finds nothing any more, under the plan and the shape of that time."""
    run, _ = run_seed(entry["seed"], of=entry["of"], plan=entry["plan"], shape=entry["shape"])
    assert not run.violations, describe(run, of=entry["of"])
