"""Programs that stop running while time goes on: what SIGSTOP, a long pause or a blocked loop look like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from etcd_infra.testing.simulation.clocks import Clocked, process_of
from etcd_infra.testing.simulation.trio_internals import runnable_tasks

if TYPE_CHECKING:
    from collections.abc import Iterable


class Freezer(trio.abc.Instrument):
    """
    Keeps the tasks of frozen processes from running.

    Deadlines pass and messages arrive all the same: the tasks that they wake run once their process is thawed,
    and find that it is later than they thought.
    """

    def __init__(self) -> None:
        self._frozen: dict[Clocked, list[trio.lowlevel.Task]] = {}

    def __contains__(self, process: object) -> bool:
        return process in self._frozen

    def freeze(self, process: Clocked) -> None:
        """Stop a process; harmless if it is stopped."""
        if process in self._frozen:
            return
        if not self._frozen:
            trio.lowlevel.add_instrument(self)
        runnable = runnable_tasks()
        self._frozen[process] = [task for task in runnable if process_of(task) is process]
        _remove(self._frozen[process])

    def thaw(self, process: Clocked) -> None:
        """Let a process go on; harmless if it runs."""
        tasks = self._frozen.pop(process, None)
        if tasks is None:
            return
        if not self._frozen:
            trio.lowlevel.remove_instrument(self)
        runnable_tasks().extend(tasks)

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """Take a task of a frozen process out of the queue that it was put into."""
        process = process_of(task)
        if process is not None and process in self._frozen:
            runnable_tasks().pop()
            self._frozen[process].append(task)


def _remove(tasks: Iterable[trio.lowlevel.Task]) -> None:
    runnable = runnable_tasks()
    for task in tasks:
        runnable.remove(task)
