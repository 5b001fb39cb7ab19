"""Laws of the in-memory store, held against a model that is too simple to be wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from etcd_infra._backends.memory_store import Store
from etcd_infra._etcd.model import (
    Compare,
    DeleteRange,
    Event,
    KeyRange,
    KeyValue,
    Put,
    Range,
    Txn,
    WatchRequest,
    prefix_end,
)
from etcd_infra.errors import CompactedError, InvalidRequestError

short = st.binary(max_size=3)
keys = st.sampled_from([b"\0", b"a", b"a\0", b"ab", b"b", b"\xfe", b"\xff", b"\xff\xff"])
ends = st.one_of(st.just(b""), st.just(b"\0"), keys)
spans = st.builds(KeyRange, keys, ends)
puts = st.builds(Put, keys, short)
deletes = st.builds(DeleteRange, spans)
branches = st.lists(st.one_of(puts, deletes), max_size=4).map(tuple)


@dataclass
class Naive:
    """Every state of the key space, as dictionaries."""

    states: list[dict[bytes, KeyValue]] = field(default_factory=lambda: [{}, {}])

    def apply(self, ops: tuple[Put | DeleteRange, ...]) -> None:
        """Apply operations in one revision, if they change anything."""
        revision = len(self.states)
        state = dict(self.states[-1])
        changed = False
        for op in ops:
            if isinstance(op, Put):
                old = state.get(op.key, KeyValue(op.key))
                created = old.create_revision or revision
                state[op.key] = KeyValue(op.key, op.value, created, revision, old.version + 1)
                changed = True
            else:
                gone = [key for key in state if inside(key, op.range)]
                changed = changed or bool(gone)
                state = {key: kv for key, kv in state.items() if key not in gone}
        if changed:
            self.states.append(state)

    def read(self, wanted: KeyRange, revision: int) -> list[KeyValue]:
        """List a range at a revision."""
        return [kv for key, kv in sorted(self.states[revision].items()) if inside(key, wanted)]


def inside(key: bytes, wanted: KeyRange) -> bool:
    """Whether a key is in a range, in etcd's own words."""
    if wanted.end == b"":
        return key == wanted.key
    return key >= wanted.key and (wanted.end == b"\0" or key < wanted.end)


def built(plan: list[tuple[Put | DeleteRange, ...]]) -> tuple[Store, Naive]:
    """Apply a plan to a store and to the model; a branch that is refused changes neither."""
    store, naive = Store(), Naive()
    for ops in plan:
        try:
            store.txn(Txn(success=ops), 0.0)
        except InvalidRequestError:
            continue
        naive.apply(ops)
    return store, naive


@given(short, short)
def test_prefix_range_is_startswith(prefix, key):
    """A key is in the range of a prefix exactly if it starts with it."""
    assert key.startswith(prefix) is (key in KeyRange.prefix(prefix) or (key == b"" and prefix == b""))


@given(short.filter(bool))
def test_prefix_end_is_the_least(prefix):
    """The end of a prefix is above every key with that prefix, and itself no such key."""
    end = prefix_end(prefix)
    assert end == b"\0" or (end > prefix + b"\xff" * 8 and not end.startswith(prefix))


@given(st.lists(branches, max_size=12), spans, st.integers(0, 5), st.data())
def test_ranges_match_the_model(plan, wanted, limit, data):
    """A range at any revision, with any limit, finds and counts what the model has."""
    store, naive = built(plan)
    assert len(naive.states) - 1 == store.revision
    revision = data.draw(st.integers(1, store.revision))
    kvs = naive.read(wanted, revision)
    found = store.range(Range(wanted, revision=revision, limit=limit), 0.0)
    assert tuple(kvs[:limit] if limit else kvs) == found.kvs
    assert (len(kvs), 0 < limit < len(kvs)) == (found.count, found.more)
    present = store.range(Range(wanted, limit=limit, count_only=True), 0.0)
    assert len(naive.read(wanted, store.revision)) == present.count


