"""From a sealed segment to a commit: which volume is next, what of it goes into packs, and when the log
shrinks.

``scheduler`` has the thread, ``upload`` does one round, ``plan`` and ``packing`` make its packs,
``retire`` and ``pace`` keep the log small. Used by ``host`` and ``compaction``. Knows no export and no
transport.
"""
