"""Bugs that naive state, counters, watches and write-behinds have."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

STATE = (
    Mutant(
        "swap-compares-nothing",
        "Compare-and-swap writes whatever came between.",
        "_primitives/_key_write.py",
        "            () if expected_version is None else (Compare.modified_at(key, expected_version),),\n",
        "            (),\n",
        "unit/test_state.py::test_aba_by_version",
    ),
    Mutant(
        "absent-is-any-version",
        "Version 0 is taken for no expectation at all.",
        "_primitives/_key_write.py",
        "() if expected_version is None else",
        "() if not expected_version else",
        "unit/test_state.py::test_absent_is_version_zero_and_not_an_empty_value",
    ),
    Mutant(
        "update-makes-immortal",
        "An update of a key with a TTL puts it without its lease.",
        "_primitives/_key_write.py",
        "ignore_lease=keep_lease)",
        "ignore_lease=False)",
        "unit/test_state.py::test_update_keeps_the_ttl",
    ),
    Mutant(
        "deleted-what-was-not-there",
        "A deletion says that something was there.",
        "_primitives/_key_write.py",
        "exists = Compare(Target.CREATE, Operator.GREATER, one, 0)",
        "exists = Compare(Target.CREATE, Operator.GREATER, one, -1)",
        "unit/test_state.py::test_delete_tells_whether_it_was_there",
    ),
    Mutant(
        "fence-is-dropped",
        "A write's fence is not part of its Txn.",
        "_primitives/_cas.py",
        "    proof = change.fence.proof if change.fence else ()\n",
        "    proof = ()\n",
        "unit/test_state.py::test_every_write_takes_a_fence",
    ),
    Mutant(
        "intents-are-overlooked",
        "Writers do not wait for what others have promised.",
        "_primitives/_cas.py",
        "    if len(intents) <= MAX_INTENT_GUARDS:\n",
        "    if intents:\n        return []\n    if len(intents) <= MAX_INTENT_GUARDS:\n",
        "unit/test_two_phase.py::test_prepared_keys_are_kept",
    ),
    Mutant(
        "min-revision-is-a-wish",
        "A read that is older than it must be is returned.",
        "_primitives/_space.py",
        "        while (found := await self.backend.range(request)).revision < min_revision:\n",
        "        while (found := await self.backend.range(request)).revision < 0:\n",
        "unit/test_state.py::test_stale_linearizable_read_is_asked_again",
    ),
    Mutant(
        "add-compares-nothing",
        "A counter's sum is put whatever is there.",
        "_primitives/counter.py",
        "            (Compare.modified_at(self._key, known.mod_revision if known else 0),),\n",
        "            (),\n",
        "unit/test_counter.py::test_exact_under_contention_and_faults",
    ),
    Mutant(
        "all-get-the-sum",
        "Each caller of a batch is told the sum of all.",
        "_primitives/counter.py",
        "            request.result = number\n        encoded",
        "            request.result = number\n        for request in self._batch:\n            request.result = number\n        encoded",
        "unit/test_counter.py::test_results_are_those_of_one_by_one",
    ),
    Mutant(
        "cancelled-add-still-counts",
        "An add that was cancelled before it was sent is sent all the same.",
        "_primitives/counter.py",
        "            if not request.given_up:\n                self._batch.append(request)\n",
        "            self._batch.append(request)\n",
        "unit/test_counter.py::test_add_is_withdrawn_after_a_definite_refusal",
    ),
    Mutant(
        "write-behind-reorders",
        "A write is coalesced into a batch that is on its way already.",
        "_primitives/write_behind.py",
        "        if self.closed or (self.values",
        "        if (self.values",
        "unit/test_write_behind.py::test_writes_are_coalesced_per_key",
    ),
    Mutant(
        "write-behind-forgets",
        "Leaving a write-behind does not wait for what was not written yet.",
        "_primitives/write_behind.py",
        "            await self._written(self._numbers)\n        if self._error is None and self._batches:\n",
        "            await trio.lowlevel.checkpoint()\n        if self._error is None and False:\n",
        "unit/test_write_behind.py::test_leaving_flushes",
    ),
)
