"""GlideFS: fast local disks backed by an object store."""
