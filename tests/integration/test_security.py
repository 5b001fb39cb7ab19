"""TLS and authentication on a real etcd, by each road of gRPC."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from etcd_infra import AccessDeniedError, TlsConfig, UnavailableError, open_coordinator
from etcd_infra._backends import wire
from etcd_infra.abc import KeyRange
from etcd_infra.testing import EtcdServer, find_etcd
from tests.helpers.certificates import Authority
from tests.helpers.etcds import etcd_programs, etcdctl_beside, every_etcd

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_etcd() is None, reason="no etcd program here")]

PASSWORD = "open sesame"
K = KeyRange.one(b"k")


async def put_until(backend, seconds=10):
    """Write a key as soon as that works."""
    with trio.fail_after(seconds):
        while True:
            try:
                return await backend.put(b"k", b"v")
            except UnavailableError:
                await trio.sleep(0.05)


def move(source, target):
    """Rename a file."""
    Path(source).rename(target)


# ── TLS ─────────────────────────────────────────────────────────────────────────────────────────


async def test_mutual_tls(open_etcd, tmp_path):
    """With a certificate that the server trusts all works, watches too; without one nothing is ever sent."""
    authority = Authority(tmp_path)
    async with EtcdServer(tls=authority.server()) as server:
        assert server.endpoint.startswith("https://")
        async with open_etcd(server.endpoint, tls=authority.client()) as backend, backend.watch(K) as batches:
            revision = await backend.put(b"k", b"v" * 100_000)
            assert revision == (await batches.receive()).revision
        (tmp_path / "strangers").mkdir()
        stranger = Authority(tmp_path / "strangers").client("stranger")
        for tls in (TlsConfig(authority.ca()), TlsConfig(authority.ca(), stranger.cert, stranger.key)):
            async with open_etcd(server.endpoint, tls=tls, call_timeout=2.0) as backend:
                with pytest.raises(UnavailableError):
                    await backend.put(b"k", b"v")


async def test_server_is_not_trusted_blindly(open_etcd, tmp_path):
    """Another authority's server, and a certificate for another name, are refused before anything is sent."""
    authority = Authority(tmp_path)
    async with EtcdServer(tls=authority.server("etcd.test", mutual=False)) as server:
        for tls in (
            TlsConfig(authority.ca()),
            TlsConfig(authority.ca(), server_name="other.test"),
            TlsConfig(Authority(tmp_path).ca("other.pem"), server_name="etcd.test"),
            None,
        ):
            async with open_etcd(server.endpoint, tls=tls, call_timeout=2.0) as backend:
                with pytest.raises(UnavailableError):
                    await backend.put(b"k", b"v")
        named = TlsConfig(authority.ca(), server_name="etcd.test")
        async with open_etcd(server.endpoint, tls=named) as backend:
            await backend.put(b"k", b"v")


async def test_plain_where_tls_is_spoken(open_etcd, tmp_path):
    """A plain connection to a server with TLS fails, as does one with TLS to a plain server: never a hang."""
    authority = Authority(tmp_path)
    async with EtcdServer(tls=authority.server()) as server, EtcdServer() as plain:
        for endpoint, tls in (
            (server.endpoint.replace("https", "http"), None),
            (plain.endpoint.replace("http", "https"), authority.client()),
        ):
            async with open_etcd(endpoint, tls=tls, call_timeout=2.0) as backend:
                with trio.fail_after(10), pytest.raises(UnavailableError):
                    await backend.put(b"k", b"v")


async def test_rotated_certificates_are_used_for_the_next_connection(open_etcd, tmp_path):
    """
    The authority is replaced while a backend and its watch are open: both go on after the server's restart.

    The server itself reads its certificate for each connection; what it trusts it reads when it starts.
    """
    old, new = Authority(tmp_path), Authority(tmp_path)
    tls = old.client()
    async with (
        EtcdServer(tls=old.server()) as server,
        open_etcd(server.endpoint, tls=tls) as backend,
        backend.watch(K) as batches,
    ):
        await backend.put(b"k", b"old")
        assert b"old" == (await batches.receive()).events[0].kv.value
        new.server()
        assert tls == new.client()
        await server.restart()
        await put_until(backend)
        values = []
        with trio.fail_after(10):
            while not values:
                values += [event.kv.value for event in (await batches.receive()).events]
        assert [b"v"] == values


