"""`glidefs ui` without a port: what it says of the ways to the dashboard."""

from __future__ import annotations

from pathlib import Path

import pytest

from glidefs.cli.ui import ui_command

LISTEN = 'listen = "127.0.0.1:9443"\n'
TLS = 'tls_cert = "c.pem"\ntls_key = "k.pem"\n'


@pytest.mark.parametrize(
    ("api", "said"),
    [
        ("", ""),
        (
            LISTEN + 'token_file = "t"\n',
            "http://127.0.0.1:9443/ui, with the token of [api] token_file",
        ),
        (
            LISTEN + TLS + 'tokens_file = "t"\n',
            "https://127.0.0.1:9443/ui, with a token of [api] tokens_file ('glidefs token' makes one)",
        ),
        (
            LISTEN + TLS + 'token_file = "t"\ntokens_file = "u"\nclient_ca = "a.pem"\n',
            "https://127.0.0.1:9443/ui, with a token of [api] tokens_file ('glidefs token' makes one) or the "
            "token of [api] token_file and a certificate of [api] client_ca in the browser",
        ),
    ],
)
def test_the_way_over_tcp(tmp_path: Path, capsys: pytest.CaptureFixture[str], api: str, said: str) -> None:
    config = tmp_path / "glidefs.toml"
    config.write_text(f'[store]\nurl = "file://{tmp_path}/store"\n[api]\n{api}')
    ui_command(None, str(config), False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "here:               glidefs ui --port 8080"
    assert [line.split(None, 2)[2] for line in lines[2:]] == ([said] if said else [])
