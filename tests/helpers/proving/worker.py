"""
One process of the proving ground: locks, in whatever way there is, or leads again and again, writes under its fence, logs every step.

``python worker.py CONFIG``, one JSON object. Each step is one line of JSON in the log, with the time of the
monotonic clock, which all processes of a machine share; a step is logged before the next one begins, so that a
kill loses nothing but the step that was under way. When all rounds are done the process says so and keeps its
session, until it is asked to end by SIGTERM.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import trio

from etcd_infra import EtcdInfraError, LostError, OutcomeUnknownError, open_coordinator
from etcd_infra.abc import KeyRange, Put, Range, Txn

NOWHERE = Range(KeyRange.one(b"\0"), count_only=True)


class Worker:
    """Takes turns until enough of them were granted."""

    def __init__(self, infra, config):
        self._infra = infra
        self._name = config["name"]
        self._turn = self.lead if config["of"] == "election" else self.lock
        self._choose = self.choose_of_all if config["of"] == "all" else self.choose_lock
        self._locks = config["locks"]
        self._rounds = config["rounds"]
        self._rest = config["rest"]
        self._random = random.Random(config["name"])
        self._log = os.open(config["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._operation = 0

    def say(self, event, **facts):
        """Log one step."""
        line = {"event": event, "at": time.monotonic(), "op": self._operation, **facts}
        os.write(self._log, json.dumps(line).encode() + b"\n")

    async def revision(self):
        """Ask for the store's revision."""
        while True:
            try:
                return (await self._infra.backend.range(NOWHERE)).revision
            except EtcdInfraError:
                await trio.sleep(0.05)

    async def run(self):
        """Work."""
        granted = 0
        while granted < self._rounds:
            self._operation += 1
            granted += await self._turn()
            await trio.sleep(self._random.random() * self._rest)
        self._operation += 1
        self.say("done", revision=await self.revision())

    async def lead(self):
        """Campaign once, perhaps not to the end; return whether it led."""
        name = self._random.choice(self._locks)
        impatient = self._random.random() < 0.15
        kind = "impatient" if impatient else "wait"
        self.say("call", lock=name, kind=kind, revision=await self.revision())
        self._hold = None
        outcome = "released"
        try:
            with trio.CancelScope() as patience:
                if impatient:
                    patience.deadline = trio.current_time() + self._random.random() * 0.05
                proposal = json.dumps({"node": self._name}).encode()
                async with self._infra.election(name).lead(proposal) as leadership:
                    patience.deadline = float("inf")
                    await self.body(name, leadership)
                    if self._random.random() < 0.3:
                        await leadership.proclaim(proposal + b" ")
            if patience.cancelled_caught:
                outcome = "cancelled"
        except LostError as error:
            outcome = f"lost: {error}"
        except EtcdInfraError as error:
            outcome = f"failed: {type(error).__name__}: {error}"
        self.say("return", outcome=outcome)
        if self._hold is not None and outcome.startswith("lost"):
            await self.write(name, self._hold, "late")
        return self._hold is not None

    def choose_lock(self):
        """Choose a lock; return what to call it in the log, and the lock."""
        name = self._random.choice(self._locks)
        return name, self._infra.lock(name, ttl=4 if self._random.random() < 0.1 else None)

    def choose_of_all(self):
        """Choose a lock, one side of a read-write lock, a permit, or several locks."""
        name = self._random.choice(self._locks)
        several = self._random.sample(self._locks, self._random.randint(2, len(self._locks)))
        return self._random.choice(
            (
                (name, self._infra.lock(name)),
                (f"read {name}", self._infra.rwlock(name).read),
                (f"read {name}", self._infra.rwlock(name).read),
                (f"write {name}", self._infra.rwlock(name).write),
                (f"two of {name}", self._infra.semaphore(name, 2)),
                (f"two of {name}", self._infra.semaphore(name, 2)),
                ("+".join(several), self._infra.multi_lock(*several)),
            )
        )

    async def lock(self):
        """Ask for a lock once, in one way or another; return whether it was granted."""
        name, lock = self._choose()
        kind = self._random.choices(("wait", "attempt", "impatient"), (80, 8, 12))[0]
        self.say("call", lock=name, kind=kind, revision=await self.revision())
        self._hold = None
        outcome = "released"
        try:
            if kind == "attempt":
                async with lock.attempt() as hold:
                    if hold is None:
                        outcome = "refused"
                    else:
                        await self.body(name, hold)
            elif kind == "impatient":
                with trio.move_on_after(self._random.random() * 0.05) as patience:
                    hold = await lock.acquire()
                    patience.deadline = float("inf")
                    async with hold.scope():
                        await self.body(name, hold)
                if patience.cancelled_caught:
                    outcome = "cancelled"
            else:
                async with lock as hold:
                    await self.body(name, hold)
        except LostError as error:
            outcome = f"lost: {error}"
        except EtcdInfraError as error:
            outcome = f"failed: {type(error).__name__}: {error}"
        self.say("return", outcome=outcome)
        if self._hold is not None and outcome.startswith("lost"):
            # What a careless program would do: etcd must refuse it, whenever the owner changed.
            await self.write(name, self._hold, "late")
        return self._hold is not None

    async def body(self, name, hold):
        """Write twice under the fence, so that another holder's writes could come between."""
        self._hold = hold
        self.say("granted", lock=name, token=hold.token, lines=self.lines(hold))
        await self.write(name, hold, "first")
        await trio.sleep(self._random.random() * 0.01)
        await self.write(name, hold, "second")

    @staticmethod
    def lines(hold):
        """List the lines in which a hold has its places."""
        return [compare.range.key.decode().rpartition("/")[0] + "/" for compare in hold.fence.proof]

    async def write(self, name, hold, which):
        """Write once under the fence, and log what is known of the outcome."""
        value = {"worker": self._name, "op": self._operation, "token": hold.token, "which": which}
        puts = [
            Put(
                line.replace("/", "/register/", 1).rstrip("/").encode(),
                json.dumps(value | {"line": line}).encode(),
            )
            for line in self.lines(hold)
        ]
        facts = {"lock": name, "token": hold.token, "which": which}
        self.say("send", **facts)
        try:
            answer = await self._infra.backend.txn(Txn(hold.fence.proof, tuple(puts)))
        except OutcomeUnknownError:
            self.say("unknown", **facts)
        except EtcdInfraError as error:
            self.say("failed", error=type(error).__name__, **facts)
        except trio.Cancelled:
            self.say("unknown", **facts)
            raise
        else:
            self.say("written" if answer.succeeded else "refused", revision=answer.revision, **facts)


async def main(config):
    """Open a coordinator, work, keep the session, end."""
    with trio.open_signal_receiver(signal.SIGTERM) as asked_to_end:
        async with open_coordinator(
            config["endpoints"],
            namespace=config["namespace"],
            node_id=config["name"],
            ttl=config["ttl"],
            call_timeout=1.0,
            dial_timeout=1.0,
        ) as infra:
            worker = Worker(infra, config)
            worker.say("ready")
            await worker.run()
            await anext(aiter(asked_to_end))
        worker.say("closed")


if __name__ == "__main__":
    trio.run(main, json.loads(Path(sys.argv[1]).read_text()))
