"""Checks of a host, with and without a daemon. It creates nothing.

Used by ``cli``.
"""
