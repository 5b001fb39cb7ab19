"""Arguments of `open_etcd`: what is accepted, what is refused before anything is sent."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio

from etcd_infra._backends.endpoints import Endpoint
from etcd_infra._backends.opening import open_etcd, parse_endpoints
from etcd_infra._backends.tls import TlsConfig

GOOD = "http://127.0.0.1:2379"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://a:1", [("a", 1)]),
        ("a:1", [("a", 1)]),
        ("a", [("a", 2379)]),
        ("http://a", [("a", 2379)]),
        ("http://a:1/", [("a", 1)]),
        ("HTTP://A:1", [("a", 1)]),
        ("http://a:1,http://b:2", [("a", 1), ("b", 2)]),
        (" http://a:1 , b:2 ,", [("a", 1), ("b", 2)]),
        (["http://a:1", "b:2,c:3"], [("a", 1), ("b", 2), ("c", 3)]),
        ("a:1,a:1", [("a", 1)]),
        ("http://[::1]:2379", [("::1", 2379)]),
        ("[::1]:1", [("::1", 1)]),
        ("etcd-0.etcd.default.svc:2379", [("etcd-0.etcd.default.svc", 2379)]),
    ],
)
def test_endpoints_that_are_understood(given, expected):
    """Endpoints are read from URLs and bare addresses, lists and commas, each once and in order."""
    assert [Endpoint(*pair) for pair in expected] == list(parse_endpoints(given))


@pytest.mark.parametrize(
    "given",
    [
        "ftp://a:1",
        "https://a:1/path",
        "http://a:1/path",
        "http://a:1?x=1",
        "http://a:1#x",
        "http://a:0",
        "http://a:65536",
        "http://a:port",
        "http://:2379",
        "http://",
        ":2379",
        "a b:1",
        "::1:2379:x",
        "",
        " , ",
        [],
        [""],
    ],
)
def test_bad_endpoints_are_refused_by_name(given):
    """A malformed endpoint is a ValueError with the offending text, at the call."""
    with pytest.raises(ValueError, match=r".") as caught:
        open_etcd(given)

    offending = given if isinstance(given, str) else repr(given)
    assert offending in str(caught.value)


@pytest.mark.parametrize("given", [b"http://a:1", None, 2379, [b"a:1"], ["a:1", 1]])
def test_endpoints_of_another_type_are_refused(given):
    """What is no text is a TypeError."""
    with pytest.raises(TypeError):
        open_etcd(given)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"transport": "carrier-pigeon"}, "carrier-pigeon"),
        ({"tls": TlsConfig()}, "http://127.0.0.1:2379"),
        ({"password": "secret"}, "password"),
        ({"username": "root"}, "username"),
        ({"dial_timeout": 0}, "dial_timeout must be more than 0 seconds: 0"),
        ({"call_timeout": -1.5}, "-1.5"),
        ({"call_timeout": float("nan")}, "nan"),
    ],
)
def test_bad_options_are_refused(options, shown):
    """What can not be done is refused, never done in another way; secrets are not shown."""
    with pytest.raises(ValueError, match=shown) as caught:
        open_etcd(GOOD, **options)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoints", "tls", "shown"),
    [
        ("https://a:1,http://b:2", None, "http://b:2"),
        ("https://a:1", TlsConfig(ca="/no/such/file"), "/no/such/file"),
        ("a:1", TlsConfig(ca=__file__), __file__),
        ("a:1", TlsConfig(cert=__file__, key=__file__), __file__),
    ],
)
def test_bad_tls_is_refused(endpoints, tls, shown):
    """Nothing is silently plain, and files that are of no use are refused at the call, by name."""
    with pytest.raises(ValueError, match=shown):
        open_etcd(endpoints, tls=tls)


def test_tls_of_another_type_is_refused():
    """What is no TlsConfig is a TypeError; a certificate without its key a ValueError."""
    with pytest.raises(TypeError, match="TlsConfig"):
        open_etcd("a:1", tls=object())
    with pytest.raises(ValueError, match=r"client\.pem"):
        TlsConfig(cert="client.pem")


@pytest.mark.parametrize("name", [".etcd", "a..b", "", "etcd\0", "x" * 300])
def test_server_name_that_is_none_is_refused(name):
    """It would end the connection's task at each attempt."""
    with pytest.raises(ValueError, match="server_name="):
        TlsConfig(server_name=name)


def test_scheme_is_remembered_and_does_not_tell_endpoints_apart():
    """https, http and neither are told apart, while one member named in two ways is one endpoint."""
    parsed = parse_endpoints("https://a:1,http://b:1,c:1,a:1")
    assert [True, False, None] == [endpoint.secure for endpoint in parsed]


@pytest.mark.parametrize("password", ["secret", "secret/", "sec,secret", "#secret", "[secret", "secret?"])
def test_password_in_an_endpoint_is_refused_and_not_shown(password):
    """A URL with a password is refused without a trace of the password, whatever it consists of."""
    with pytest.raises(ValueError, match="user name") as caught:
        open_etcd(f"http://root:{password}@a:1")

    assert "secret" not in str(caught.value)


async def test_repr_names_the_endpoints():
    """A backend shows where it goes."""
    async with open_etcd("a:1,[::1]:2") as backend:
        assert repr(backend) == "<RpcBackend <Endpoints a:1, [::1]:2>>"


async def test_exception_of_the_body_leaves_bare():
    """The body's own exception leaves the block as it is, in no group."""
    with pytest.raises(ZeroDivisionError):
        async with open_etcd(GOOD):
            raise ZeroDivisionError


async def test_backend_that_was_left_is_closed():
    """After its block a backend says that it is closed, even if it was never used before."""
    async with open_etcd(GOOD) as backend:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await backend.get(b"k")


def test_imports_are_put_off():
    """Neither grpc nor protobuf is loaded before a backend is opened."""
    program = (
        "import sys\n"
        "import etcd_infra\n"
        "from etcd_infra._backends.opening import open_etcd\n"
        "open_etcd('http://127.0.0.1:1')\n"
        "sys.exit(any(name == 'grpc' or name.startswith('google.protobuf') for name in sys.modules))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
