"""Fixtures of the tests on real servers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from etcd_infra._backends import opening

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from etcd_infra._etcd.backend import Backend


@pytest.fixture(
    params=["http2", *(pytest.param(road, marks=pytest.mark.slow) for road in ("grpcio", "gateway"))]
)
def transport(request) -> str:
    """Name the road to etcd: by default the default one, the others with the slow tests."""
    return request.param


@pytest.fixture
def open_etcd(transport) -> Callable[..., AbstractAsyncContextManager[Backend]]:
    """Return `etcd_infra.open_etcd` for that road."""
    return partial(opening.open_etcd, transport=transport)
