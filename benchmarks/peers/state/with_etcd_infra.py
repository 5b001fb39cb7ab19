"""
etcd-infra in the race for state.

Modes "bare set" and "bare add" use the same backend without slots: a put, and a compare of the revision in a loop. They
tell what it costs that a lost answer is resolved.
"""

from __future__ import annotations

import time

import trio
from common import Race

from etcd_infra import Consistency, open_coordinator, open_etcd
from etcd_infra.abc import Compare, KeyRange, Put, Range, Txn


async def operation(race, infra, task):
    """Return what one task does again and again."""
    if race.mode == "add":
        return infra.counter(f"bench/{race.run_id}").add
    key = f"bench/{race.run_id}/{task}"
    await infra.state.set(key, "x" * 100)
    if race.mode == "get":
        return lambda: infra.state.get(key)
    if race.mode == "stale get":
        return lambda: infra.state.get(key, consistency=Consistency.SERIALIZABLE)
    return lambda: infra.state.set(key, "y" * 100)


async def bare_operation(race, backend, task):
    if race.mode == "bare set":
        return lambda: backend.put(f"bare/{race.run_id}/{task}".encode(), b"y" * 100)
    key = f"bare/{race.run_id}".encode()
    known = [0, 0]

    async def add():
        while True:
            number, revision = known
            answer = await backend.txn(
                Txn(
                    (Compare.modified_at(key, revision),),
                    (Put(key, str(number + 1).encode()),),
                    (Range(KeyRange.one(key)),),
                )
            )
            if answer.succeeded:
                known[:] = number + 1, answer.revision
                return
            (kv,) = answer.results[0].kvs
            known[:] = int(kv.value), kv.mod_revision

    return add


async def work(race, operate, task):
    while race.goes_on():
        asked_at = time.perf_counter()
        await operate()
        race.done(task, asked_at)


async def main():
    race = Race()
    bare = race.mode.startswith("bare")
    opened = open_etcd(race.endpoint) if bare else open_coordinator(race.endpoint, namespace="bench")
    async with opened as client:
        make = bare_operation if bare else operation
        operations = [await make(race, client, task) for task in range(race.tasks)]
        race.start()
        async with trio.open_nursery() as nursery:
            for task, operate in enumerate(operations):
                nursery.start_soon(work, race, operate, task)
    race.report()


trio.run(main)
