"""Manifests: views of them, and the only place where a root changes.

``view`` loads pages and indices through caches, ``edit`` makes the next root, ``commit`` puts it under
the rules of ``lease``, ``local`` keeps its copy here; ``roots`` creates and takes over. Used by all
above. Knows no volume that is served, no thread and no log but its digest.
"""
