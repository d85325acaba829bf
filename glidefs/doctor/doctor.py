"""What works on this host, what does not, and what to do about it."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from glidefs.config import Config, load_config
from glidefs.daemon import io_flusher
from glidefs.daemon.disk_sizes import misfits
from glidefs.daemon.identity import made_elsewhere
from glidefs.daemon.process import LOCK_FILE
from glidefs.errors import ConfigError, DeviceError, GlideError, StoreError
from glidefs.exports.logs.leftovers import directory_of, dirs_below, logs_aside, recorded, unnamed_prefixes
from glidefs.places import config_path

State = Literal["ok", "warn", "fail"]
MIN_KERNEL = (6, 1)
UBLK_KERNEL = (6, 12)
MIN_FILES = 4096
LOG_FULL_SHARE = 0.9
SYS_IO_URING_SETUP = 425
REMOTE_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs"})
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
PROBE_DEADLINE = 15.0
LIST_DEADLINE = 5.0


class Check(Struct, frozen=True):
    """One line: what was looked at, how it is, and what to do."""

    name: str
    state: State
    detail: str
    remedy: str = ""


Result = tuple[State, str] | tuple[State, str, str]


def run_checks(config_file: str | None) -> list[Check]:
    """All checks, in an order in which the first failure explains later ones. Makes and changes nothing."""
    config, first = _configuration(config_file)
    checks = [first]
    table: tuple[tuple[str, Callable[[Config], Result]], ...] = (
        ("kernel", _kernel),
        ("io_uring", _io_uring),
        ("C core", _core),
        ("ublk driver", _ublk),
        ("nbd driver", _nbd),
        ("open files", _files),
        ("locked memory", _memlock),
        ("I/O flusher", _flusher),
        ("cache directory", lambda c: _directory(Path(c.cache.dir), 0)),
        ("cache directory's machine", _machine),
        ("log directory", lambda c: _directory(c.cache.logs, c.cache.log_size)),
        ("block cache directory", lambda c: _directory(c.cache.blocks, c.cache.block_cache_size)),
        ("disk sizes", _sizes),
        ("store", _store),
        ("store prefixes", _prefixes),
        ("daemon", _daemon),
        ("exports", _exports),
        ("write logs", _logs),
        ("devices", _orphans),
    )
    for name, look in table:
        try:
            result = look(config)
        except Exception as error:
            result = ("fail", f"the check itself failed: {type(error).__name__}: {error}")
        checks.append(Check(name, *result))
    return checks


def _configuration(config_file: str | None) -> tuple[Config, Check]:
    path = config_path(config_file)
    if config_file is None and not path.exists():
        text = f"{path} does not exist, the defaults are checked"
        return Config(), Check("configuration", "warn", text, "write it with 'glidefs init', or use --config")
    try:
        return load_config(path), Check("configuration", "ok", str(path))
    except ConfigError as error:
        return Config(), Check("configuration", "fail", str(error), "the defaults are checked below")


def kernel_version(release: str) -> tuple[int, int]:
    """6.12.4-amd64 -> (6, 12)."""
    numbers = []
    for part in release.split(".")[:2]:
        digits = ""
        for char in part:
            if not char.isdigit():
                break
            digits += char
        numbers.append(int(digits or 0))
    return numbers[0], numbers[1] if len(numbers) > 1 else 0


def _kernel(config: Config) -> Result:
    release = platform.release()
    version = kernel_version(release)
    if version < MIN_KERNEL:
        return "fail", f"Linux {release}", "GlideFS needs Linux 6.1 or later"
    if version < UBLK_KERNEL:
        return "warn", f"Linux {release}: NBD only", "for ublk use Linux 6.12 or later"
    return "ok", f"Linux {release}"


def _io_uring(config: Config) -> Result:
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    if (
        switch.exists()
        and (value := switch.read_text().strip()) != "0"
        and not (value == "1" and os.geteuid() == 0)
    ):
        return "fail", f"kernel.io_uring_disabled = {value}", "sysctl kernel.io_uring_disabled=0"
    libc = ctypes.CDLL(None, use_errno=True)
    params = (ctypes.c_char * 120)()
    fd = libc.syscall(SYS_IO_URING_SETUP, 4, params)
    if fd < 0:
        number = ctypes.get_errno()
        why = os.strerror(number)
        if number in (errno.EPERM, errno.ENOSYS):
            return (
                "fail",
                f"io_uring_setup: {why}",
                "a seccomp profile (container?) forbids io_uring: allow it",
            )
        return "fail", f"io_uring_setup: {why}"
    os.close(fd)
    return "ok", "available"


def _core(config: Config) -> Result:
    try:
        import glidefs.core.engine  # noqa: F401
    except ImportError as error:
        return "fail", f"cannot be loaded: {error}", "install a wheel, or build with 'pip install .'"
    return "ok", "loaded"


def _ublk(config: Config) -> Result:
    from glidefs.transport.ublk.driver import ublk_missing

    missing = ublk_missing(config.ublk.allow_kernel)
    if missing:
        return "warn", f"not usable: {missing}", "exports use NBD"
    from glidefs.core import ublk
    from glidefs.transport.ublk.device import F_UPDATE_SIZE, explained

    try:
        features = ublk.features()
    except DeviceError as error:
        return "warn", f"{explained(error)}", "exports use NBD"
    if not features & F_UPDATE_SIZE:
        return "ok", f"features {features:#x}; no online resize, which Linux 6.16 has"
    return "ok", f"features {features:#x}"


def _nbd(config: Config) -> Result:
    from glidefs.transport.nbd_device.driver import nbd_device_missing

    missing = nbd_device_missing()
    return ("ok", "available") if missing is None else ("ok", f"no nbd-device: {missing}")


def _files(config: Config) -> Result:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MIN_FILES:
        return (
            "warn",
            f"at most {hard}",
            f"raise the hard limit to {MIN_FILES} or more (LimitNOFILE= in systemd)",
        )
    return "ok", f"{soft}, the daemon raises it to {'no limit' if hard == resource.RLIM_INFINITY else hard}"


def _memlock(config: Config) -> Result:
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() == 0 or hard == resource.RLIM_INFINITY:
        return "ok", "not limited"
    if hard < 8 << 20:
        return "warn", f"{hard} bytes", "raise it to 8 MiB or more (LimitMEMLOCK= in systemd)"
    return "ok", f"{hard} bytes"


def _flusher(config: Config) -> Result:
    """Of the daemon that has the cache directory, else of one that this user would start."""
    try:
        pid = int((Path(config.cache.dir) / LOCK_FILE).read_text(encoding="ascii"))
        marked, total = io_flusher.count_threads(pid)
    except (OSError, ValueError):
        why = io_flusher.refused()
        if why is not None:
            return (
                "warn",
                f"when memory is short a daemon waits for its own devices: {why}",
                io_flusher.REMEDY,
            )
        return "ok", "permitted"
    if marked < total:
        text = f"{total - marked} of {total} threads of the daemon may wait for its own devices"
        return "warn", text, io_flusher.REMEDY
    return "ok", f"all {total} threads of the daemon"


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`, by /proc/self/mounts; "" if unknown."""
    best, kind = "", ""
    resolved = str(path.resolve())
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = fields[1].replace("\\040", " ")
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, fields[2]
    return kind


