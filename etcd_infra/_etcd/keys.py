"""
The key layout: the only module that knows which key belongs to what.

It renders full keys. A *segment* is a user's name in UTF-8 with `%`, `/` and control characters
percent-encoded, so that no name is ever the prefix of another name's keys; lease ids are lower-case hex
without padding, as etcd's Go client writes them. The layout of locks
and elections is that of etcd's Go `concurrency` package: a line is a prefix, the place in it is the create
revision, the rest of the key is free. Nothing else may ever live under `lock/{name}/` and `election/{name}/`.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

MAX_SEGMENT_BYTES: Final = 512
MAX_STATE_KEY_BYTES: Final = 1024
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPES: Final = {code: f"%{code:02X}" for code in (*range(0x20), 0x7F, ord("%"), ord("/"))}


def encode_segment(name: str) -> str:
    """
    Encode a user's name as one legible key segment.

    Raises:
        TypeError: `name` is no str.
        ValueError: `name` is empty, longer than 512 bytes when encoded, or holds lone surrogates.
    """
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        msg = f"a name must be a str, not {name!r}"
        raise TypeError(msg)
    if not name:
        msg = "a name must not be empty"
        raise ValueError(msg)
    encoded = name.translate(_ESCAPES)
    if len(encoded.encode()) > MAX_SEGMENT_BYTES:
        msg = f"a name must have at most {MAX_SEGMENT_BYTES} bytes, not {len(encoded.encode())}: {name[:40]!r}…"
        raise ValueError(msg)
    return encoded


def decode_segment(segment: str) -> str:
    """Undo `encode_segment`."""
    return unquote(segment, errors="surrogateescape")


class Keys:
    """The keys of one namespace; an empty namespace puts nothing in front."""

    __slots__ = ("namespace", "root")

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.root = f"{encode_segment(namespace)}/".encode() if namespace != "" else b""

    # ── the store's lineage ─────────────────────────────────────────────────────────────────────

    @property
    def epoch(self) -> bytes:
        """A random id, created once, without a lease."""
        return self.root + b"epoch"

    # ── sessions ────────────────────────────────────────────────────────────────────────────────

    @property
    def sessions(self) -> bytes:
        """The prefix of all sessions and their slots."""
        return self.root + b"session/"

    def session(self, lease: int) -> bytes:
        """A session: JSON node id, host, start; on its own lease. Its mod revision is the generation."""
        return self.sessions + b"%x" % lease

    def slot(self, lease: int, index: int) -> bytes:
        """A writer slot of a session."""
        return self.session(lease) + b"/op/%d" % index

    def parse_session(self, key: bytes) -> int | None:
        """Return the lease of a session's own key, None for other keys."""
        return _hex(key.removeprefix(self.sessions)) if key.startswith(self.sessions) else None

    # ── locks ───────────────────────────────────────────────────────────────────────────────────

    @property
    def locks(self) -> bytes:
        """The prefix of all locks' lines."""
        return self.root + b"lock/"

    def lock_line(self, name: str) -> bytes:
        """The prefix of one lock's line; `etcdctl lock` takes it without the last slash."""
        return self.locks + encode_segment(name).encode() + b"/"

    def parse_lock(self, key: bytes) -> str | None:
        """Return the lock's name of a key in a line, None for other keys."""
        return _name_of_line(key, self.locks)

    @property
    def rwlocks(self) -> bytes:
        """The prefix of all read-write locks' lines."""
        return self.root + b"rwlock/"

    def rwlock_line(self, name: str) -> bytes:
        """The prefix of one read-write lock's line; the places say who reads and who writes."""
        return self.rwlocks + encode_segment(name).encode() + b"/"

    def parse_rwlock(self, key: bytes) -> str | None:
        """Return the lock's name of a key in a line, None for other keys."""
        return _name_of_line(key, self.rwlocks)

    @property
    def semaphores(self) -> bytes:
        """The prefix of all semaphores."""
        return self.root + b"semaphore/"

    def semaphore(self, name: str) -> bytes:
        """The prefix of one semaphore's keys."""
        return self.semaphores + encode_segment(name).encode() + b"/"

    def semaphore_queue(self, name: str) -> bytes:
        """The line of those that wait for a permit."""
        return self.semaphore(name) + b"queue/"

    def semaphore_holders(self, name: str) -> bytes:
        """The line of those that have a permit."""
        return self.semaphore(name) + b"holder/"

    def semaphore_permits(self, name: str) -> bytes:
        """How many permits there are, in decimal; without a lease."""
        return self.semaphore(name) + b"permits"

    def parse_semaphore(self, key: bytes) -> str | None:
        """Return the semaphore's name of one of its keys, None for other keys."""
        return _name_of_line(key, self.semaphores)

    # ── elections and members ───────────────────────────────────────────────────────────────────

    @property
    def elections(self) -> bytes:
        """The prefix of all elections' lines."""
        return self.root + b"election/"

    def election_line(self, name: str) -> bytes:
        """The prefix of one election's line; `etcdctl elect` takes it without the last slash."""
        return self.elections + encode_segment(name).encode() + b"/"

    def parse_election(self, key: bytes) -> str | None:
        """Return the election's name of a key in a line, None for other keys."""
        return _name_of_line(key, self.elections)

    @property
    def members(self) -> bytes:
        """The prefix of the members of all groups."""
        return self.root + b"member/"

    def member_line(self, name: str) -> bytes:
        """The prefix of one group's members: JSON node id and metadata, each on its session's lease."""
        return self.members + encode_segment(name).encode() + b"/"

    def parse_member(self, key: bytes) -> str | None:
        """Return the group's name of a member's key, None for other keys."""
        return _name_of_line(key, self.members)

    # ── state ───────────────────────────────────────────────────────────────────────────────────

    def state(self, key: str) -> bytes:
        """
        A value of the user's; slashes are allowed in `key`.

        Raises:
            TypeError: `key` is no str.
            ValueError: `key` is empty, too long, or holds control characters or lone surrogates.
        """
        if not key and isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = "a state key must not be empty"
            raise ValueError(msg)
        return self.state_prefix(key)

    def state_prefix(self, prefix: str) -> bytes:
        """
        All state keys that begin with `prefix`, maybe an empty one.

        Raises:
            TypeError, ValueError: as for `state`.
        """
        if not isinstance(prefix, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"a state key must be a str, not {prefix!r}"
            raise TypeError(msg)
        encoded = prefix.encode()
        if len(encoded) > MAX_STATE_KEY_BYTES:
            most = MAX_STATE_KEY_BYTES
            msg = f"a state key must have at most {most} bytes, not {len(encoded)}: {prefix[:40]!r}…"
            raise ValueError(msg)
        if _CONTROL.search(prefix):
            msg = f"a state key must not hold control characters: {prefix!r}"
            raise ValueError(msg)
        return self.states + encoded

    @property
    def states(self) -> bytes:
        """The prefix of all state keys."""
        return self.root + b"state/"

    def parse_state(self, key: bytes) -> str | None:
        """Return the user's key of a state key, None for other keys."""
        if not key.startswith(self.states):
            return None
        return key.removeprefix(self.states).decode(errors="surrogateescape")

    # ── two-phase transactions ──────────────────────────────────────────────────────────────────

    @property
    def transactions(self) -> bytes:
        """The prefix of the records of all two-phase transactions."""
        return self.root + b"txn/"

    def transaction(self, transaction_id: str) -> bytes:
        """The record of one two-phase transaction."""
        return self.transactions + encode_segment(transaction_id).encode()

    @property
    def intents(self) -> bytes:
        """The prefix of all intents."""
        return self.root + b"intent/"

    def intent_of(self, state_key: bytes) -> bytes:
        """The intent on a full state key: its value is the id of the transaction that will change it."""
        return self.intents + state_key.removeprefix(self.states)

    # ── topics ──────────────────────────────────────────────────────────────────────────────────

    @property
    def topics(self) -> bytes:
        """The prefix of all topics."""
        return self.root + b"topic/"

    def topic(self, name: str) -> TopicKeys:
        """The keys of one topic."""
        return TopicKeys(self.topics + encode_segment(name).encode() + b"/")

    def parse_topic(self, key: bytes) -> str | None:
        """Return the topic's name of one of its keys, None for other keys."""
        return _name_of_line(key, self.topics)


class TopicKeys:
    """
    The keys of one topic, all under `root`.

    What everybody looks for in all groups at once (cursors, dead letters) has a line of its own beside the
    groups, so that one range finds it and nothing else.
    """

    __slots__ = ("cursors", "messages", "root", "trimmed", "trimmers")

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.messages = root + b"message/"
        self.cursors = root + b"cursor/"
        self.trimmed = root + b"trimmed"
        self.trimmers = root + b"trimmer/"

    def message(self, name: str) -> bytes:
        """A message: `{time-ordered}-{publisher}`, JSON head and payload; on no lease."""
        return self.messages + name.encode()

    @property
    def markers(self) -> bytes:
        """The prefix of what remembers message ids."""
        return self.root + b"id/"

    def marker(self, message_id: str) -> bytes:
        """The name of the message that was published under an id of the publisher's choice."""
        return self.markers + encode_segment(message_id).encode()

    def cursor(self, group: str) -> bytes:
        """How far a group has come."""
        return self.cursors + encode_segment(group).encode()

    def parse_cursor(self, key: bytes) -> str:
        """Return the group's name of a cursor."""
        return decode_segment(key.removeprefix(self.cursors).decode(errors="surrogateescape"))

    def group(self, group: str) -> bytes:
        """The prefix of what a group's consumers write."""
        return self.root + b"group/" + encode_segment(group).encode() + b"/"

    def consumers(self, group: str) -> bytes:
        """The line of those that want to consume for an ordered group."""
        return self.group(group) + b"consumer/"

    def shared(self, group: str) -> bytes:
        """The prefix of the claims and the progress of a work-sharing group."""
        return self.group(group) + b"shared/"

    def claims(self, group: str) -> bytes:
        """The prefix of a work-sharing group's claims."""
        return self.shared(group) + b"claim/"

    def claim(self, group: str, name: str) -> bytes:
        """Who handles a message of a work-sharing group: on the session's lease."""
        return self.claims(group) + name.encode()

    def progress(self, group: str, name: str) -> bytes:
        """How often a message of a work-sharing group was tried, and whether it is done."""
        return self.shared(group) + b"progress/" + name.encode()

    def dead_letters(self, group: str) -> bytes:
        """The prefix of a group's dead letters."""
        return self.root + b"dead/" + encode_segment(group).encode() + b"/"

    def dead_letter(self, group: str, name: str) -> bytes:
        """A message that a group has given up."""
        return self.dead_letters(group) + name.encode()

    def replays(self, group: str) -> bytes:
        """The prefix of what is noted of replayed dead letters."""
        return self.root + b"dead-replayed/" + encode_segment(group).encode() + b"/"

    def replay(self, group: str, name: str) -> bytes:
        """The name of the message that a dead letter was published again as."""
        return self.replays(group) + name.encode()


def last_segment(key: bytes) -> str:
    """Return what stands after the last slash: of a message, a claim, a progress or a dead letter its name."""
    return key.rpartition(b"/")[2].decode(errors="surrogateescape")


READER: Final = b"read-"
WRITER: Final = b"write-"


def place(line: bytes, lease: int, number: int, *, role: bytes = b"") -> bytes:
    """Return a key in a line: unique for ever, as `number` is never used twice by one lease."""
    return line + role + b"%x-%d" % (lease, number)


def is_writer(key: bytes) -> bool:
    """Whether a key in the line of a read-write lock is a writer's."""
    return key.rpartition(b"/")[2].startswith(WRITER)


def place_lease(key: bytes) -> int | None:
    """Return the lease in the name of a key in a line: ours (`{role}{hex}-{n}`) or Go's (`{hex}`)."""
    name = key.rpartition(b"/")[2].removeprefix(READER).removeprefix(WRITER)
    return _hex(name.partition(b"-")[0])


def _name_of_line(key: bytes, prefix: bytes) -> str | None:
    segment, slash, _ = key.removeprefix(prefix).partition(b"/")
    if not (key.startswith(prefix) and slash and segment):
        return None
    return decode_segment(segment.decode(errors="surrogateescape"))


def _hex(text: bytes) -> int | None:
    try:
        return int(text, 16)
    except ValueError:
        return None
