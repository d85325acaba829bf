"""glidefs.toml: what an operator may set, its units, its defaults, and errors that name the key.

Sizes are strings with a unit ("10GiB", "64KiB") or plain bytes; durations are strings with a unit
("30s", "5m") or plain seconds. Unknown sections and keys are refused: a typo in a limit must not
silently become the default.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from glidefs.errors import ConfigError, InvalidName
from glidefs.names import check_prefix
from glidefs.places import DEFAULT_SOCKET, MAX_SOCKET_PATH, resolved

Size = Annotated[int, Meta(ge=0, extra={"unit": "size"})]
Duration = Annotated[float, Meta(ge=0, extra={"unit": "duration"})]
Count = Annotated[int, Meta(ge=0)]
PathText = Annotated[str, Meta(min_length=1, extra={"unit": "path"})]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MAX_DURATION = 30 * 86400  # fits the C core's milliseconds in 32 bits
MIN_GC_GRACE = 60
MIN_REPLY_MEMORY = 64 * MIB
"""Room for two of the largest requests, which the core asks for."""

_SIZE_UNITS: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtpe", start=1):
    _SIZE_UNITS[_letter] = _SIZE_UNITS[_letter + "ib"] = 1 << (10 * _power)
    _SIZE_UNITS[_letter + "b"] = int(1000**_power)
_DURATION_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


class CacheSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[cache]: local disks and memory."""

    dir: PathText = "/var/cache/glidefs"
    log_dir: PathText | None = None
    block_cache_dir: PathText | None = None
    log_size: Size = 10 * GIB
    block_cache_size: Size = 20 * GIB
    map_budget: Size = 256 * MIB
    segment_size: Size = 64 * MIB
    scope: Literal["host", "prefix"] = "host"
    log_full_timeout: Duration = 0.0

    @property
    def logs(self) -> Path:
        """Directory of the write logs."""
        return Path(self.log_dir) if self.log_dir else Path(self.dir) / "logs"

    @property
    def blocks(self) -> Path:
        """Directory of the block cache."""
        return Path(self.block_cache_dir) if self.block_cache_dir else Path(self.dir) / "blocks"

    @property
    def state(self) -> Path:
        """Directory of export records and of local copies of roots and pages."""
        return Path(self.dir) / "state"


class StoreSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[store]: where the durable copy lives. Credentials come from the AWS chain, never from here."""

    url: Annotated[str, Meta(min_length=1)] = "file:///var/lib/glidefs/store"
    endpoint_url: str | None = None
    region: str | None = None
    path_style: bool | None = None
    prefixes: tuple[str, ...] = ("default",)
    reads: Annotated[int, Meta(ge=1, le=1024)] = 32
    writes: Annotated[int, Meta(ge=1, le=1024)] = 8
    connect_timeout: Duration = 5.0
    read_timeout: Duration = 30.0
    gc_grace: Duration = 86400.0

    @property
    def default_prefix(self) -> str:
        """The prefix of a create that names none: the first of `prefixes`."""
        return self.prefixes[0]


class ApiSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[api]: the control socket; TCP only together with tokens, and beyond this host only with TLS."""

    socket: PathText = DEFAULT_SOCKET
    listen: str | None = None
    token_file: PathText | None = None
    tokens_file: PathText | None = None
    tls_cert: PathText | None = None
    tls_key: PathText | None = None
    client_ca: PathText | None = None
    allow_plaintext: bool = False
    audit_log: PathText | None = None
    export_metrics: bool = False


class NbdSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[nbd]: the data socket; NBD export name = export name. What clients may take of this host's memory."""

    socket: PathText = "/run/glidefs/nbd.sock"
    listen: str | None = None
    socket_group: str | None = None
    reply_memory: Size = 256 * MIB
    stall_timeout: Duration = 60.0


class UblkSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[ublk]: geometry of new devices, which existing ones get when they are attached again; the kernel."""

    queue_depth: Annotated[int, Meta(ge=1, le=4096)] = 64
    max_io: Size = 512 * KIB
    allow_kernel: str | None = None


class NbdDeviceSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[nbd_device]: how long the kernel waits, for new devices."""

    request_timeout: Annotated[float, Meta(ge=1, extra={"unit": "duration"})] = 10.0
    dead_timeout: Annotated[float, Meta(ge=1, extra={"unit": "duration"})] = 7 * 86400.0


class VhostUserSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[vhost_user]: the sockets of exports with this transport, and who may connect."""

    dir: PathText = "/run/glidefs/vhost"
    mode: Annotated[str, Meta(pattern=r"^0?[0-7]{3}$")] = "0660"
    group: str | None = None
    queues: Annotated[int, Meta(ge=1, le=16)] = 4


class UploadSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[upload]: how fast and in what pieces the log reaches the store."""

    sync_interval: Duration = 30.0
    max_dirty_age: Duration = 300.0
    pack_size: Size = 32 * MIB
    compression_level: Annotated[int, Meta(ge=-7, le=19)] = 1
    volumes: Annotated[int, Meta(ge=1, le=256)] = 8
    workers: Annotated[int, Meta(ge=1, le=256)] = 3
    compaction: bool = True
    compact_rate: Size = 64 * MIB


class ReaderSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[reader]: how blocks that are not here are fetched."""

    read_ahead: Size = 64 * MIB
    read_timeout: Duration = 0.0
    workers: Annotated[int, Meta(ge=1, le=256)] = 16


class DaemonSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[daemon]: the process itself."""

    node: str | None = None
    workers: Annotated[int, Meta(ge=0, le=1024)] = 0
    busy_poll_us: Annotated[int, Meta(ge=0, le=1000)] = 50
    drain_deadline: Duration = 30.0
    on_stop: Literal["release", "remove"] = "release"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @property
    def node_name(self) -> str:
        """The owner written in manifest roots: `node`, else the host name."""
        return self.node or socket.gethostname()


class TelemetrySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[telemetry]: spans for a collector of OpenTelemetry; without an endpoint there are none."""

    otlp_endpoint: str = ""
    slow_read: Duration = 0.1


class DebugSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[debug]: for finding faults; not for normal use."""

    shadow_dir: PathText | None = None


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of glidefs.toml."""

    cache: CacheSettings = CacheSettings()
    store: StoreSettings = StoreSettings()
    api: ApiSettings = ApiSettings()
    nbd: NbdSettings = NbdSettings()
    ublk: UblkSettings = UblkSettings()
    nbd_device: NbdDeviceSettings = NbdDeviceSettings()
    vhost_user: VhostUserSettings = VhostUserSettings()
    upload: UploadSettings = UploadSettings()
    reader: ReaderSettings = ReaderSettings()
    daemon: DaemonSettings = DaemonSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    debug: DebugSettings = DebugSettings()


def parse_size(text: str | int) -> int:
    """Bytes of "10GiB", "1.5T", "4096" or 4096. Units: KiB = K = 1024, KB = 1000.

    Raises ValueError with one line that says what is wrong.
    """
    if isinstance(text, bool):
        raise ValueError("a size is a number of bytes or text such as '10GiB'")
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([+-]?\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]{0,3})\s*", text, re.ASCII)
    if match is None or match[2].lower() not in _SIZE_UNITS:
        raise ValueError(f"{_short(text)} is not a size; write it as '10GiB', '512MiB' or in bytes")
    unit = _SIZE_UNITS[match[2].lower()]
    if "." not in match[1]:
        return int(match[1]) * unit
    whole, fraction = match[1].split(".")
    denominator: int = 10 ** len(fraction)
    scaled, rest = divmod(int(fraction) * unit, denominator)
    if rest and unit == 1:
        raise ValueError(f"{_short(text)} is not a whole number of bytes")
    return int(whole) * unit + (-scaled if whole.startswith("-") else scaled)


def parse_duration(text: str | float) -> float:
    """Seconds of "30s", "5m", "250ms", 30 or 1.5. Raises ValueError."""
    if isinstance(text, bool):
        raise ValueError("a duration is a number of seconds or text such as '30s'")
    if isinstance(text, int | float):
        seconds = float(text)
    else:
        match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*([A-Za-z]{0,3})\s*", text, re.ASCII)
        if match is None or match[2].lower() not in _DURATION_UNITS:
            raise ValueError(f"{_short(text)} is not a duration; write it as '30s', '5m', '2h'")
        seconds = float(match[1]) * _DURATION_UNITS[match[2].lower()]
    if not 0 <= seconds <= MAX_DURATION:
        raise ValueError(f"a duration is from 0 to {MAX_DURATION // 86400} days")
    return seconds


def age_text(seconds: float) -> str:
    """90.2 -> "1m30s"."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def load_config(path: Path | str) -> Config:
    """Read and check a configuration file. Raises ConfigError naming file, section and key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; write one with 'glidefs init {path}' or name it with --config"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return parse_config(text, str(path), Path(path).resolve().parent)


def parse_config(text: str, source: str = "glidefs.toml", base: Path | None = None) -> Config:
    """Parse the text of a configuration file; relative paths count from `base`. Raises ConfigError."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    sections = get_type_hints(Config)
    values: dict[str, Any] = {}
    for name, table in raw.items():
        if name not in sections:
            raise ConfigError(
                f"{source}: unknown {_section_or_key(name, table)}{_guess_section(name, sections)}"
            )
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: [{name}] is a section, not a value")
        values[name] = _section(source, name, table, sections[name], base)
    config = Config(**values)
    _check(source, config)
    return config


