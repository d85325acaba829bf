"""glidefs.toml: the template is the defaults, units, and errors that name the key."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from glidefs.cli import template
from glidefs.config import Config, load_config, parse_config, parse_duration, parse_size
from glidefs.errors import ConfigError

OPTIONAL = {
    ("ublk", "allow_kernel"),
    ("cache", "log_dir"),
    ("cache", "block_cache_dir"),
    ("store", "endpoint_url"),
    ("store", "region"),
    ("store", "path_style"),
    ("api", "listen"),
    ("api", "token_file"),
    ("api", "tokens_file"),
    ("api", "tls_cert"),
    ("api", "tls_key"),
    ("api", "client_ca"),
    ("api", "audit_log"),
    ("nbd", "listen"),
    ("nbd", "socket_group"),
    ("vhost_user", "group"),
    ("daemon", "node"),
    ("debug", "shadow_dir"),
}


def test_template_is_the_defaults() -> None:
    assert parse_config(template.TEMPLATE) == Config()


def test_every_key_is_in_the_template_with_its_default() -> None:
    full = parse_config(re.sub(r"(?m)^#(\w+ = )", r"\1", template.TEMPLATE))
    text = template.TEMPLATE
    defaults = Config()
    for section in Config.__struct_fields__:
        part = text.split(f"[{section}]\n", 1)[1].split("\n[", 1)[0]
        for key in getattr(defaults, section).__struct_fields__:
            assert re.search(rf"(?m)^#?{key} = ", part), f"[{section}] {key} is not in the template"
            if (section, key) not in OPTIONAL:
                assert getattr(getattr(full, section), key) == getattr(getattr(defaults, section), key), key


def test_template_with_places() -> None:
    config = parse_config(template.render('/c "x"', "s3://bucket/root", "/run/x"))
    assert config.cache.dir == '/c "x"'
    assert config.store.url == "s3://bucket/root"
    assert (config.api.socket, config.nbd.socket) == ("/run/x/api.sock", "/run/x/nbd.sock")
    assert config.vhost_user.dir == "/run/x/vhost"


def test_relative_paths_count_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "glidefs.toml"
    path.write_text('[cache]\ndir = "cache"\nlog_dir = "/ssd/logs"\n[api]\nsocket = "api.sock"\n')
    config = load_config(path)
    assert config.cache.dir == str(tmp_path / "cache")
    assert config.cache.logs == Path("/ssd/logs")
    assert config.api.socket == str(tmp_path / "api.sock")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10GiB", 10 << 30),
        ("10G", 10 << 30),
        ("10GB", 10**10),
        ("4096", 4096),
        (" 1.5 MiB ", 3 << 19),
        ("1e", 1 << 60),
        ("9223372036854775808", 1 << 63),
        ("-1", -1),
        ("0.5KiB", 512),
        (7, 7),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "1.5", "10XiB", "1 0", "1GiB\n\n1", "٣GiB", "0x10", "1e9999", "9" * 50, True]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|whole"):
        parse_size(text)


def test_durations() -> None:
    assert [parse_duration(t) for t in ("30s", "5m", "250ms", 1.5, "2h", "0")] == [
        30,
        300,
        0.25,
        1.5,
        7200,
        0,
    ]
    for text in ("", "-1s", "1y", float("nan"), float("inf"), -1, "999999d", True):
        with pytest.raises(ValueError, match="duration"):
            parse_duration(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[cahce]\ndir = "x"', "unknown section [cahce]; did you mean 'cache'"),
        ("[cache]\nlog_sise = 1", "unknown key 'log_sise' in [cache]; did you mean 'log_size'"),
        ("log_size = 1", "unknown key 'log_size' outside a section; it belongs in [cache]"),
        ("cache = 1", "[cache] is a section"),
        ('[cache]\nlog_size = "1X"', "[cache] log_size: 1X is not a size"),
        ("[cache]\nlog_size = true", "[cache] log_size"),
        ("[cache]\nlog_size = -1", "[cache] log_size"),
        ("[cache]\nlog_size = 4096", "[cache] log_size: must hold"),
        ('[cache]\nlog_size = "255MiB"', "[cache] log_size: must hold at least four segments"),
        ("[cache]\nsegment_size = 5000", "[cache] segment_size"),
        ('[cache]\nsegment_size = "64GiB"\nlog_size = "1TiB"', "[cache] segment_size"),
        ("[cache]\ndir = 5", "[cache] dir"),
        ('[cache]\ndir = ""', "[cache] dir"),
        ('[cache]\ndir = "a\\u0000b"', "[cache] dir"),
        ('[store]\nprefixes = ["../x"]', "[store] prefixes: invalid prefix"),
        ("[store]\nprefixes = []", "[store] prefixes"),
        ("[store]\nreads = 0", "[store] reads"),
        ('[store]\ngc_grace = "59s"', "[store] gc_grace: must be at least 1m"),
        ('[store]\nread_timeout = "0s"', "[store] read_timeout: must be more than 0"),
        ("[store]\nconnect_timeout = 0", "[store] connect_timeout: must be more than 0"),
        ('[store]\nurl = "s3://key:secret@bucket"', "[store] url: credentials do not belong"),
        ('[daemon]\non_stop = "explode"', "[daemon] on_stop"),
        ('[api]\nlisten = "127.0.0.1:1"', "[api] listen"),
        ('[nbd]\nlisten = "nowhere"', "[nbd] listen"),
        (f'[api]\nsocket = "/{"x" * 200}"', "[api] socket"),
        ('[api]\nsocket = "/a"\n[nbd]\nsocket = "/a"', "[nbd] socket"),
        ('[nbd]\nreply_memory = "63MiB"', "[nbd] reply_memory: must be at least 64MiB"),
        ("[reader]\nread_timeout = nan", "[reader] read_timeout"),
        ('[upload]\nsync_interval = "10m"\nmax_dirty_age = "1m"', "[upload] max_dirty_age"),
        ('[telemetry]\notlp_endpoint = "localhost:4318"', "[telemetry] otlp_endpoint: write it as 'http://"),
        ('[telemetry]\notlp_endpoint = "http://localhost:4318"', "[telemetry] otlp_endpoint: write it as"),
        ('[telemetry]\notlp_endpoint = "http://[::1/v1/traces"', "[telemetry] otlp_endpoint: write it as"),
        ('[telemetry]\notlp_endpoint = "http://h:99999/v1/traces"', "[telemetry] otlp_endpoint: write it as"),
        ('[telemetry]\notlp_endpoint = "http://a:b@c/v1/traces"', "[telemetry] otlp_endpoint: credentials"),
        ('[telemetry]\nslow_read = "soon"', "[telemetry] slow_read: soon is not a duration"),
        ("x", "not valid TOML"),
    ],
)
def test_errors_name_the_key_on_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "here.toml")
    message = str(caught.value)
    assert message.startswith("here.toml: ")
    assert said in message
    assert "\n" not in message
    assert "secret" not in message


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="glidefs init"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="directory"):
        load_config(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        load_config(binary)


SMALLEST = """
[cache]
segment_size = "32KiB"
log_size = "128KiB"
block_cache_size = "1MiB"
map_budget = "1MiB"
[nbd]
reply_memory = "64MiB"
[daemon]
workers = 1
"""
LARGEST_SEGMENT = """
[cache]
segment_size = 68719472640
log_size = "1TiB"
"""


@pytest.mark.parametrize("text", [SMALLEST, LARGEST_SEGMENT])
def test_what_is_accepted_the_core_takes(tmp_path: Path, text: str) -> None:
    pytest.importorskip("glidefs.core._core")
    from glidefs.core.engine import Engine
    from glidefs.daemon.serving import engine_config

    settings = msgspec.structs.replace(engine_config(parse_config(text)), cache_dir=tmp_path / "blocks")
    Engine(settings).close()
