"""Deletes what no root names any more, a grace later.

``mark`` finds what is named, ``run`` has the rules and deletes. Works on a store alone. Used by ``cli``.
"""