def _directory(path: Path, wanted: int) -> Result:
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return "fail", f"{existing} is not a directory", "change [cache] in the configuration"
    if not os.access(existing, os.W_OK | os.X_OK):
        return "fail", f"{existing} cannot be written", "give it to the daemon's user, or run as root"
    kind = file_system(existing)
    usage = shutil.disk_usage(existing)
    detail = f"{path} on {kind or 'unknown'}, {usage.free >> 20} MiB free"
    if kind in REMOTE_FILE_SYSTEMS:
        return "fail", detail, "the log must be on a local disk"
    if kind in MEMORY_FILE_SYSTEMS:
        return "warn", detail, "a power cut loses what is not uploaded; use a disk"
    used = _allocated(path) if wanted else 0
    if wanted and usage.free + used < wanted:
        need = f"{wanted >> 20} MiB are configured"
        return "warn", f"{detail}, {need}", "free space, or lower log_size and block_cache_size"
    return "ok", detail


def _machine(config: Config) -> Result:
    """A clone has the ids of its host: before a commit nothing else tells them apart."""
    if not made_elsewhere(Path(config.cache.dir)):
        return "ok", "this one"
    return (
        "warn",
        "this cache directory was made on another machine",
        "if that machine still runs with a copy of it, give this one an empty cache directory: of two copies "
        "the one that commits later is fenced; if the disk was moved here, nothing is to be done",
    )


def _sizes(config: Config) -> Result:
    lines = misfits(config)
    if lines:
        return "warn", "; ".join(lines), "see log_size and block_cache_size in docs/operations.md"
    return "ok", "log_size and block_cache_size fit"


def _allocated(path: Path) -> int:
    total = 0
    for directory, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except OSError:
                continue
    return total


def _store(config: Config) -> Result:
    root = directory_of(config.store.url)
    if root is not None:
        return _store_directory(root)
    from glidefs.store import open_configured
    from glidefs.store.probe import probe_store
    from glidefs.store.resilient import ResilientStore

    started = time.monotonic()
    try:
        with ResilientStore(open_configured(config.store), deadline=PROBE_DEADLINE) as store:
            probe_store(store)
    except StoreError as error:
        reason, _, remedy = str(error).partition("; ")
        return "fail", reason, remedy or "check [store] url and endpoint_url, the network and the credentials"
    except GlideError as error:
        return "fail", str(error)
    elapsed = (time.monotonic() - started) * 1000
    return "ok", f"{config.store.url} keeps conditions and ranges ({elapsed:.0f} ms for all requests)"


