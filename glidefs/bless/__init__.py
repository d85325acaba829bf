"""Turns an image into a base: reads it, cuts it into packs, uploads and publishes them; resumes after an
interruption.

Used by ``cli`` and ``exports``. Needs the store and ``bases``, no daemon.
"""
