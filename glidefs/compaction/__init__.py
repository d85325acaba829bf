"""Packs of a volume are merged in the background, so that reads touch few of them and deleted data costs
nothing.

``plan`` decides, ``merge`` makes the new pack, ``compactor`` has the thread. Commits through
``writing.upload``. Used by ``host``. Knows no transport and no export.
"""
