"""What a backend refuses by itself."""

from __future__ import annotations

import pytest

from etcd_infra._backends.request_check import check_grant, check_txn_request
from etcd_infra._etcd.model import Compare, DeleteRange, KeyRange, Operator, Put, Range, Target, Txn
from etcd_infra.errors import InvalidRequestError
from etcd_infra.testing import MemoryEtcd

OPEN = DeleteRange(KeyRange.since(b"a"))
FATAL = [
    (OPEN, Put(b"a", ignore_value=True)),
    (OPEN, Put(b"a", b"v")),
    (Put(b"b", b"v"), OPEN),
    (DeleteRange(KeyRange.everything()), Put(b"a", b"v")),
    (OPEN, Txn(success=(Put(b"b", b"v"),))),
    (Txn(failure=(OPEN,)), Put(b"b", b"v")),
    (Txn(success=(OPEN, Put(b"b", b"v"))),),
]
"""Branches that put what they delete by the open end, which etcd does not notice, and dies of."""


@pytest.mark.parametrize("ops", FATAL)
async def test_fatal_transactions_are_refused(autojump_clock, ops):
    """A put inside an open-ended delete of the same branch, which can end every member, is never sent."""
    for txn in (Txn(success=ops), Txn(failure=ops)):
        with pytest.raises(InvalidRequestError, match="duplicate key"):
            check_txn_request(txn)
        etcd = MemoryEtcd()
        with pytest.raises(InvalidRequestError, match="duplicate key"):
            await etcd.txn(txn)
        assert 1 == etcd.store.revision


@pytest.mark.parametrize(
    "txn",
    [
        Txn(success=(OPEN,), failure=(Put(b"a"),)),
        Txn(success=(Put(b"A"), OPEN)),
        Txn(success=(OPEN, OPEN, DeleteRange(KeyRange.one(b"a")))),
        Txn(success=(Txn(success=(OPEN,), failure=(Put(b"a"),)),)),
        Txn(success=(Range(KeyRange.one(b"a"), revision=3),)),
        Txn((Compare(Target.VALUE, Operator.EQUAL, KeyRange.one(b"a"), b""),), (Put(b"a"),)),
    ],
)
def test_harmless_transactions_pass(txn):
    """What excludes or does not touch each other may stand together, and reads may name a revision."""
    check_txn_request(txn)


@pytest.mark.parametrize(
    ("target", "operand"),
    [(Target.VALUE, 0), (Target.MOD, b"0"), (Target.VERSION, "1"), (Target.LEASE, None), (Target.CREATE, True)],
)
def test_operands_have_their_targets_type(target, operand):
    """An operand of another type, which could be encoded as 0, is refused, in nested transactions too."""
    compare = Compare(target, Operator.EQUAL, KeyRange.one(b"a"), operand)
    for txn in (Txn((compare,)), Txn(failure=(Txn((compare,)),))):
        with pytest.raises(TypeError):
            check_txn_request(txn)


def test_grants_are_checked():
    """A TTL is an int, and a lease id of one's own is not negative."""
    check_grant(1, 0)
    for ttl in (1.0, True, "1", None):
        with pytest.raises(TypeError):
            check_grant(ttl, 0)
    with pytest.raises(ValueError):
        check_grant(1, -1)
