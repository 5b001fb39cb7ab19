"""The contract bites: for each rule there is a store that breaks it, and a fact that tells."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from etcd_infra._backends.memory_store import Store
from etcd_infra.testing import MemoryEtcd, check_backend
from tests.contract import (
    mutants,
    test_leases,
    test_limits,
    test_ranges,
    test_revisions,
    test_txns,
    test_watches,
)
from tests.contract.conftest import MEMORY
from tests.contract.mutants import Mutant
from tests.contract.world import World

KILLERS = {
    mutants.RevisionGrowsOnNoOpDelete: test_revisions.test_what_changes_nothing_makes_no_revision,
    mutants.RevisionPerKey: test_revisions.test_each_changing_request_is_one_revision,
    mutants.SameValueIsNoChange: test_revisions.test_same_value_again_is_a_change,
    mutants.FirstRevisionIsZero: test_revisions.test_empty_store_is_at_revision_1,
    mutants.VersionGoesOnAfterDelete: test_revisions.test_recreated_key_starts_again,
    mutants.RejectedTxnIsHalfApplied: test_revisions.test_rejected_request_makes_no_revision,
    mutants.CompactedReadsAreAnswered: test_revisions.test_compacted_revision_is_refused,
    mutants.FutureReadsAreAnswered: test_revisions.test_future_revision_is_refused,
    mutants.CompactionTwiceIsFine: test_revisions.test_compaction_twice_is_told_so,
    mutants.CompactionEatsItsOwnRevision: test_revisions.test_compacted_revision_is_refused,
    mutants.CountHonoursLimit: test_ranges.test_count_ignores_the_limit,
    mutants.HeaderIsTheRequestedRevision: test_revisions.test_header_is_the_stores_revision,
    mutants.LimitComesBeforeSort: test_ranges.test_sort_comes_before_the_limit,
    mutants.NestedComparesSeeTheStateAfter: test_txns.test_nested_compares_see_the_state_before,
    mutants.MissingValueIsNotEqual: test_txns.test_value_compare_on_missing_key_is_false,
    mutants.MissingValueIsEmpty: test_txns.test_value_compare_on_missing_key_is_false,
    mutants.EmptyRangeCompareIsVacuous: test_txns.test_empty_range_compares_as_one_missing_key,
    mutants.EmptyRangeCompareIsFalse: test_txns.test_empty_range_compares_as_one_missing_key,
    mutants.RangeCompareNeedsOneKey: test_txns.test_range_compare_needs_every_key,
    mutants.OperatorIsTurnedAround: test_txns.test_compare_with_each_operator,
    mutants.DuplicateKeysAreAllowed: test_txns.test_key_written_twice_in_one_branch_is_refused,
    mutants.OtherBranchIsNotChecked: test_txns.test_key_written_twice_in_the_other_branch_is_refused,
    mutants.LimitIsOnAllOperations: test_txns.test_each_list_may_have_128_entries,
    mutants.RangesSeeTheStateBefore: test_txns.test_operations_run_in_order,
    mutants.PutKeepsTheLease: test_leases.test_put_without_lease_detaches,
    mutants.IgnoreLeaseDetaches: test_revisions.test_ignore_lease_keeps_the_lease,
    mutants.RevokeKeyByKey: test_leases.test_expiry_is_one_revision_in_key_order,
    mutants.RevokeMakesARevision: test_leases.test_revoke_without_keys_is_silent,
    mutants.RevokeInOrderOfAttachment: test_leases.test_revoke_is_one_revision_in_key_order,
    mutants.DeletedKeyStaysAttached: test_leases.test_deleted_key_leaves_its_lease,
    mutants.MinimumTtlIsIgnored: test_leases.test_short_ttl_is_raised,
    mutants.KeepAliveDoesNothing: test_leases.test_keep_alive_postpones_the_end,
    mutants.LeaseEndsEarly: test_leases.test_lease_ends_after_its_ttl_and_not_before,
    mutants.LeaseNeverEnds: test_leases.test_lease_ends_after_its_ttl_and_not_before,
    mutants.KeepAliveOfNothingRevives: test_leases.test_keep_alive_of_a_missing_lease_answers_0,
    mutants.GrantTwiceRenews: test_leases.test_client_chooses_an_id,
    mutants.DeleteEventsHaveMetadata: test_watches.test_delete_event_has_key_and_revision_only,
    mutants.EventsAreSortedByKey: test_watches.test_events_of_a_txn_keep_the_order_of_its_operations,
    mutants.CompactedWatchGoesOn: test_watches.test_compacted_start_ends_the_watch,
    mutants.CompactedWatchSkips: test_watches.test_compacted_start_ends_the_watch,
    mutants.StartIsExclusive: test_watches.test_start_is_inclusive,
    mutants.CompactionEndsQuietWatches: test_watches.test_quiet_watch_survives_compaction,
    mutants.CatchUpResumesFromTheHeader: test_watches.test_catch_up_of_many_revisions_is_whole,
    mutants.PrevKvSurvivesCompaction: test_watches.test_prev_kv_is_missing_when_it_is_compacted,
    mutants.PrevKvUnasked: test_watches.test_no_prev_kv_unless_asked,
    mutants.FiltersDoNothing: test_watches.test_filters_suppress_events,
    mutants.FutureWatchStaysMute: test_watches.test_future_start_is_silent_until_it_is_reached,
    mutants.FullStoreRefusesDeletes: test_limits.test_full_store,
    mutants.FullStoreTakesPutsOfTheOtherBranch: test_limits.test_full_store,
}
"""The fact that tells each mutant from an etcd."""

SURVIVE_THE_KIT = {
    mutants.FirstRevisionIsZero,
    mutants.LimitIsOnAllOperations,
    mutants.MinimumTtlIsIgnored,
    mutants.CatchUpResumesFromTheHeader,
    mutants.CompactionEndsQuietWatches,
    mutants.PrevKvSurvivesCompaction,
    mutants.FutureWatchStaysMute,
    mutants.FullStoreRefusesDeletes,
}
"""Mutants whose rule is no part of `check_backend`."""


def outcome(fact, store: Store) -> str:
    """Run one fact of the contract on a store; return the name of what it raised, or nothing."""
    etcd = getattr(store, "etcd", MemoryEtcd)(store=store)
    world = World(etcd, b"test/", store=store)
    supplies = {"world": world, "fresh": world, "target": MEMORY}
    wanted = {name: supplies[name] for name in inspect.signature(fact).parameters}
    return run(partial(fact, **wanted))


def run(call) -> str:
    """Run an async function under a jumping clock; return the name of what it raised, or nothing."""
    try:
        trio.run(call, clock=MockClock(autojump_threshold=0))
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - any failure tells
        return type(error).__name__
    return ""


def every_mutant() -> list[type[Mutant]]:
    """List the mutants."""
    return [
        kind
        for kind in vars(mutants).values()
        if isinstance(kind, type) and issubclass(kind, Mutant) and kind is not Mutant
    ]


def test_every_mutant_has_a_killer():
    """No mutant is forgotten."""
    assert set(every_mutant()) == set(KILLERS)


@pytest.mark.parametrize("mutant", every_mutant(), ids=lambda kind: kind.__name__)
def test_contract_tells_the_mutant(mutant):
    """The fact holds for the store as it is, and not for the mutant."""
    fact = KILLERS[mutant]
    assert "" == outcome(fact, Store())
    assert "" == outcome(fact, Mutant())
    assert outcome(fact, mutant())


@pytest.mark.parametrize("mutant", every_mutant(), ids=lambda kind: kind.__name__)
def test_kit_tells_most_mutants(mutant):
    """`check_backend` tells the mutants, too, but for those that are listed."""
    told = run(partial(check_backend, mutant.etcd(store=mutant())))
    assert (mutant not in SURVIVE_THE_KIT) is bool(told)
