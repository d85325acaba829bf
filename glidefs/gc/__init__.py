"""Deletes objects that no root has named for a grace period.

``mark`` finds what is named, ``run`` has the rules and deletes. Works on a store alone. Used by ``cli``.
"""
