"""On which kernels a ublk device is added, and what is said where it is not."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, cast

import pytest

from glidefs.config import Config, UblkSettings
from glidefs.doctor import doctor
from glidefs.errors import NotSupported
from glidefs.transport import base
from glidefs.transport.base import choose_transport
from glidefs.transport.nbd.transport import NbdTransport
from glidefs.transport.ublk.device import UblkTransport
from glidefs.transport.ublk.driver import ublk_missing
from glidefs.transport.ublk.kernels import ublk_refused, ublk_verdict

RELEASES = {
    "good": [
        # Debian, of which tests/vm runs 6.12 and 6.18.15
        "6.1.0-40-amd64",
        "6.12.43+deb12-amd64",
        "6.12.57+deb13-amd64",
        "6.12.117+deb12-cloud-amd64",
        "6.12.48+deb13-amd64",
        "6.18.15+deb13-amd64",
        "6.19.6+deb13-amd64",
        "7.3.4+deb13-amd64",
        # Ubuntu, Red Hat, Amazon, SUSE
        "5.15.0-119-generic",
        "6.8.0-1052-azure",
        "6.14.0-37-generic",
        "7.0.0-1008-aws",
        "7.0.0-14-generic",
        "6.12.0-124.8.1.el10_1.x86_64",
        "5.14.0-570.el9.x86_64",
        "6.12.46-66.121.amzn2023.x86_64",
        "6.16.8-1-default",
        # Arch, Fedora, kernel.org
        "6.17.9-arch1-1",
        "6.18.3-arch1-1",
        "6.18.6-arch1-1",
        "6.17.11-300.fc43.x86_64",
        "6.18.8-200.fc43.x86_64",
        "6.18.0",
        "6.18.1",
        "6.18.42",
        "6.18.50-custom+",
        "6.16.0",
        "6.19.0-rc1",
        "6.18.0-rc4",
        "6.17.0-rc5-next",
        "6.18.0-0.rc3.31.fc44.x86_64",
        "6.19",
        "6.12",
        "7.2.13",
        "10.0.1",
    ],
    "bad": [
        "6.17.0",
        "6.17",
        "6.17.0-5-generic",
        "6.17.0-14-generic",
        "6.17.0-1008-azure",
        "6.17.0-1015-azure",
        "6.17.0-1018-azure",
        "6.17.0-1017-aws",
        "6.17.0-1010-oem",
        "6.17.0-22-lowlatency",
        "6.18.4",
        "6.18.5",
        "6.18.4-arch1-1",
        "6.18.5-arch1-1",
        "6.18.4-200.fc43.x86_64",
        "6.18.5-zabbly+",
        "6.18.5+deb14-amd64",
    ],
    "unknown": [
        "",
        "custom",
        "linux-6.12",
        "6",
        "6.17.4-2-pve",
        "6.17.13-1-pve",
        "6.18.0-7-generic",
        "6.18.0-1003-oem",
    ],
}
CASES = [(kind, release) for kind, releases in RELEASES.items() for release in releases]


@pytest.mark.parametrize(("kind", "release"), CASES)
def test_verdicts(kind: str, release: str) -> None:
    verdict = ublk_verdict(release)
    assert verdict.kind == kind, verdict
    assert verdict.why
    refused = ublk_refused(release)
    assert (refused is None) == (kind == "good")
    if refused is not None:
        assert "\n" not in refused
        assert "allow_kernel" in refused


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is there and may be used."""
    node = tmp_path / "ublk-control"
    node.write_bytes(b"")
    monkeypatch.setattr("glidefs.transport.ublk.driver.UBLK_CONTROL", node)


def transports(tmp_path: Path, allow: str | None = None) -> dict[str, base.Transport]:
    return {"ublk": UblkTransport(UblkSettings(allow_kernel=allow), tmp_path), "nbd": NbdTransport()}


def test_auto_takes_nbd_there_and_says_why(
    control: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, release in CASES:
        monkeypatch.setattr(platform, "release", lambda release=release: release)
        choice = choose_transport("auto", transports(tmp_path))
        assert choice.kind == ("ublk" if kind == "good" else "nbd")
        if kind != "good":
            assert "oops" in choice.why
            with pytest.raises(NotSupported, match="oops"):
                choose_transport("ublk", transports(tmp_path))
            assert choose_transport("nbd", transports(tmp_path)).kind == "nbd"


def test_the_transport_itself_adds_nothing_there(
    control: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.18.4")
    export = base.Attachment("a", bytes(16), 1, False, core=cast(Any, None))
    with pytest.raises(NotSupported, match=r"adding a device oopses on Linux 6\.18\.4"):
        transports(tmp_path)["ublk"].start(export)


def test_an_operator_vouches_for_one_release(
    control: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.17.0-1020-aws")
    assert choose_transport("auto", transports(tmp_path, "6.17.0-1020-aws")).kind == "ublk"
    assert ublk_missing("6.17.0-1020-aws") is None
    assert choose_transport("auto", transports(tmp_path, "6.17.0-1019-aws")).kind == "nbd"


def test_doctor_names_it(control: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.17.0-1015-azure")
    state, detail, remedy = doctor._ublk(Config())
    assert state == "warn"
    assert "oops" in detail
    assert remedy == "exports use NBD"


def test_a_daemon_without_ublk_serves_nbd() -> None:
    assert choose_transport("auto", {"nbd": NbdTransport()}).kind == "nbd"
    with pytest.raises(NotSupported):
        choose_transport("ublk", {"nbd": NbdTransport()})
