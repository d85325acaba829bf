"""Object stores: the protocol, three implementations, and the wrapper that makes them patient."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from glidefs.config import StoreSettings
from glidefs.errors import ConfigError
from glidefs.store.base import ObjectStore


def open_store(
    url: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    path_style: bool | None = None,
    connections: int = 64,
    connect_timeout: float = 3.0,
    read_timeout: float = 10.0,
    create: bool = False,
) -> ObjectStore:
    """The bare store at ``url``; the caller wraps it in a ResilientStore.

    ``file:///directory``, ``s3://bucket/root`` (credentials come from the AWS chain) or
    ``memory://name`` (shared by name in this process, for tests). The other arguments are for S3:
    ``path_style`` defaults to true where an endpoint is given; ``connections`` is the size of the
    pool; timeouts are in seconds and per read or connect. Only with ``create`` is the directory of a
    ``file://`` store made. Raises ConfigError. No request is made.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.strip("/"):
            raise ConfigError(f"store url {url!r}: write file:///absolute/path")
        from glidefs.store.file import FileStore

        return FileStore(unquote(parts.path), create=create)
    if parts.scheme == "memory":
        from glidefs.store.memory import shared_memory_store

        return shared_memory_store(parts.netloc + parts.path)
    if parts.scheme == "s3":
        if not parts.netloc:
            raise ConfigError(f"store url {url!r}: write s3://bucket/root")
        # Not before it is needed: boto3 costs a daemon on a file:// store tens of megabytes.
        from glidefs.store.s3.client import S3Options
        from glidefs.store.s3.store import S3Store

        options = S3Options(
            endpoint_url=endpoint_url,
            region=region,
            path_style=path_style,
            connections=connections,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
        )
        return S3Store(parts.netloc, parts.path.strip("/"), options)
    raise ConfigError(f"store url {url!r}: the scheme must be s3, file or memory")


def open_configured(settings: StoreSettings, url: str | None = None, *, create: bool = False) -> ObjectStore:
    """The bare store that the configuration names, or that at ``url`` with the same access.

    Raises ConfigError. No request is made.
    """
    return open_store(
        url or settings.url,
        endpoint_url=settings.endpoint_url,
        region=settings.region,
        path_style=settings.path_style,
        connections=settings.reads + settings.writes + 8,
        connect_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
        create=create,
    )