async def test_files_that_vanish_for_a_moment(open_etcd, tmp_path):
    """While the files are away no new connection can be made; once they are back one is."""
    authority = Authority(tmp_path)
    tls = authority.client()
    async with EtcdServer(tls=authority.server()) as server, open_etcd(server.endpoint, tls=tls) as backend:
        move(tls.key, f"{tls.key}.away")
        with pytest.raises(UnavailableError):
            await backend.put(b"k", b"v")
        move(f"{tls.key}.away", tls.key)
        await put_until(backend)


async def test_lock_over_mutual_tls(transport, tmp_path):
    """Sessions and locks do not know how the connection is secured."""
    authority = Authority(tmp_path)
    async with EtcdServer(tls=authority.server()) as server:
        options = {"transport": transport, "tls": authority.client()}
        async with (
            open_coordinator(server.endpoint, **options) as one,
            open_coordinator(server.endpoint, **options) as two,
            one.lock("job"),
            two.lock("job").attempt() as hold,
        ):
            assert hold is None


# ── authentication ──────────────────────────────────────────────────────────────────────────────


class Guarded:
    """A server with users, and `etcdctl` as root."""

    def __init__(self, program, server):
        self.endpoint = server.endpoint
        self.restart = server.restart
        self._etcdctl = [etcdctl_beside(program), f"--endpoints={server.endpoint}"]

    async def run(self, *arguments, user=f"root:{PASSWORD}"):
        """Run a command."""
        login = [f"--user={user}"] if user else []
        await trio.run_process(
            [*self._etcdctl, *login, *arguments],
            capture_stdout=True,
            capture_stderr=True,
            env=os.environ | {"ETCDCTL_API": "3"},
        )

    async def enable(self):
        """Add root and alice, who may do everything below `k`, and ask for passwords from now on."""
        for command in (
            f"user add root:{PASSWORD}",
            f"user add alice:{PASSWORD}",
            "user grant-role root root",
            "role add reader",
            "role grant-permission reader readwrite k --prefix=true",
            "user grant-role alice reader",
            "auth enable",
        ):
            words = command.replace(PASSWORD, "\0").split()
            await self.run(*(word.replace("\0", PASSWORD) for word in words), user=None)


@asynccontextmanager
async def guarded(program, *extra_args, enable=True):
    """Run a server with authentication."""
    async with EtcdServer(program, extra_args=extra_args) as server:
        guard = Guarded(program, server)
        if enable:
            await guard.enable()
        yield guard


@every_etcd()
async def test_users_do_what_they_may(open_etcd, program):
    """Alice reads, writes and watches below k and nothing else; a stranger and a wrong password nothing at all."""
    async with guarded(program) as server:
        async with open_etcd(server.endpoint, username="alice", password=PASSWORD) as backend:
            async with backend.watch(K) as batches:
                await backend.put(b"k", b"v")
                assert b"v" == (await batches.receive()).events[0].kv.value
            with pytest.raises(AccessDeniedError):
                await backend.put(b"other", b"v")
            with trio.fail_after(10), pytest.raises(AccessDeniedError):
                async with backend.watch(KeyRange.one(b"other")):
                    pass
            await backend.put(b"k", b"again")
        for user, password in (("alice", "wrong"), ("nobody", PASSWORD)):
            async with open_etcd(server.endpoint, username=user, password=password) as backend:
                with pytest.raises(AccessDeniedError) as caught:
                    await backend.put(b"k", b"v")
                assert password not in str(caught.value)
                with trio.fail_after(10), pytest.raises(AccessDeniedError):
                    async with backend.watch(K):
                        pass
        async with open_etcd(server.endpoint) as backend:
            with pytest.raises(AccessDeniedError):
                await backend.put(b"k", b"v")


