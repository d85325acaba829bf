"""Seeds that failed once, and what they found."""

from __future__ import annotations

REGRESSIONS: dict[int, str] = {}
