"""Bugs that naive transactions have."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRANSACTIONS = (
    Mutant(
        "phantoms",
        "The commit compares the keys that a range held, and not the range.",
        "_primitives/_reads.py",
        "        return (*keys, *[unchanged_since(wanted, at) for wanted, at in self._ranges.items()])\n",
        "        return tuple(keys)\n",
        "unit/test_stm.py::test_no_phantoms",
    ),
    Mutant(
        "range-compare-alone",
        "The commit compares the range, and not the keys that it held: deletions are missed.",
        "_primitives/_reads.py",
        "            self._keys.setdefault(kv.key, (kv, at))\n",
        "            self._keys.setdefault(kv.key, (kv, at)) if False else None\n",
        "unit/test_stm.py::test_no_phantoms",
    ),
    Mutant(
        "write-skew",
        "The commit compares only what it writes.",
        "_primitives/stm.py",
        "            return (*reads.conditions(), *reads.unwritten_since(written))\n",
        "            return reads.unwritten_since(written)\n",
        "unit/test_stm.py::test_write_skew_is_refused",
    ),
    Mutant(
        "blind-writes-collide-unseen",
        "At the strictest level a key that was written unread may have changed.",
        "_primitives/stm.py",
        "            return (*reads.conditions(), *reads.unwritten_since(written))\n",
        "            return reads.conditions()\n",
        "unit/test_stm.py::test_blind_write_conflicts_are_told_apart_at_snapshot_level",
    ),
    Mutant(
        "several-snapshots",
        "Each read of a run is of its own moment.",
        "_primitives/_reads.py",
        "        at = self.revision if self._one_snapshot else 0\n",
        "        at = 0\n",
        "unit/test_stm.py::test_every_run_sees_one_snapshot",
    ),
    Mutant(
        "read-only-unchecked",
        "A run that wrote nothing is not validated.",
        "_primitives/stm.py",
        "    if not proof and not conditions:\n",
        "    if not proof:\n",
        "unit/test_stm.py::test_read_only_runs_are_validated",
    ),
    Mutant(
        "timeout-by-hearsay",
        "A commit after its time is sent all the same.",
        "_primitives/two_phase.py",
        "        if self.remaining() <= 0:\n            verdict",
        "        if self.remaining() < -1000:\n            verdict",
        "unit/test_two_phase.py::test_own_time_over",
    ),
    Mutant(
        "two-verdicts",
        "A verdict is given whatever the record says.",
        "_primitives/_record.py",
        "        (undecided, *conditions),\n",
        "        conditions,\n",
        "unit/test_two_phase.py::test_zombie_commit_changes_nothing",
    ),
    Mutant(
        "commit-trusts-intents",
        "A commit does not compare what was promised: a foreign write is lost.",
        "_primitives/_record.py",
        "        (undecided, *conditions),\n",
        "        (undecided,),\n",
        "unit/test_two_phase.py::test_foreign_writer_is_noticed",
    ),
    Mutant(
        "nobody-resolves",
        "A transaction whose owner is gone is waited for, for ever.",
        "_primitives/_intents.py",
        "        if self.patience > 0:\n            return False\n",
        "        if self.patience > -1000:\n            return False\n",
        "unit/test_two_phase.py::test_timeout_is_written_and_the_late_commit_is_refused",
    ),
    Mutant(
        "increments-race",
        "`execute` does not compare what its increments read.",
        "_primitives/transaction.py",
        "        change = fit(change_of(folded, name.encode(), fence))\n",
        "        change = replace(fit(change_of(folded, name.encode(), fence)), conditions=())\n",
        "unit/test_transaction.py::test_concurrent_increments_of_four_processes_are_exact",
    ),
)
