"""From a sealed segment to a commit: which volume is next, which of its data goes into packs, and when the
log shrinks.

``scheduler`` has the threads, ``upload`` does one round, ``retire`` and ``throttle`` keep the log small, and
``pace`` keeps background work from guests. Used by ``host`` and ``compaction``. Knows no export and no
transport.
"""