@given(st.lists(branches, max_size=12), spans, st.data())
def test_compaction_changes_no_answer_that_it_allows(plan, wanted, data):
    """After a compaction every revision from it on reads as before, and every lower one is refused."""
    store, naive = built(plan)
    steps = data.draw(st.lists(st.integers(1, store.revision), unique=True, max_size=3).map(sorted))
    for compacted in steps:
        store.compact(compacted, 0.0)
    for revision in range(1, store.revision + 1):
        if steps and revision < steps[-1]:
            try:
                store.range(Range(wanted, revision=revision), 0.0)
            except CompactedError:
                continue
            raise AssertionError(f"revision {revision} was readable")
        kvs = naive.read(wanted, revision)
        assert tuple(kvs) == store.range(Range(wanted, revision=revision), 0.0).kvs


@given(st.lists(branches, max_size=12), spans)
def test_compare_over_a_range_matches_the_model(plan, wanted):
    """Nothing is in a range exactly if the model has nothing there."""
    store, naive = built(plan)
    holds = store.txn(Txn((Compare.nothing_in(wanted),)), 0.0).succeeded
    assert (not naive.read(wanted, store.revision)) is holds


@settings(max_examples=200)
@given(st.lists(st.tuples(branches, st.booleans(), st.booleans()), max_size=12), spans, st.integers(0, 4))
def test_watch_delivers_every_change_once(plan, wanted, start):
    """A watch, however seldom it is polled, delivers exactly the events of its range, unless it is compacted."""
    store, record = Store(), Store(keep_history=True)
    watcher = store.watch(WatchRequest(wanted, start_revision=start), 0.0)
    first = start or 2
    seen: list[Event] = []
    compacted = False
    for ops, polled, compact in plan:
        try:
            store.txn(Txn(success=ops), 0.0)
        except InvalidRequestError:
            continue
        record.txn(Txn(success=ops), 0.0)
        if polled:
            compacted = compacted or drain(watcher, seen)
        if compact and store.revision > store.compact_revision:
            assert store.compact(store.revision, 0.0) == record.compact(store.revision, 0.0)
    compacted = compacted or drain(watcher, seen)

    happened = [
        event
        for commit in record.history.commits
        for event in commit.events
        if commit.revision >= first and event.key in wanted
    ]
    bare = [Event(event.kind, event.kv) for event in happened]
    assert seen == (bare[: len(seen)] if compacted else bare)
    if start in {0, 2}:
        assert not compacted, "a watch that was in step from the start was ended"


def drain(watcher, seen: list[Event]) -> bool:
    """Poll all there is; say whether the watch was ended."""
    while (answer := watcher.poll(0.0)) is not None:
        if answer.canceled:
            return True
        seen += answer.events
    return False


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("grant"), st.integers(1, 3)),
            st.tuples(st.just("revoke"), st.integers(1, 3)),
            st.tuples(st.just("wait"), st.integers(1, 3)),
            st.tuples(keys, st.integers(0, 3)),
        ),
        max_size=25,
    )
)
def test_leases_and_keys_agree(plan):
    """Whatever happens, a key names a lease exactly if the lease lives and has the key."""
    store, now = Store(), 0.0
    for what, lease in plan:
        living = store.lease_list(now)
        if what == "grant" and lease not in living:
            store.lease_grant(2 + lease, lease, now)
        elif what == "revoke" and lease in living:
            store.lease_revoke(lease, now)
        elif what == "wait":
            now += lease
        elif isinstance(what, bytes) and (not lease or lease in living):
            store.txn(Txn(success=(Put(what, b"v", lease=lease),)), now)
        snapshot = store.snapshot()
        by_key = {(kv.key, kv.lease) for kv in snapshot.kvs if kv.lease}
        by_lease = {(key, lease) for lease, _, attached in snapshot.leases for key in attached}
        assert by_key == by_lease


@given(st.lists(branches, max_size=12))
def test_history_replays_to_the_present(plan):
    """Replaying every event of the history gives the present state, and each revision exists once."""
    store, _ = built(plan)
    state: dict[bytes, KeyValue] = {}
    for number, commit in enumerate(store.history.commits):
        assert number + 2 == commit.revision
        for event in commit.events:
            assert commit.revision == event.revision
            assert state.get(event.key) == event.prev_kv
            if event.is_delete:
                del state[event.key]
            else:
                state[event.key] = event.kv
    assert tuple(kv for _, kv in sorted(state.items())) == store.snapshot().kvs
