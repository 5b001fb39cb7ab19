"""The bugs that naive implementations have, as small patches of our own code, and the test that tells each."""

from __future__ import annotations

from tests.mutants.elections import ELECTIONS
from tests.mutants.lock_family import LOCK_FAMILY
from tests.mutants.locks import LOCKS
from tests.mutants.roads import ROADS
from tests.mutants.sessions import SESSIONS
from tests.mutants.state import STATE
from tests.mutants.topics import TOPICS
from tests.mutants.transactions import TRANSACTIONS
from tests.mutants.transport import TRANSPORT

EVERY_MUTANT = (*LOCKS, *LOCK_FAMILY, *ELECTIONS, *ROADS, *SESSIONS, *STATE, *TOPICS, *TRANSACTIONS, *TRANSPORT)
