"""All volumes that this process serves, wired to the threads and caches that they share.

The only place that knows ``volume``, ``reading``, ``writing`` and ``compaction`` together. Used by
``exports``. Knows no transport and no export.
"""
