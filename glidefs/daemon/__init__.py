"""The life of the process: from a configuration to a daemon that serves, hands over, and ends.

Owns everything that the packages below need one of per process. Used by ``cli`` and ``doctor``. What a
verb does is not here (``exports``), nor how a handoff goes (``handoff``).
"""
