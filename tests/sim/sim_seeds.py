"""Seeds that failed once, and what they found.

What a seed does changes with the code, so each finding has a test of its own, too.
"""

from __future__ import annotations

REGRESSIONS: dict[int, str] = {
    132: "a fork whose first put was answered too late, taken over by another node and removed there, was "
    "put again by its old node once the name was free",
    762: "a crash before the root of a fork of a volume was put left a record of it: it was put after the "
    "start, when nothing kept any more what it names",
    1481: "the compaction of a volume was committed, a crash came before the local copy of its root, and "
    "the volume, with nothing to upload, was served by the old one, whose packs gc deleted",
    3637: "the local copy of a root had its name, but a crash came before that was synced; the next process "
    "took it for durable and gave log space back, and a power cut left neither",
    4601: "gc deleted a pack that only forks under way held at two of its runs a grace apart, and that was "
    "named in between, but at no run: the volume that named it was removed before the fork's root was put",
    9335: "a volume that was removed elsewhere before its node knew that the store had it: fenced, and after "
    "a restart, when the tombstone was gone, put again",
}
