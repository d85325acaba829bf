"""Seeds that failed once, and what they found.

What a seed does changes with the code, so each finding has a test of its own, too.
"""

from __future__ import annotations

IDENTITY_REGRESSIONS: dict[int, str] = {
    4: "an older root, which this host had put once, was adopted as its own lost answer when the store "
    "went back",
    8: "a nonce from before a host was cloned was used again while the disk took no other: its clone adopted "
    "the commit, and with it other data than its own",
    184: "a drain with nothing to upload said that the store has all, which had gone back and was known to",
    213: "a volume that a host and its clones had not put yet was put and written by a clone; the host "
    "removed it",
    2219: "the root that a clone had put was taken at a start for a log that had lost what a failed sync "
    "covered",
}
"""The same with clones and swapped stores (``--identity``)."""

REGRESSIONS: dict[int, str] = {
    132: "a fork whose first put was answered too late, taken over by another node and removed there, was "
    "put again by its old node once the name was free",
    762: "a crash before the root of a fork of a volume was put left a record of it: it was put after the "
    "start, when nothing kept any more what it names",
    1481: "the compaction of a volume was committed, a crash came before the local copy of its root, and "
    "the volume, with nothing to upload, was served by the old one, whose packs gc deleted",
    3589: "the file of nonces was made by a write that failed, and its name not synced by the next one, "
    "which succeeded: a power cut took it, and the host did not know the root that it had put",
    3637: "the local copy of a root had its name, but a crash came before that was synced; the next process "
    "took it for durable and gave log space back, and a power cut left neither",
    3402: "a first root and a commit after it were put while the disk took no small file; after a crash the "
    "host asked the store to take the first one again and took what it found for a clone's",
    4601: "gc deleted a pack that only forks under way held at two of its runs a grace apart, and that was "
    "named in between, but at no run: the volume that named it was removed before the fork's root was put",
    5894: "a commit was put while the disk took no small file, and the volume was closed then: its host took "
    "that for another's, and neither removed nor attached it",
    9335: "a volume that was removed elsewhere before its node knew that the store had it: fenced, and after "
    "a restart, when the tombstone was gone, put again",
}
