"""Writes for a race of watchers: Txns of 50 puts of 100 bytes, one after the other, as fast as etcd takes them."""

from __future__ import annotations

import sys
from itertools import count

import trio
from common import says

from etcd_infra import open_etcd
from etcd_infra.abc import Put, Txn

TOGETHER = 50


async def main():
    endpoint, run_id, keys, seconds = sys.argv[1:]
    keys = int(keys)
    async with open_etcd(endpoint) as etcd:
        says("begins")
        with trio.move_on_after(float(seconds)):
            for first in count(0, TOGETHER):
                puts = (
                    Put(f"bench/{run_id}/{number % keys}".encode(), b"z" * 100)
                    for number in range(first, first + TOGETHER)
                )
                await etcd.txn(Txn(success=tuple(puts)))


trio.run(main)
