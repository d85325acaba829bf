"""A pytest plugin for sanitizer runs: programs that tests start must not inherit the preloaded sanitizer.

qemu's coroutines hang under it. For `pytest -p tests.scripts.without_preload`.
"""

from __future__ import annotations

import os

os.environ.pop("LD_PRELOAD", None)
