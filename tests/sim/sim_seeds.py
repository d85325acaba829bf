"""Seeds that failed once, and what they found."""

from __future__ import annotations

REGRESSIONS: dict[int, str] = {
    132: "a fork whose first put was answered too late, taken over by another node and removed there, was "
    "put again by its old node once the name was free",
}
