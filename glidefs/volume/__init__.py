"""One volume: the core's handle, its manifest, its log directory, its state for people.

Used by ``reading`` and all above. Knows no thread and no transport.
"""
