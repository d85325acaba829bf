"""Bytes in the store and on disk. Nothing in here does I/O but the two local-file helpers."""