def _store_directory(root: Path) -> Result:
    """A directory is looked at and nothing is put there: what it keeps is in our own hands."""
    if not root.exists():
        remedy = "mount its disk, or make a new store with 'glidefs run --init-store'"
        return "fail", f"{root} is not there", remedy
    if not root.is_dir():
        return "fail", f"{root} is not a directory", "change [store] url"
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        return "fail", f"{root} cannot be written", "give it to the daemon's user, or run as root"
    return "ok", f"{root}, {shutil.disk_usage(root).free >> 20} MiB free"


def _prefixes(config: Config) -> Result:
    from glidefs.store import open_configured
    from glidefs.store.resilient import ResilientStore

    named, root = config.store.prefixes, directory_of(config.store.url)
    try:
        if root is not None:
            found = unnamed_prefixes(dirs_below(root), named) if root.is_dir() else []
        else:
            with ResilientStore(open_configured(config.store), deadline=LIST_DEADLINE) as store:
                found = unnamed_prefixes(store.list_dirs, named)
    except (GlideError, OSError) as error:
        return "warn", f"cannot be listed: {error}", "see the line about the store"
    if found:
        others = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        remedy = "add them to [store] prefixes where they are used: gc and starts look at those alone"
        return "warn", f"the store has some that no configuration here names: {others}", remedy
    return "ok", ", ".join(named)


def _exports(config: Config) -> Result:
    names, damaged = recorded(config)
    if damaged:
        some = ", ".join(sorted(damaged)[:8])
        remedy = "'glidefs list' says why; 'glidefs remove NAME' ends the record, then 'glidefs attach NAME'"
        return "warn", f"damaged records: {some}", remedy
    try:
        served = {export["name"] for export in _ask(config, "/api/exports") if export["state"] == "serving"}
    except GlideError:
        if not names:
            return "ok", "none"
        return "warn", f"{len(names)} are recorded and no daemon serves them", "start it: 'glidefs run'"
    if left := sorted(names - served):
        some = ", ".join(left[:8])
        return "warn", f"{len(left)} are recorded and not served: {some}", "'glidefs list' says why"
    return "ok", f"{len(names)} served"


def _logs(config: Config) -> Result:
    found = logs_aside(config)
    if found.lost:
        text = f"{len(found.lost)} of lost records: {', '.join(found.lost[:4])}"
        remedy = (
            "'glidefs list' names the exports that 'glidefs attach' takes back; "
            "'glidefs logs export' saves the other logs"
        )
        return "warn", text, remedy
    if found.aside:
        text = f"{len(found.aside)} set aside, {found.size >> 20} MiB: {', '.join(found.aside[:4])}"
        remedy = "'glidefs logs export' saves what one holds, 'glidefs logs delete' deletes it"
        return "warn", text, remedy
    if found.strange:
        return "warn", f"not ours: {', '.join(found.strange[:4])}", "move it elsewhere"
    return "ok", "none without an export"


def _ask(config: Config, path: str) -> Any:
    """What the daemon says. Raises CommandError."""
    from glidefs.api.client import Client

    socket = os.environ.get("GLIDEFS_SOCKET") or config.api.socket
    return Client(socket).call("GET", path, timeout=5)


def _daemon(config: Config) -> Result:
    from glidefs.api.client import CommandError

    path = os.environ.get("GLIDEFS_SOCKET") or config.api.socket
    try:
        health: dict[str, Any] = _ask(config, "/health")
    except CommandError as error:
        return "warn", error.reason, error.hint
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        return "warn", f"answers, but {path} has mode {mode:o}", "chmod 600 it"
    if reasons := health.get("reasons"):
        return "warn", f"answers, but {', '.join(reasons)}", "see 'glidefs list' and docs/runbook.md"
    return "ok", f"answers on {path}, process {health.get('pid')}"


_IN_SERVICE = ("served", "connected")


def _orphans(config: Config) -> Result:
    from glidefs.doctor.devices import survey

    found = survey(config)
    if not found:
        return "ok", "none"
    served = sum(device.state in _IN_SERVICE for device in found)
    whose = {"export": "export {}", "orphan": "orphan: no export", "other": "somebody else's"}
    left = [device for device in found if device.state not in _IN_SERVICE or device.owner == "orphan"]
    if not left:
        return "ok", f"{served} served"
    shown = [f"{device.device} ({whose[device.owner].format(device.export)})" for device in left[:8]]
    remedies = {
        "export": "the daemon recovers those of its exports when it starts",
        "orphan": "'glidefs devices remove DEVICE' deletes an orphan",
        "other": "those of others are theirs to look after",
    }
    owners = dict.fromkeys(device.owner for device in left)
    text = f"{served} served, without a server: {', '.join(shown)}"
    return "warn", text, "; ".join(remedies[owner] for owner in sorted(owners))
