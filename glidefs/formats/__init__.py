"""Bytes in the store and on disk. Nothing in here does I/O but the local-file helpers ``atomic`` and
``reserve``.

Used by everything; knows nothing but ``errors`` and ``names``.
"""
