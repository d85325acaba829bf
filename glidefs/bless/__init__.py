"""An image becomes a base: it is read, cut into packs, uploaded and published, and goes on after an
interruption.

Used by ``cli`` and ``exports``. Needs the store and ``bases``, no daemon.
"""
