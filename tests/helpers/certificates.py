"""Certificates of an authority that exists for one test."""

from __future__ import annotations

import trustme

from etcd_infra import TlsConfig


class Authority:
    """An authority, and files in a directory."""

    def __init__(self, directory):
        self._directory = directory
        self._authority = trustme.CA()
        self._numbers = 0

    def ca(self, name="ca.pem"):
        """Write what is to be trusted; return the file's name."""
        path = self._directory / name
        self._authority.cert_pem.write_to_path(path)
        return str(path)

    def issue(self, name, *hosts):
        """Write a certificate and its key; return both names. Written again, it is another certificate."""
        issued = self._authority.issue_cert(*hosts)
        cert, key = self._directory / f"{name}.pem", self._directory / f"{name}-key.pem"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return str(cert), str(key)

    def server(self, *hosts, mutual=True):
        """A server's files; mutual: it wants certificates of this authority to be shown."""
        return TlsConfig(self.ca() if mutual else None, *self.issue("server", *(hosts or ("127.0.0.1",))))

    def client(self, name="client", **options):
        """A client's files, with a certificate of its own."""
        return TlsConfig(self.ca(), *self.issue(name, f"{name}.test"), **options)
