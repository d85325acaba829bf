"""The control plane: HTTP on a Unix socket, the same verbs as the command line; and its client.

Turns requests into calls of an :class:`~glidefs.exports.router.ExportRouter`. Used by ``daemon``,
``doctor`` and ``cli``. Knows no volume, no transport and nothing of the store's layout.
"""
