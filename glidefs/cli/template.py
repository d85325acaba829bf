"""The commented configuration that `glidefs init` writes: every key, its default, what it is for."""

from __future__ import annotations

import os
from pathlib import Path

from glidefs.cli import output
from glidefs.errors import ConfigError
from glidefs.store import open_store

TEMPLATE = """\
# GlideFS configuration. Lines that begin with '#' show the defaults.
# Sizes: "10GiB", "512MiB" (or bytes). Durations: "30s", "5m". Relative paths count from this file.

[cache]
dir = "/var/cache/glidefs"          # one daemon per directory
#log_dir = "/ssd/glidefs/logs"      # the write logs on another device: what is not uploaded lives here
#block_cache_dir = "/nvme/blocks"   # the cache of clean blocks on another device
log_size = "10GiB"                  # all write logs together, dirty and committed
block_cache_size = "20GiB"
#map_budget = "256MiB"              # memory of the maps of log and cache
#segment_size = "64MiB"             # one file of a write log
#scope = "host"                     # "prefix": tenants of different prefixes share no cached block
#log_full_timeout = "0s"            # writers wait this long for log space, then EIO; 0 = for ever

[store]
url = "file:///var/lib/glidefs/store"   # or "s3://bucket/root"; credentials come from the AWS chain
#endpoint_url = "http://127.0.0.1:8333"
#region = "us-east-1"
#path_style = true                  # buckets in the path; the default suits endpoint_url
#prefixes = ["default"]             # volumes of one prefix share packs; the first is the default
#reads = 32                         # concurrent reads for guests
#writes = 8                         # concurrent uploads
#connect_timeout = "5s"
#read_timeout = "30s"
#gc_grace = "24h"                   # gc deletes what nothing has named for this long; the same on every host

[api]
socket = "/run/glidefs/api.sock"    # mode 0600
#listen = "127.0.0.1:8440"          # TCP as well; needs tokens, and TLS unless it is this host alone
#tokens_file = "/etc/glidefs/tokens.toml"   # who may do what: 'glidefs token NAME --file' adds to it
#token_file = "/etc/glidefs/token"  # one token that may do everything; 'Authorization: Bearer ...'
#tls_cert = "/etc/glidefs/api.crt"  # TLS on TCP: certificate with those that vouch for it, PEM
#tls_key = "/etc/glidefs/api.key"
#client_ca = "/etc/glidefs/clients.crt"     # clients must have a certificate of this CA, besides a token
#allow_plaintext = false            # true: TCP without TLS also beyond this host
#audit_log = "/var/log/glidefs/audit.jsonl" # who asked for what goes here, too, not to the log alone
#export_metrics = false            # true: /metrics has series of each export, else sums over all of them

[nbd]
socket = "/run/glidefs/nbd.sock"    # mode 0600; NBD export name = export name
#listen = "127.0.0.1:10809"         # TCP as well: NBD has no authentication, keep it on a trusted network
#socket_group = "kvm"               # who may connect besides the owner
#reply_memory = "256MiB"            # replies that clients have not taken, of all connections together
#stall_timeout = "60s"              # a client that takes none for this long is cut off; 0 = never

[ublk]
#queue_depth = 64
#max_io = "512KiB"
#allow_kernel = "6.17.0-1020-aws"   # release (uname -r) of a kernel that 'doctor' refuses, if fixed

[nbd_device]
#request_timeout = "10s"            # /dev/nbdN: the kernel asks again, over a new connection, after this long
#dead_timeout = "7d"                # its guests wait this long for a daemon that is away, then get errors

[vhost_user]
#dir = "/run/glidefs/vhost"         # NAME.sock: where a hypervisor finds an export with this transport
#mode = "0660"                      # of the sockets
#group = "kvm"                      # and their group; default: that of the daemon
#queues = 4                         # that a front-end may use

[upload]
#sync_interval = "30s"              # a dirty log is uploaded when it is this old
#max_dirty_age = "5m"               # the latest, whatever else goes on
#pack_size = "32MiB"
#compression_level = 1              # zstd
#volumes = 8                        # volumes that upload at the same time
#workers = 3                        # packs in the making; each holds up to pack_size
#compaction = true                  # merge small packs in the background
#compact_rate = "64MiB"             # bytes per second of it

[reader]
#read_ahead = "64MiB"               # of one sequential reader at most
#read_timeout = "0s"                # reads wait this long for the store, then EIO; 0 = for ever
#workers = 16                       # threads for reads that need more than bytes

[daemon]
#node = "host-1"                    # the owner named in the store; default: the host name
#workers = 0                        # I/O threads; 0 = one per CPU
#busy_poll_us = 50                  # a busy I/O thread looks this long for the next request before it sleeps
#drain_deadline = "30s"             # on SIGTERM; what is not uploaded by then is safe in the log
#on_stop = "release"                # ublk devices on SIGTERM: "release" = guests pause until the next start
                                    # and see no error, "remove" = the devices disappear
#log_level = "info"
#log_format = "text"                # or "json": one object per line

[telemetry]
#otlp_endpoint = ""                 # "http://127.0.0.1:4318/v1/traces": gets spans of slow reads and of verbs
#slow_read = "100ms"                # reads of what is not here are slow from here on; 0 = all of them

[debug]
#shadow_dir = "/var/tmp/glidefs"    # compare every read with a second source kept here; slow; default: off
"""


def render(cache_dir: str | None = None, store_url: str | None = None, run_dir: str | None = None) -> str:
    """The template with its places replaced where given."""
    text = TEMPLATE
    vhost = '#dir = "/run/glidefs/vhost"         #'
    for old, new in (
        ('dir = "/var/cache/glidefs" ', cache_dir and f"dir = {_quote(cache_dir)} "),
        ('url = "file:///var/lib/glidefs/store"', store_url and f"url = {_quote(store_url)}"),
        ('socket = "/run/glidefs/api.sock"', run_dir and f"socket = {_quote(run_dir + '/api.sock')}"),
        ('socket = "/run/glidefs/nbd.sock"', run_dir and f"socket = {_quote(run_dir + '/nbd.sock')}"),
        (vhost, run_dir and f"dir = {_quote(run_dir + '/vhost')} #"),
    ):
        if new:
            text = text.replace(old, new)
    return text


def write(path: Path, text: str, force: bool) -> None:
    """Write `text` to `path`, which must not exist unless `force`. Raises ConfigError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, flags, 0o644), "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists; --force replaces it") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def make_store(url: str) -> None:
    """Make the directory of a `file://` store; where that is not allowed, say who must."""
    if not url.startswith("file:"):
        return
    try:
        open_store(url, create=True).close()
    except ConfigError as error:
        output.say(f"note: {error}; make the directory before the daemon starts")


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
