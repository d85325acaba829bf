"""A running daemon gives its exports to a new process: see docs/handoff.md.

Used by ``daemon``, whose parts it gets through protocols.
"""
