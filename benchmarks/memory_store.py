"""
How fast the store of the in-memory etcd is, by itself: no Trio, no network.

Prints one line per figure; run it as ``python benchmarks/memory_store.py``.
"""

from __future__ import annotations

import argparse
import time

from etcd_infra._backends.memory_store import Store
from etcd_infra._etcd.model import Compare, KeyRange, Operator, Put, Range, Target, Txn

KEYS = 100_000
READ = 100


def filled(keys: int, **options: int) -> Store:
    store = Store(**options)
    for number in range(keys):
        store.txn(Txn(success=(Put(b"key/%08d" % number, b"value"),)), 0.0)
    return store


def guarded_puts(store: Store, seconds: float) -> float:
    """Write one key again and again, each time if it is as it was left."""
    key, revision, done = b"key/guarded", 0, 0
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        guard = Compare(Target.MOD, Operator.EQUAL, KeyRange.one(key), revision)
        answer = store.txn(Txn((guard,), (Put(key, b"value"),)), 0.0)
        assert answer.succeeded
        revision, done = answer.revision, done + 1
    return done / spent


def ranges(store: Store, seconds: float) -> float:
    """Read some neighbours, from the middle on."""
    request = Range(KeyRange(b"key/%08d" % (KEYS // 2), b"key/%08d" % (KEYS // 2 + READ)))
    done = 0
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        assert len(store.range(request, 0.0).kvs) == READ
        done += 1
    return done / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure each figure")
    seconds = parser.parse_args().seconds

    compacting, full = filled(0, auto_compact_revisions=10_000), filled(KEYS)
    print(f"guarded puts, empty store:           {guarded_puts(Store(), seconds):>9,.0f} Txns/s")
    print(f"guarded puts, compacting itself:     {guarded_puts(compacting, seconds):>9,.0f} Txns/s")
    print(f"guarded puts, {KEYS:,} keys:          {guarded_puts(full, seconds):>9,.0f} Txns/s")
    print(f"ranges of {READ} out of {KEYS:,} keys:   {ranges(full, seconds):>9,.0f} ranges/s")


if __name__ == "__main__":
    main()