@every_etcd()
async def test_token_that_expires(open_etcd, program, caplog, monkeypatch):
    """
    Tokens that live three seconds and are not used for longer: calls go on, open watches and new ones, too.

    Neither password nor token is logged.
    """
    caplog.set_level(logging.DEBUG)
    tokens, decode = [], wire.decode_authenticate
    monkeypatch.setattr(wire, "decode_authenticate", lambda answer: tokens.append(decode(answer)) or tokens[-1])
    async with (
        guarded(program, "--auth-token-ttl=3") as server,
        open_etcd(server.endpoint, username="alice", password=PASSWORD) as backend,
        backend.watch(K) as batches,
    ):
        await trio.sleep(5)
        async with backend.watch(KeyRange.one(b"k2")) as others:
            await backend.put(b"k2", b"one")
            assert b"one" == (await others.receive()).events[0].kv.value
        await trio.sleep(5)
        await backend.put(b"k", b"two")
        with trio.fail_after(5):
            while not (batch := await batches.receive()).events:
                pass
        assert b"two" == batch.events[0].kv.value
    assert len(set(tokens)) > 1
    for secret in (PASSWORD, *tokens):
        assert secret not in caplog.text
        assert secret not in repr(backend)


@every_etcd()
async def test_authentication_comes_and_goes(open_etcd, program):
    """A backend with a password works before authentication is enabled, while it is, and after it was disabled."""
    async with guarded(program, enable=False) as server:
        async with open_etcd(server.endpoint, username="alice", password=PASSWORD) as backend:
            async with backend.watch(K) as batches:
                await backend.put(b"k", b"before")
                await server.enable()
                await backend.put(b"k", b"meanwhile")
                await server.run("auth", "disable")
                await backend.put(b"k", b"after")
                values = []
                with trio.fail_after(10):
                    while len(values) < 3:
                        values += [event.kv.value for event in (await batches.receive()).events]
                assert [b"before", b"meanwhile", b"after"] == values


@every_etcd()
async def test_change_of_roles_is_obeyed(open_etcd, program):
    """A role that is taken away is missed at once, and works again once it is given back."""
    async with (
        guarded(program) as server,
        open_etcd(server.endpoint, username="alice", password=PASSWORD) as backend,
    ):
        await backend.put(b"k", b"v")
        await server.run("user", "revoke-role", "alice", "reader")
        with pytest.raises(AccessDeniedError):
            await backend.put(b"k", b"v")
        await server.run("user", "grant-role", "alice", "reader")
        await backend.put(b"k", b"v")


async def test_lock_with_mutual_tls_and_a_token_of_three_seconds(transport, tmp_path):
    """A session whose token expires between its renewals is never lost, and its lock works as ever."""
    authority = Authority(tmp_path)
    program = etcd_programs()[0]
    async with EtcdServer(program, tls=authority.server(), extra_args=["--auth-token-ttl=3"]) as server:
        tls = authority.client("root")
        flags = [f"--cacert={tls.ca}", f"--cert={tls.cert}", f"--key={tls.key}"]
        guard = Guarded(program, server)
        guard._etcdctl += flags
        await guard.enable()
        options = {"transport": transport, "tls": tls, "username": "root", "password": PASSWORD, "ttl": 25}
        async with (
            open_coordinator(server.endpoint, **options) as one,
            open_coordinator(server.endpoint, **options) as two,
        ):
            session = one.session
            async with one.lock("job") as hold:
                await trio.sleep(11)
                async with two.lock("job").attempt() as refused:
                    assert refused is None
                hold.check()
            async with two.lock("job"):
                pass
            assert session is one.session


async def test_command_line_takes_files_and_password_from_the_environment(tmp_path):
    """`health` and `inspect` reach a server with mutual TLS and users; without the password they are told so."""
    authority = Authority(tmp_path)
    program = etcd_programs()[0]
    async with EtcdServer(program, tls=authority.server()) as server:
        tls = authority.client("root")
        guard = Guarded(program, server)
        guard._etcdctl += [f"--cacert={tls.ca}", f"--cert={tls.cert}", f"--key={tls.key}"]
        await guard.enable()
        settings = {"ENDPOINTS": server.endpoint, "CACERT": tls.ca, "CERT": tls.cert, "KEY": tls.key}
        login = {"USERNAME": "root", "PASSWORD": PASSWORD}
        for command, more, code in (
            ("health", login, 0),
            ("health", {}, 1),
            ("inspect", login, 0),
        ):
            variables = {f"ETCD_INFRA_{name}": value for name, value in (settings | more).items()}
            done = await trio.run_process(
                [sys.executable, "-m", "etcd_infra", command],
                check=False,
                capture_stdout=True,
                capture_stderr=True,
                env=os.environ | variables,
            )
            assert code == done.returncode, (command, done.stdout, done.stderr)
            assert PASSWORD.encode() not in done.stdout + done.stderr