def _section(source: str, name: str, table: dict[str, Any], kind: type[Any], base: Path | None) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            raise ConfigError(f"{source}: unknown key '{_short(key)}' in [{name}]{_guess(key, list(hints))}")
        try:
            values[key] = _in_unit(value, _unit(hints[key]), base)
            msgspec.convert(values[key], hints[key])
        except (ValueError, msgspec.ValidationError) as error:
            raise ConfigError(f"{source}: [{name}] {key}: {str(error).split(' - at')[0]}") from None
    return msgspec.convert(values, kind)


def _unit(hint: Any) -> str | None:
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Annotated:
            for meta in part.__metadata__:
                if isinstance(meta, Meta) and meta.extra:
                    return str(meta.extra["unit"])
    return None


def _in_unit(value: Any, unit: str | None, base: Path | None) -> Any:
    if unit == "size":
        return parse_size(value) if isinstance(value, str | int) else value
    if unit == "duration":
        return parse_duration(value) if isinstance(value, str | int | float) else value
    if unit == "path" and isinstance(value, str):
        return resolved(value, base)
    return value


def _check(source: str, config: Config) -> None:
    """Rules that join more than one key, or that a type cannot say."""

    def refuse(section: str, key: str, why: str) -> NoReturn:
        raise ConfigError(f"{source}: [{section}] {key}: {why}")

    if not config.store.prefixes:
        refuse("store", "prefixes", "name at least one prefix")
    for prefix in config.store.prefixes:
        try:
            check_prefix(prefix)
        except InvalidName as error:
            refuse("store", "prefixes", str(error))
    for key, url in (("url", config.store.url), ("endpoint_url", config.store.endpoint_url)):
        if url and "@" in urlsplit(url).netloc:
            refuse("store", key, "credentials do not belong in an url; they come from the AWS chain")
    for key, timeout in (
        ("connect_timeout", config.store.connect_timeout),
        ("read_timeout", config.store.read_timeout),
    ):
        if timeout <= 0:
            refuse("store", key, "must be more than 0: no request would ever be answered in time")
    if config.store.gc_grace < MIN_GC_GRACE:
        # An upload has half of it from its first pack to its commit, a fork a quarter.
        refuse("store", "gc_grace", "must be at least 1m")
    for section, listen in (("api", config.api.listen), ("nbd", config.nbd.listen)):
        if listen is not None:
            try:
                parse_listen(listen)
            except ValueError as error:
                refuse(section, "listen", str(error))
    _check_api(refuse, config.api)
    _check_endpoint(refuse, config.telemetry.otlp_endpoint)
    for section, path in (("api", config.api.socket), ("nbd", config.nbd.socket)):
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            refuse(section, "socket", f"a socket's path has at most {MAX_SOCKET_PATH} bytes")
    if config.api.socket == config.nbd.socket:
        refuse("nbd", "socket", "must differ from the socket of [api]")
    if config.nbd.reply_memory < MIN_REPLY_MEMORY:
        refuse("nbd", "reply_memory", f"must be at least {MIN_REPLY_MEMORY >> 20}MiB")
    cache = config.cache
    if not 32 * KIB <= cache.segment_size < 64 * GIB or cache.segment_size % 4096:
        refuse("cache", "segment_size", "must be a multiple of 4KiB, at least 32KiB and less than 64GiB")
    if cache.log_size < 4 * cache.segment_size:
        refuse("cache", "log_size", "must hold at least four segments (segment_size)")
    if cache.block_cache_size < MIB:
        refuse("cache", "block_cache_size", "must be at least 1MiB")
    if cache.map_budget < MIB:
        refuse("cache", "map_budget", "must be at least 1MiB")
    if config.upload.sync_interval > config.upload.max_dirty_age:
        refuse("upload", "max_dirty_age", "must not be shorter than sync_interval")
    if not MIB <= config.upload.pack_size <= GIB:
        refuse("upload", "pack_size", "must be from 1MiB to 1GiB")
    if not 4 * KIB <= config.ublk.max_io <= 32 * MIB or config.ublk.max_io % 4096:
        refuse("ublk", "max_io", "must be a multiple of 4KiB from 4KiB to 32MiB")


