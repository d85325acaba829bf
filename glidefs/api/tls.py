"""TLS of the TCP listener: the certificate, its key, and the CA of clients."""

from __future__ import annotations

import ssl

from glidefs.config import ApiSettings
from glidefs.errors import ConfigError


def server_context(settings: ApiSettings) -> ssl.SSLContext | None:
    """What the listener speaks, None for plain HTTP. Raises ConfigError naming a file that is wrong."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _check_readable("tls_cert", settings.tls_cert)
    _check_readable("tls_key", settings.tls_key)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        pair = f"[api] tls_cert {settings.tls_cert}, tls_key {settings.tls_key}"
        raise ConfigError(f"{pair}: not a PEM certificate and its key: {_reason(error)}") from None
    if settings.client_ca is not None:
        _check_readable("client_ca", settings.client_ca)
        try:
            context.load_verify_locations(settings.client_ca)
        except ssl.SSLError as error:
            raise ConfigError(
                f"[api] client_ca {settings.client_ca}: not PEM certificates: {_reason(error)}"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(key: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"[api] {key} {path}: {error.strerror}") from None


def _no_password() -> str:
    raise ValueError("the key has a password; store it without one")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).replace("_", " ").lower()
