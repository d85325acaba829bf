"""Reads a store without a daemon: whole images out of it, single objects for people, blocks for comparison.

Shares no reading code with ``reading``, so that one can check the other. Used by ``cli`` and by shadow
verify in ``host``.
"""