def _check_api(refuse: Callable[[str, str, str], NoReturn], api: ApiSettings) -> None:
    """Over TCP a client has a token, and beyond this host nobody on the way reads it."""
    if api.listen and not (api.token_file or api.tokens_file):
        refuse("api", "listen", "the control API listens on TCP only with tokens; set tokens_file too")
    if (api.tls_cert is None) != (api.tls_key is None):
        refuse("api", "tls_cert", "a certificate has a key; set tls_cert and tls_key")
    if api.client_ca and not api.tls_cert:
        refuse("api", "client_ca", "certificates of clients are for TLS; set tls_cert and tls_key too")
    if api.listen and not api.tls_cert and not api.allow_plaintext and not _is_loopback(api.listen):
        why = "tokens would cross the network as plain text; set tls_cert and tls_key"
        refuse("api", "listen", f"{why}, or allow_plaintext = true")


def _check_endpoint(refuse: Callable[[str, str, str], NoReturn], endpoint: str) -> None:
    """A mistake would show when the first span is sent, and nobody looks then."""
    try:
        url = urlsplit(endpoint)
        is_whole = url.scheme in ("http", "https") and url.hostname and url.port != 0 and url.path.strip("/")
    except ValueError:
        is_whole = False
    if endpoint and not is_whole:
        refuse("telemetry", "otlp_endpoint", "write it as 'http://127.0.0.1:4318/v1/traces'")
    if endpoint and "@" in url.netloc:
        why = "credentials do not belong in an url; they come from OTEL_EXPORTER_OTLP_HEADERS"
        refuse("telemetry", "otlp_endpoint", why)


def _is_loopback(listen: str) -> bool:
    """Whether only this host can connect to an address. Of a name nobody knows, but of localhost."""
    host = listen.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port of "127.0.0.1:10809" or "[::1]:10809". Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or int(port) > 65535:
        raise ValueError(f"{_short(text)} is not an address; write it as '127.0.0.1:10809'")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _section_or_key(name: str, value: Any) -> str:
    return (
        f"section [{_short(name)}]" if isinstance(value, dict) else f"key '{_short(name)}' outside a section"
    )


def _guess_section(name: str, sections: dict[str, Any]) -> str:
    owners = [section for section, kind in sections.items() if name in kind.__struct_fields__]
    if owners:
        return f"; it belongs in [{owners[0]}]"
    return _guess(name, list(sections))


def _guess(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")[1:-1]
