"""The leases of the in-memory etcd: who lives until when, and what hangs on whom. Time is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace

from etcd_infra.errors import InvalidRequestError, LeaseExistsError, LeaseNotFoundError

MAX_TTL = 9_000_000_000
_FIRST_ID = 0x1000


@dataclass(slots=True)
class Lease:
    """One lease; `deadline` is on the clock of whoever passes `now`."""

    id: int
    ttl: int
    deadline: float
    keys: set[bytes] = field(default_factory=set[bytes])


class Leases:
    """All leases, and which one is due next."""

    def __init__(self, min_ttl: int = 2) -> None:
        self._min_ttl = min_ttl
        self._leases: dict[int, Lease] = {}
        # Invariant: each lease has an entry that is not later than its deadline. A renewal adds none: an
        # entry that is too early is put back with the right time when it comes up.
        self._due: list[tuple[float, int]] = []
        self._last_id = _FIRST_ID

    def __contains__(self, lease: int) -> bool:
        return lease in self._leases

    def ids(self) -> tuple[int, ...]:
        """Return the ids of all leases."""
        return tuple(sorted(self._leases))

    def find(self, lease: int) -> Lease | None:
        """Return a lease if it exists."""
        return self._leases.get(lease)

    def granted_ttl(self, ttl: int) -> int:
        """Say what is granted to one who asks for `ttl`."""
        # etcd: at least 1.5 election timeouts, rounded up; that is 2 s by default, also for 0 and below.
        return max(ttl, self._min_ttl)

    def grant(self, ttl: int, lease: int, now: float) -> Lease:
        """
        Create a lease; for id 0 the server chooses one.

        Raises:
            InvalidRequestError: the TTL is too large.
            LeaseExistsError: the id is taken.
        """
        if ttl > MAX_TTL:
            raise InvalidRequestError("etcdserver: too large lease TTL")
        if lease in self._leases:
            raise LeaseExistsError("etcdserver: lease already exists")
        lease = lease or self._free_id()
        seconds = self.granted_ttl(ttl)
        granted = Lease(lease, seconds, now + seconds)
        self._leases[lease] = granted
        heappush(self._due, (granted.deadline, lease))
        return granted

    def renew(self, lease: int, now: float) -> int:
        """Give a lease its full time again; return that, or 0 if the lease does not exist."""
        found = self._leases.get(lease)
        if found is None:
            return 0
        found.deadline = now + found.ttl
        return found.ttl

    def refresh(self, now: float) -> None:
        """Give every lease its full time again."""
        for lease in self._leases.values():
            lease.deadline = now + lease.ttl

    def none(self) -> Leases:
        """Return no leases, of the same minimum TTL."""
        return Leases(self._min_ttl)

    def copy(self) -> Leases:
        """Return leases of the same ids, TTLs, deadlines and keys."""
        twin = Leases(self._min_ttl)
        twin._last_id = self._last_id
        for lease in self._leases.values():
            twin._leases[lease.id] = Lease(lease.id, lease.ttl, lease.deadline, set(lease.keys))
            heappush(twin._due, (lease.deadline, lease.id))
        return twin

    def remove(self, lease: int) -> Lease:
        """
        End a lease; its keys are the caller's business.

        Raises:
            LeaseNotFoundError: it does not exist.
        """
        found = self._leases.pop(lease, None)
        if found is None:
            raise LeaseNotFoundError("etcdserver: requested lease not found")
        return found

    def move(self, key: bytes, old: int, new: int) -> None:
        """Take a key off one lease and hang it on another (0: none)."""
        if old == new:
            return
        former = self._leases.get(old)
        if former is not None:
            former.keys.discard(key)
        latter = self._leases.get(new)
        if latter is not None:
            latter.keys.add(key)

    def next_deadline(self) -> float | None:
        """Say when the next lease runs out."""
        while self._due:
            due, lease = self._due[0]
            found = self._leases.get(lease)
            if found is None:
                heappop(self._due)
            elif found.deadline > due:
                heapreplace(self._due, (found.deadline, lease))
            else:
                return found.deadline
        return None

    def due(self, now: float) -> int | None:
        """Name one lease whose time is over, the earliest first."""
        deadline = self.next_deadline()
        return self._due[0][1] if deadline is not None and deadline <= now else None

    def _free_id(self) -> int:
        self._last_id += 1
        while self._last_id in self._leases:
            self._last_id += 1
        return self._last_id
