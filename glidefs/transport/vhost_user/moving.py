"""Sessions that move to another process, which cannot ask the front-end anything."""

from __future__ import annotations

import socket

from msgspec import Struct

from glidefs.core.vhost import Region
from glidefs.transport.base import Attachment
from glidefs.transport.vhost_user import messages
from glidefs.transport.vhost_user.messages import Inflight, ProtocolFeature
from glidefs.transport.vhost_user.session import Queue, Session


class QueueCut(Struct, frozen=True):
    """A queue that moves; ``has``: whether kick, call and error descriptors come with it."""

    num: int
    base: int
    descriptors: int
    available: int
    used: int
    enabled: bool
    running: bool
    has: tuple[bool, bool, bool]


class SessionCut(Struct, frozen=True):
    """A session that moves.

    Descriptors, in this order: the socket, the channel to the front-end, the file of each region, those of
    the queues, the record of what is in flight, and those that came with ``received``.
    """

    peer: str
    features: int
    protocol: int
    writeback: bool
    has_channel: bool
    regions: tuple[Region, ...]
    queues: tuple[QueueCut, ...]
    inflight: Inflight | None
    received: bytes
    loose: int


def cut_session(session: Session) -> tuple[SessionCut, list[int]]:
    """What another process needs to go on with it. The descriptors stay the session's."""
    pending = session.unanswered.pack() if session.unanswered is not None else b""
    fds = [session.sock.fileno()]
    if session.channel is not None:
        fds.append(session.channel.fileno())
    fds += [fd for _, fd in session.regions]
    fds += [fd for queue in session.queues for fd in queue.events if fd is not None]
    if session.inflight is not None:
        fds.append(session.inflight_fd)
    fds += session.receiver.descriptors
    cut = SessionCut(
        peer=session.peer,
        features=session.features,
        protocol=int(session.protocol),
        writeback=session.writeback,
        has_channel=session.channel is not None,
        regions=tuple(region for region, _ in session.regions),
        queues=tuple(_cut_queue(queue) for queue in session.queues),
        inflight=session.inflight,
        received=pending + bytes(session.receiver.received),
        loose=len(session.receiver.descriptors),
    )
    return cut, fds


def adopt(cut: SessionCut, descriptors: list[int], export: Attachment, device_id: int) -> Session:
    """Go on with a session of another process on a frozen volume. Owns the descriptors, also on error.

    Raises GlideError, OSError.
    """
    left = list(descriptors)
    sock = socket.socket(fileno=left.pop(0))
    try:
        session = Session(sock, export, device_id, len(cut.queues), cut.peer)
    except BaseException:
        sock.close()
        messages.close_all(left)
        raise
    try:
        _restore(session, cut, left)
    except BaseException:
        messages.close_all(left)
        session.close()
        raise
    return session


def _restore(session: Session, cut: SessionCut, left: list[int]) -> None:
    """Takes what it uses out of ``left``."""
    if cut.has_channel:
        session.channel = socket.socket(fileno=left.pop(0))
    for region in cut.regions:
        session.regions.append((region, left.pop(0)))
    for queue, state in zip(session.queues, cut.queues, strict=True):
        queue.num, queue.base, queue.enabled = state.num, state.base, state.enabled
        queue.descriptors, queue.available, queue.used = state.descriptors, state.available, state.used
        queue.events = [left.pop(0) if has else None for has in state.has]
    if cut.inflight is not None:
        session.inflight, session.inflight_fd = cut.inflight, left.pop(0)
    session.receiver = messages.Receiver(cut.received, [left.pop(0) for _ in range(cut.loose)])
    session.features, session.protocol = cut.features, ProtocolFeature(cut.protocol)
    session.writeback = cut.writeback
    session.tell_features()
    session.device.memory(session.regions)
    if cut.inflight is not None:
        record = cut.inflight
        session.device.inflight(session.inflight_fd, record.offset, record.queues, record.depth)
    for index, state in enumerate(cut.queues):
        if state.running:
            session.start_queue(index)


def _cut_queue(queue: Queue) -> QueueCut:
    kick, call, error = (fd is not None for fd in queue.events)
    return QueueCut(
        num=queue.num,
        base=queue.base,
        descriptors=queue.descriptors,
        available=queue.available,
        used=queue.used,
        enabled=queue.enabled,
        running=queue.running,
        has=(kick, call, error),
    )
