"""The command line: a thin client of the daemon's control socket, and a few offline tools.

One file per group of commands. Nothing imports it.
"""
