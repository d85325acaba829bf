"""The boto3 client, and a new one where the provider refuses the credentials of this one.

Credentials end, are rotated or withdrawn. Some that are about to end boto3 renews by itself, but what it
has read once from a shared file it keeps, and a token that is withdrawn early it does not notice.
So a refusal that may be about them makes a new session, which goes through the whole chain again
(environment, shared files, process, metadata service).
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import boto3
import msgspec
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from glidefs.errors import ConfigError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

RENEW_EVERY = 2.0
"""Seconds after a new session until the next may be made, which takes a tenth of a second of a CPU."""
RENEW_AT_MOST = 10.0
"""The same while new ones are refused, too."""


class S3Options(msgspec.Struct, frozen=True):
    """How to reach the provider. Timeouts in seconds, per connect and per read."""

    endpoint_url: str | None = None
    region: str | None = None
    path_style: bool | None = None
    connections: int = 64
    connect_timeout: float = 3.0
    read_timeout: float = 10.0


def make_client(options: S3Options) -> S3Client:
    """A client with the credentials of the chain. Raises ConfigError."""
    path_style = options.path_style if options.path_style is not None else bool(options.endpoint_url)
    settings: dict[str, Any] = {
        "signature_version": "s3v4",
        "s3": {"addressing_style": "path" if path_style else "virtual"},
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": options.connect_timeout,
        "read_timeout": options.read_timeout,
        "max_pool_connections": options.connections,
        "tcp_keepalive": True,
        # The signature covers the body's SHA-256 already, and other providers choke on the
        # trailing checksums that newer botocore adds on its own.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    try:
        config = Config(**settings)
    except TypeError:  # botocore before 1.36 has neither option, nor the behaviour
        del settings["request_checksum_calculation"], settings["response_checksum_validation"]
        config = Config(**settings)
    try:
        session = boto3.session.Session()
        # Without any region botocore signs for none; us-east-1 is what others take as the default.
        region = options.region or session.region_name or "us-east-1"
        client = session.client("s3", endpoint_url=options.endpoint_url, region_name=region, config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"S3 client: {error}") from error
    client.meta.events.register("before-call.s3.HeadBucket", _no_redirect)
    return client


def _no_redirect(params: dict[str, Any], **_: object) -> None:
    """botocore follows a redirect with a HeadBucket, and that of a HeadBucket with another, without end."""
    params.setdefault("context", {}).setdefault("s3_redirect", {})["redirected"] = True


class Clients:
    """``current`` is the client to use for the next request; those under way keep the one they have.

    ``_renewing`` is held by the thread that makes a new one; nobody waits for it.
    """

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self.current = make_client(options)
        self._renewing = threading.Lock()
        self._next = float("-inf")
        self._pause = RENEW_EVERY

    def renew(self, used: S3Client, why: str, *, loud: bool = True) -> bool:
        """The credentials of ``used`` were refused: true if there is another client now.

        ``loud``: they have worked before, so that it is news.
        """
        if self.current is not used:
            return True
        if not self._renewing.acquire(blocking=False):
            return False
        try:
            now = time.monotonic()
            if self.current is not used or now < self._next:
                return self.current is not used
            calm = now > self._next + RENEW_AT_MOST
            self._pause = RENEW_EVERY if calm else min(2 * self._pause, RENEW_AT_MOST)
            self._next = now + self._pause
            try:
                self.current = make_client(self._options)
            except ConfigError as error:
                log.warning("the S3 credentials were refused (%s) and cannot be read again: %s", why, error)
                return False
            level = logging.WARNING if loud else logging.DEBUG
            log.log(level, "the S3 credentials were refused (%s): they are read again, URLs signed anew", why)
            return True
        finally:
            self._renewing.release()

    def close(self) -> None:
        """Give the connections of the client back."""
        self.current.close()
