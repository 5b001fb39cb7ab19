"""
A process that holds one lock until it is lost, and says when it was told so.

``python lone_holder.py ENDPOINTS NAMESPACE LOCK TTL``. One line of JSON per step on standard output, with the time of
the monotonic clock.
"""

from __future__ import annotations

import json
import sys
import time

import trio

from etcd_infra import LostError, open_coordinator
from etcd_infra.abc import Put, Txn


def say(event, **facts):
    """Tell the parent."""
    print(json.dumps({"event": event, "at": time.monotonic(), **facts}), flush=True)


async def main(endpoints, namespace, name, ttl):
    """Hold, be told, and try what a careless program would do then."""
    async with open_coordinator(endpoints, namespace=namespace, ttl=int(ttl), call_timeout=1.0) as infra:
        try:
            async with infra.lock(name) as hold:
                say("held", token=hold.token)
                try:
                    await trio.sleep_forever()
                finally:
                    say("told", is_held=hold.is_held())
        except LostError:
            stale = Txn(hold.fence.proof, (Put(f"{namespace}/stale/{name}".encode(), b""),))
            say("late", succeeded=(await infra.backend.txn(stale)).succeeded)


trio.run(main, *sys.argv[1:])
