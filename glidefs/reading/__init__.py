"""Gets blocks that guests wait for: from the fault in the core to the block in its cache.

``service`` takes faults and has the threads, ``reader`` finds what shows in a block, ``plan`` assembles
it, ``fetch`` gets the bytes. Used by ``host`` and ``compaction``. Knows no export, and of writing
nothing.
"""
