"""What a virtio-blk device offers (virtio 1.2, section 5.2): features and the configuration space."""

from __future__ import annotations

import struct

from glidefs.core import vhost
from glidefs.transport.base import Attachment

F_RO = 1 << 5
F_FLUSH = 1 << 9
F_CONFIG_WCE = 1 << 11
F_DISCARD, F_WRITE_ZEROES = 1 << 13, 1 << 14
F_INDIRECT, F_EVENT_INDEX = 1 << 28, 1 << 29
F_PROTOCOL = 1 << 30
F_VERSION_1 = 1 << 32
_F_SEG_MAX, _F_BLK_SIZE, _F_TOPOLOGY, _F_MQ = 1 << 2, 1 << 6, 1 << 10, 1 << 12
_ALWAYS = (
    _F_SEG_MAX | _F_BLK_SIZE | F_FLUSH | _F_TOPOLOGY | _F_MQ
    | F_INDIRECT | F_EVENT_INDEX | F_PROTOCOL | F_VERSION_1
)  # fmt: skip
CONFIG_BYTES = 256
WCE_OFFSET = 32
"""Of the one field that drivers may write: whether there is a write cache."""
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
"""struct virtio_blk_config, up to the fields of secure erase."""


def features_of(export: Attachment) -> int:
    """What is offered for an export."""
    return _ALWAYS | (F_RO if export.read_only else F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES)


def config_space(export: Attachment, queues: int, *, writeback: bool) -> bytes:
    """The whole of it; sizes in units of 512 bytes where the specification counts sectors."""
    zeroes = 0 if export.read_only else vhost.ZERO_SECTORS
    ranges = 0 if export.read_only else vhost.ZERO_RANGES
    packed = _CONFIG.pack(
        export.size // 512, 0, vhost.SEGMENTS, 0, 0, 0, 512,
        3, 0, 8, 256,  # topology: sectors of 4 KiB; at least those, 128 KiB by preference
        writeback, 0, queues,
        zeroes, ranges, 8, zeroes, ranges, 1,
    )  # fmt: skip
    return packed.ljust(CONFIG_BYTES, b"\0")
