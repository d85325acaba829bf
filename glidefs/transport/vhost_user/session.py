"""One front-end of an export: what was agreed with it, its memory and queues, and the device for them.

A session answers messages, one after another; :mod:`glidefs.transport.vhost_user.transport` receives them,
and sees to it that no two calls overlap. Descriptors of the front-end live here: the core uses what it
duplicates or maps.

What is in flight is recorded in memory that lasts longer than this process: the front-end's, if it speaks
INFLIGHT_SHMFD, else our own, which only a handoff passes on. The core keeps the record.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from glidefs.core import vhost
from glidefs.core.vhost import Region, Ring, VhostDevice
from glidefs.errors import GlideError
from glidefs.transport.base import Attachment
from glidefs.transport.vhost_user import blk, messages
from glidefs.transport.vhost_user.messages import BadMessage, Inflight, Message, ProtocolFeature, Request

PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
_EVENTFD = "anon_inode:[eventfd]"
KICK, CALL, ERROR = range(3)


class Queue:
    """What the front-end said of one."""

    def __init__(self) -> None:
        self.num = 0
        self.base = 0
        self.descriptors = self.available = self.used = 0
        self.enabled = False
        self.running = False
        self.events: list[int | None] = [None, None, None]
        """Kick, call, error."""

    def set_event(self, which: int, fd: int | None) -> None:
        """Keep a descriptor instead of the one before."""
        old, self.events[which] = self.events[which], fd
        if old is not None:
            os.close(old)

    def ring(self) -> Ring:
        """For the core."""
        return Ring(self.descriptors, self.available, self.used, self.num, self.base, self.enabled)


class Session:
    """One front-end. ``unanswered``: the request that waits for requests of the guest to end."""

    def __init__(
        self,
        sock: socket.socket,
        export: Attachment,
        device_id: int,
        queues: int,
        peer: str,
    ) -> None:
        self.sock = sock
        self.peer = peer
        self.export = export
        self.receiver = messages.Receiver()
        self.unanswered: Message | None = None
        self.features = 0
        self.protocol = ProtocolFeature(0)
        self.writeback = True
        self.channel: socket.socket | None = None
        self.regions: list[tuple[Region, int]] = []
        self.queues = [Queue() for _ in range(queues)]
        self.inflight: Inflight | None = None
        self.inflight_fd = -1
        self.device = VhostDevice(export.core, device_id, export.name.encode(), read_only=export.read_only)

    def close(self) -> None:
        """End it: waits for what runs; what has no answer stays in the front-end's record."""
        self.device.close()
        self.sock.close()
        if self.channel is not None:
            self.channel.close()
        self.receiver.close()
        if self.unanswered is not None:
            messages.close_all(self.unanswered.descriptors)
        messages.close_all([fd for _, fd in self.regions])
        messages.close_all([fd for queue in self.queues for fd in queue.events if fd is not None])
        if self.inflight_fd >= 0:
            os.close(self.inflight_fd)

    # -- messages --------------------------------------------------------------------------------

    def handle(self, message: Message) -> bool:
        """Do what the front-end asks for, and answer. False: the answer must wait, see :meth:`finish`.

        Raises BadMessage, GlideError, OSError: the session must end.
        """
        kept: list[int] = []
        try:
            answer = self._answer(message, kept)
        except BadMessage:
            raise
        except GlideError as error:
            if not self._acknowledges(message) or self.device.closed or self.device.trouble():
                raise
            self.send(messages.reply(message.request, messages.number(1)))
            raise Refused(str(error)) from error
        finally:
            messages.close_all([fd for fd in message.descriptors if fd not in kept])
        if answer is None and message.request is Request.GET_VRING_BASE:
            self.unanswered = message
            return False
        if answer is not None:
            self._send_answer(message, answer)
        elif self._acknowledges(message):
            self.send(messages.reply(message.request, messages.number(0)))
        return True

    def _acknowledges(self, message: Message) -> bool:
        has_own = message.request.name.startswith("GET_")
        return message.needs_reply and ProtocolFeature.REPLY_ACK in self.protocol and not has_own

    def _send_answer(self, message: Message, answer: bytes) -> None:
        rights = []
        if message.request is Request.GET_INFLIGHT_FD:
            rights = [self.inflight_fd]
        self.send(messages.reply(message.request, answer), rights)

    def send(self, data: bytes, descriptors: list[int] | None = None) -> None:
        """Say something to the front-end. Raises BadMessage if it does not read, OSError."""
        try:
            sent = socket.send_fds(
                self.sock, [data], descriptors or [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            )
        except BlockingIOError:
            sent = 0
        if sent != len(data):
            raise BadMessage("it does not read what it asked for")

    def _answer(self, message: Message, kept: list[int]) -> bytes | None:
        """The payload of the answer, if the request has one. Descriptors that are kept go to ``kept``."""
        payload = message.payload
        match message.request:
            case Request.GET_FEATURES:
                return messages.number(blk.features_of(self.export))
            case Request.SET_FEATURES:
                self._set_features(messages.number_of(payload))
            case Request.GET_PROTOCOL_FEATURES:
                return messages.number(PROTOCOL)
            case Request.SET_PROTOCOL_FEATURES:
                self._set_protocol(messages.number_of(payload))
            case Request.GET_QUEUE_NUM:
                return messages.number(len(self.queues))
            case Request.GET_MAX_MEM_SLOTS:
                return messages.number(vhost.REGIONS)
            case Request.SET_MEM_TABLE | Request.ADD_MEM_REG | Request.REM_MEM_REG:
                self._set_memory(message, kept)
            case Request.GET_CONFIG:
                return self._get_config(payload)
            case Request.SET_CONFIG:
                self._set_config(payload)
            case Request.GET_INFLIGHT_FD:
                return self._make_inflight(messages.inflight_of(payload), len(payload))
            case Request.SET_INFLIGHT_FD:
                self._set_inflight(messages.inflight_of(payload), message.descriptors[0])
                kept.append(message.descriptors[0])
            case Request.SET_BACKEND_REQ_FD:
                self._set_channel(message.descriptors[0])
            case Request.SET_OWNER | Request.RESET_OWNER:
                pass
            case _:
                return self._of_queue(message, kept)
        return None

    def _set_features(self, features: int) -> None:
        beyond = features & ~blk.features_of(self.export)
        if beyond:
            raise BadMessage(f"it takes features {beyond:#x}, which were not offered")
        self.features = features
        if not features & blk.F_PROTOCOL:
            for queue in self.queues:
                queue.enabled = True
        self.tell_features()

    def tell_features(self) -> None:
        cached = bool(self.features & blk.F_FLUSH) and (
            self.writeback or not self.features & blk.F_CONFIG_WCE
        )
        self.device.features(self.features, writeback=cached)

    def _set_protocol(self, features: int) -> None:
        if features & ~PROTOCOL:
            raise BadMessage(f"it takes protocol features {features & ~PROTOCOL:#x}, which were not offered")
        self.protocol = ProtocolFeature(features)

    # -- the configuration space -------------------------------------------------------------------

    def _get_config(self, payload: bytes) -> bytes:
        offset, size, flags, _ = messages.config_of(payload)
        space = blk.config_space(self.export, len(self.queues), writeback=self.writeback)
        return messages.config(offset, flags, space[offset : offset + size])

    def _set_config(self, payload: bytes) -> None:
        offset, size, _, data = messages.config_of(payload)
        if not self.features & blk.F_CONFIG_WCE or (offset, size, len(data)) != (blk.WCE_OFFSET, 1, 1):
            raise BadMessage(f"{size} bytes of the configuration space at {offset} cannot be changed")
        self.writeback = data != b"\0"
        self.tell_features()

    def resized(self, export: Attachment) -> bool:
        """The export has another size now. Whether the front-end was told."""
        self.export = export
        if self.channel is None:
            return False
        try:
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            return self.channel.send(messages.CONFIG_CHANGED, flags) == len(messages.CONFIG_CHANGED)
        except OSError:
            return False

    def _set_channel(self, fd: int) -> None:
        if ProtocolFeature.BACKEND_REQ not in self.protocol or not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise BadMessage("SET_BACKEND_REQ_FD was not agreed on, or is no socket")
        channel = socket.socket(fileno=os.dup(fd))
        if self.channel is not None:
            self.channel.close()
        self.channel = channel

    # -- memory --------------------------------------------------------------------------------------

    def _set_memory(self, message: Message, kept: list[int]) -> None:
        old = self.regions
        given = message.descriptors
        if message.request is Request.SET_MEM_TABLE:
            regions = list(zip(messages.table_of(message.payload, len(given)), given, strict=True))
        elif message.request is Request.ADD_MEM_REG:
            regions = [*old, (messages.region_of(message.payload), given[0])]
        else:
            gone = messages.region_of(message.payload)
            regions = [pair for pair in old if _place(pair[0]) != _place(gone)]
            if len(regions) == len(old):
                raise BadMessage("REM_MEM_REG of a region that is not in the memory table")
        self.device.memory([(region, fd if fd in given else -1) for region, fd in regions])
        self.regions = regions
        fds = [fd for _, fd in regions]
        kept += [fd for fd in given if fd in fds]
        messages.close_all([fd for _, fd in old if fd not in fds])

    # -- what is in flight ---------------------------------------------------------------------------

    def _make_inflight(self, asked: Inflight, size: int) -> bytes:
        if ProtocolFeature.INFLIGHT_SHMFD not in self.protocol:
            raise BadMessage("GET_INFLIGHT_FD was not agreed on")
        self._own_inflight(asked.queues, asked.depth)
        assert self.inflight is not None
        return messages.inflight(self.inflight, size)

    def _own_inflight(self, queues: int, depth: int) -> None:
        if not 1 <= queues <= len(self.queues) or not 1 <= depth <= vhost.DEPTH:
            raise BadMessage(f"there is no record of what is in flight in {queues} queues of {depth}")
        record = Inflight(queues * vhost.inflight_bytes(depth), 0, queues, depth)
        fd = os.memfd_create("glidefs-vhost-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, record.size)
            self._set_inflight(record, fd)
        except BaseException:
            os.close(fd)
            raise

    def _set_inflight(self, record: Inflight, fd: int) -> None:
        if record.queues * vhost.inflight_bytes(record.depth) > record.size:
            raise BadMessage(f"a record of what is in flight has {record.size} bytes, too few")
        self.device.inflight(fd, record.offset, record.queues, record.depth)
        if self.inflight_fd >= 0:
            os.close(self.inflight_fd)
        self.inflight, self.inflight_fd = record, fd

    # -- queues --------------------------------------------------------------------------------------

    def _queue(self, index: int) -> Queue:
        if index >= len(self.queues):
            raise BadMessage(f"there is no queue {index}, only {len(self.queues)}")
        return self.queues[index]

    def _of_queue(self, message: Message, kept: list[int]) -> bytes | None:
        request, payload = message.request, message.payload
        if request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            index, fd = messages.event_of(message)
            self._set_event(request, index, fd)
            if fd is not None:
                kept.append(fd)
            if request is Request.SET_VRING_KICK:
                self.start_queue(index)
            return None
        if request is Request.SET_VRING_ADDR:
            self._set_address(messages.address_of(payload))
            return None
        index, number = messages.state_of(payload)
        queue = self._queue(index)
        if request is Request.GET_VRING_BASE:
            return self._stop(index)
        if request is Request.SET_VRING_ENABLE:
            if number > 1:
                raise BadMessage(f"SET_VRING_ENABLE of {number}")
            queue.enabled = bool(number)
            if queue.running:
                self.device.enable(index, enabled=queue.enabled)
            return None
        if queue.running:
            raise BadMessage(f"{request.name} of queue {index}, which runs")
        if request is Request.SET_VRING_NUM:
            if not 1 <= number <= vhost.DEPTH or number & (number - 1):
                raise BadMessage(f"a queue of {number} entries; it has a power of two up to {vhost.DEPTH}")
            queue.num = number
        else:
            if number > 0xFFFF:
                raise BadMessage(f"SET_VRING_BASE of {number}")
            queue.base = number
        return None

    def _set_address(self, at: messages.RingAddress) -> None:
        queue = self._queue(at.index)
        if at.flags:
            raise BadMessage(f"SET_VRING_ADDR with flags {at.flags:#x}: a log of writes was not agreed on")
        addresses = (at.descriptors, at.available, at.used)
        if queue.running and addresses != (queue.descriptors, queue.available, queue.used):
            raise BadMessage(f"SET_VRING_ADDR of queue {at.index}, which runs")
        queue.descriptors, queue.available, queue.used = addresses

    def _set_event(self, request: Request, index: int, fd: int | None) -> None:
        """Only eventfds: whatever else can make whoever polls or writes it wait."""
        queue = self._queue(index)
        if fd is not None and os.readlink(f"/proc/self/fd/{fd}") != _EVENTFD:
            raise BadMessage(f"{request.name} of queue {index} is no eventfd")
        if request is Request.SET_VRING_KICK and (queue.running or fd is None):
            raise BadMessage(
                f"SET_VRING_KICK of queue {index}, " + ("which runs" if fd is not None else "to be polled")
            )
        if request is Request.SET_VRING_CALL and queue.running:
            self.device.call(index, -1 if fd is None else fd)
        which = {Request.SET_VRING_KICK: KICK, Request.SET_VRING_CALL: CALL, Request.SET_VRING_ERR: ERROR}
        queue.set_event(which[request], fd)

    def start_queue(self, index: int) -> None:
        queue = self.queues[index]
        if not queue.num:
            raise BadMessage(f"SET_VRING_KICK of queue {index}, which has no size yet")
        if self.inflight is None:
            self._own_inflight(len(self.queues), vhost.DEPTH)
        kick, call = queue.events[KICK], queue.events[CALL]
        assert kick is not None
        self.device.start_ring(index, queue.ring(), kick, -1 if call is None else call)
        queue.running = True

    def _stop(self, index: int) -> bytes | None:
        queue = self.queues[index]
        if queue.running:
            base = self.device.stop_ring(index, wait=False)
            if base is None:
                return None
            self.stopped(index, base)
        return messages.state(index, queue.base)

    def stopped(self, index: int, base: int) -> None:
        """A queue stands still; ``base`` is the entry that comes next."""
        queue = self.queues[index]
        queue.running, queue.base = False, base
        queue.set_event(KICK, None)

    def awaited_queue(self) -> int:
        """That of the request which is not answered yet."""
        assert self.unanswered is not None
        return messages.state_of(self.unanswered.payload)[0]

    def signal_errors(self) -> None:
        """The device has stopped: tell the front-end, where it wants to know."""
        for queue in self.queues:
            fd = queue.events[ERROR]
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.set_blocking(fd, False)
                    os.eventfd_write(fd, 1)


class Refused(GlideError):
    """A request could not be carried out, and the front-end was told so."""


def _place(region: Region) -> tuple[int, int, int]:
    return region.guest, region.user, region.size
