"""A CA of its own, and a server that it vouches for."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme


class Tls:
    """A server that is "store.test" and 127.0.0.1, and the file with the CA that says so."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        self.ca = directory / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("store.test", "127.0.0.1").configure_cert(self.server)
