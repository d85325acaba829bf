"""Manifests: views of them, and the only place where a root changes.

``view`` loads pages and indices through caches, ``edit`` makes the next root, ``commit`` puts it under the
rules of ``lease``, ``local`` keeps its copy here. Used by all above. Knows no served volume, no thread, and
no log except its digest.
"""
