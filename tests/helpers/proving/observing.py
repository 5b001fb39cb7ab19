"""The ground truth: one undisturbed watch per member, from the first revision on."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

from etcd_infra import open_etcd
from etcd_infra._backends.memory_history import Commit
from etcd_infra.abc import KeyRange
from tests.helpers.proving import line_history


@dataclass
class Observation:
    """What one member's watch has shown, and when."""

    commits: list[Commit] = field(default_factory=list)
    times: dict[int, float] = field(default_factory=dict)
    places: dict[bytes, tuple[int, str, int]] = field(default_factory=dict)

    @property
    def revision(self) -> int:
        """The last revision that was shown."""
        return self.commits[-1].revision if self.commits else 0

    async def run(self, endpoint, namespace):
        """Watch until cancelled; a compaction that overtakes the watch is an error."""
        async with open_etcd(endpoint) as backend:
            async with backend.watch(KeyRange.prefix(namespace + b"/"), start_revision=1) as batches:
                async for batch in batches:
                    now = time.monotonic()
                    for event in batch.events:
                        self._take(event)
                        self.times.setdefault(event.revision, now)

    def _take(self, event):
        if self.commits and self.commits[-1].revision == event.revision:
            self.commits[-1] = Commit(event.revision, (*self.commits[-1].events, event))
        else:
            self.commits.append(Commit(event.revision, (event,)))
        if line_history.is_place(event.key):
            if event.is_delete:
                self.places.pop(event.key, None)
            else:
                who = json.loads(event.kv.value)["node"] if event.kv.value else ""
                self.places[event.key] = (event.kv.create_revision, who, event.kv.lease)

    def holders(self) -> dict[bytes, tuple[int, str, int]]:
        """List who is first in each line now, by key: token, process, lease."""
        first: dict[bytes, bytes] = {}
        for key, (created, *_) in self.places.items():
            line = key[: key.rfind(b"/")]
            if line not in first or created < self.places[first[line]][0]:
                first[line] = key
        return {key: self.places[key] for key in first.values()}


def one_truth(observations: list[Observation]) -> tuple[list[Commit], dict[int, float]]:
    """
    Check that all members showed the same; return it, and when each revision was first seen.

    A member that was late at the end shows less: as many revisions as it shows must be the same.
    """
    longest = max(observations, key=lambda one: one.revision)
    for one in observations:
        shown = len(one.commits)
        assert one.commits == longest.commits[:shown], first_difference(one.commits, longest.commits)
    times = {}
    for one in observations:
        for revision, at in one.times.items():
            times[revision] = min(at, times.get(revision, at))
    return longest.commits, times


def first_difference(one, two):
    """Say where two histories part."""
    return next((f"{a} is not {b}" for a, b in zip(one, two, strict=False) if a != b), "one is shorter")
