"""stub"""

from msgspec.structs import replace

from glidefs.errors import *
from glidefs.formats.manifest import *
from glidefs.names import base_manifest_key


def read_base(store, prefix, base):
    key = base_manifest_key(prefix, base)
    try:
        found = store.get(key)
    except NotFound:
        raise UnknownExport(base, f"prefix {prefix} has no base of that name") from None
    root = decode_root(key, found.data)
    if root.removed_at:
        raise UnknownExport(base, "the base was removed")
    return root, found.etag, manifest_hash(found.data)


def base_root(root, name):
    return replace(root, name=name, log_id=NO_ID, owner_node="", last_segment=0, epoch=0, read_only=True)


def publish_base(store, prefix, root):
    return store.put(base_manifest_key(prefix, root.name), encode_root(root), if_none_match=True)
