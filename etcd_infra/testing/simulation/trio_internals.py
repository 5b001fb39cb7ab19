"""
All that a simulation needs of Trio beyond its public names; nothing else touches Trio's insides.

The scheduler's source of randomness and its sorted batches make a run repeatable (pytest-trio and
Hypothesis use the same two names); the queue of runnable tasks is where a paused program's tasks are taken
out; the list of deadlines is replaced by one that knows whose clock a deadline is on.
"""

# ruff: noqa: SLF001 - that is what this module is for
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportAttributeAccessIssue=false, reportUnknownArgumentType=false

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from trio._core import _run

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Generator

    import trio


@contextmanager
def deterministic_scheduling(seed: str) -> Generator[None]:
    """Let `seed` decide every tie in scheduling; afterwards all is as it was."""
    run = cast("Any", _run)
    state, allowed = run._r.getstate(), run._ALLOW_DETERMINISTIC_SCHEDULING
    run._r.seed(seed)
    run._ALLOW_DETERMINISTIC_SCHEDULING = True
    try:
        yield
    finally:
        run._r.setstate(state)
        run._ALLOW_DETERMINISTIC_SCHEDULING = allowed


def _runner() -> Any:
    return cast("Any", _run).GLOBAL_RUN_CONTEXT.runner


def runnable_tasks() -> deque[trio.lowlevel.Task]:
    """Return the queue of tasks that are about to run."""
    return cast("deque[trio.lowlevel.Task]", _runner().runq)


def something_runs() -> bool:
    """Whether some task is about to run."""
    return bool(_runner().runq)


def somebody_waits_for_idle() -> bool:
    """Whether some task is in `trio.testing.wait_all_tasks_blocked`."""
    return bool(_runner().waiting_for_idle)


def replace_deadlines(deadlines: object) -> None:
    """Let this run keep its deadlines in `deadlines`; there must be none yet."""
    _runner().deadlines = deadlines


def registered_deadline(scope: trio.CancelScope) -> float:
    """Return the deadline that a scope has in the list of deadlines."""
    return cast("float", cast("Any", scope)._registered_deadline)
