"""Listening sockets of the NBD server: opened with the right mode, or inherited.

A Unix socket has mode 0600 from the moment it exists (0660 once a group is given), because the mode
is set on the descriptor before bind(): there is no window in which others can connect. A file left
by a dead server is replaced, but only when nobody answers on it.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
import stat
import struct
from collections.abc import Mapping, Sequence

from glidefs.errors import GlideError

BACKLOG = 1024
MAX_UNIX_PATH = 107  # bytes in sockaddr_un
_FIRST_ACTIVATED_FD = 3
_UCRED = struct.Struct("iII")

_KEEPALIVE_IDLE, _KEEPALIVE_INTERVAL, _KEEPALIVE_PROBES = 30, 10, 6
_UNACKNOWLEDGED_MS = 90_000


class ListenError(GlideError):
    """A listening socket cannot be opened; the message names it and says what to do."""


def listen_unix(path: str, group: str | None = None) -> socket.socket:
    """Listen on a Unix socket, mode 0600, or 0660 and `group` when one is given.

    The directory is created (mode 0755) when absent. Raises ListenError.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise ListenError(
            f"{path}: a Unix socket path has at most {MAX_UNIX_PATH} bytes; choose a shorter one"
        )
    gid = _group_id(path, group)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o755, exist_ok=True)
        _remove_stale(path)
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        if gid is not None:
            os.chown(path, -1, gid)
            os.chmod(path, 0o660)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenError(f"{path}: cannot listen: {error.strerror or error}") from error
    except ListenError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _group_id(path: str, group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ListenError(f"{path}: there is no group {group!r}; create it or change socket_group") from None


def _remove_stale(path: str) -> None:
    """Remove a socket that no process listens on. Raises ListenError when it is anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path}: exists and is not a socket; move it away or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # a full backlog: somebody listens
    raise ListenError(f"{path}: another process listens there; stop it or choose another path")


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen on a TCP address, given as numbers or as a name of this host. Raises ListenError."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ListenError(f"{where}: cannot listen: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


Inherited = Sequence[tuple[str, socket.socket]]
"""Listeners of the process before, each with the socket file that is ours to remove, or ""."""


def keep_or_listen_unix(inherited: Inherited, path: str, group: str | None = None) -> socket.socket:
    """The inherited listener of this path, else a new one. Raises ListenError."""
    kept = [listener for own, listener in inherited if own == path]
    return checked_listener(kept[0]) if kept else listen_unix(path, group)


def keep_or_listen_tcp(inherited: Inherited, host: str, port: int) -> socket.socket:
    """The inherited listener of this address (port 0: of any port), else a new one. Raises ListenError."""
    for _, listener in inherited:
        if listener.family != socket.AF_UNIX and _is_at(listener, host, port):
            return checked_listener(listener)
    return listen_tcp(host, port)


def _is_at(listener: socket.socket, host: str, port: int) -> bool:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        return False
    at = listener.getsockname()
    return listener.family == family and at[0] == address[0] and port in (0, at[1])


def close_others(inherited: Inherited, kept: Sequence[socket.socket]) -> list[tuple[str, tuple[int, int]]]:
    """Close those that the configuration names no more; the socket files to remove once others serve."""
    others = [(path, listener) for path, listener in inherited if listener not in kept]
    for _, listener in others:
        listener.close()
    left = []
    for path in (path for path, _ in others if path):
        with contextlib.suppress(FileNotFoundError):
            left.append((path, socket_identity(path)))
    return left


def activated_listeners(name: str, environ: Mapping[str, str]) -> list[socket.socket]:
    """Stream listeners that the service manager passed under `name` (FileDescriptorName=).

    Source: sd_listen_fds(3). Descriptors without names are taken when there is only one name to
    serve, that is, when LISTEN_FDNAMES is absent. The result may be empty.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environ.get("LISTEN_FDS", "")
    if not count.isdecimal() or len(count) > 4:
        return []
    names = environ["LISTEN_FDNAMES"].split(":") if environ.get("LISTEN_FDNAMES") else None
    listeners: list[socket.socket] = []
    for index in range(int(count)):
        if names is not None and (index >= len(names) or names[index] != name):
            continue
        fd = _FIRST_ACTIVATED_FD + index
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
        except OSError:
            continue
        os.set_inheritable(fd, False)
        listeners.append(socket.socket(fileno=fd))
    return [checked_listener(listener) for listener in listeners]


def checked_listener(listener: socket.socket) -> socket.socket:
    """An inherited socket, ready for use. Raises ListenError when it does not listen."""
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ListenError(f"inherited descriptor {listener.fileno()} is not a listening socket")
    listener.setblocking(False)
    return listener


def unlink_own(path: str, identity: tuple[int, int]) -> None:
    """Remove a socket file, unless another server has replaced it meanwhile."""
    try:
        if socket_identity(path) == identity:
            os.unlink(path)
    except FileNotFoundError:
        pass


def socket_identity(path: str) -> tuple[int, int]:
    """Device and inode of a socket file."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def tune_connection(connection: socket.socket) -> None:
    """TCP only: no delay of small replies, and a dead peer is noticed in about 90 seconds."""
    if connection.family == socket.AF_UNIX:
        return
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOPROTOOPT):  # EINVAL: the peer is gone already
            raise


def peer_name(connection: socket.socket) -> str:
    """Who is at the other end, for status and logs."""
    try:
        if connection.family != socket.AF_UNIX:
            host, port = connection.getpeername()[:2]
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(packed)
        return f"unix:pid={pid},uid={uid}"
    except OSError:
        return "gone"
