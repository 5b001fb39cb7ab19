"""The process in which a connection was made: a child that was forked must neither use nor close it."""

from __future__ import annotations

import os

from etcd_infra.errors import ForkedError


class Home:
    """The process that makes this object."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._process

    def check(self) -> None:
        """
        Do nothing in that process.

        Raises:
            ForkedError: this is a child of it.
        """
        if not self.is_here:
            raise ForkedError("this connection belongs to the parent process; open a new one after the fork")
