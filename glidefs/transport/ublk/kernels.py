"""Kernel releases that crash when a ublk device is added.

Linux 6.19 allocates the queues of a ublk device by NUMA node (commit 529d4d632788), which needs the tag set
to be made before them (011af85ccd87, of the same series). Where only the first was backported the driver
follows a null pointer in `ublk_init_queues` on every ADD_DEV: the command never returns, the driver's lock
stays taken, and some hosts panic. Only the kernel's release shows it, so that is judged here, before the
first command.

How it is known: 6.18.4 and 6.18.5 carry the one and 6.18.6 both (stable releases; zabbly/linux 52, kvcache-
ai/AgentENV 20). Ubuntu's 6.17.0-N kernels take patches of later stable releases; 1015 and 1018 of azure and
1017 of aws oops (actions/runner-images 14175, longhorn 13509), and which N has the fix is not published, so
all are refused. The kernel series 6.17 of kernel.org ended before the backport. Debian's 6.12 never had it
and its 6.18.15 has both; the tests of whole devices (`tests/vm`) run on these two.
"""

from __future__ import annotations

import re
from typing import Literal

from msgspec import Struct

GOOD_KERNELS = "Linux 6.18.6 or later, or 6.12, has a sound driver"


class Verdict(Struct, frozen=True):
    """What is known about the ublk driver of a kernel, and why, as a part of a sentence."""

    kind: Literal["good", "bad", "unknown"]
    why: str


def ublk_verdict(release: str) -> Verdict:
    """Judge a kernel by its release, as ``uname -r`` prints it."""
    match = re.match(r"(\d{1,4})\.(\d{1,5})(?:\.(\d{1,5}))?(?![\d])(.*)", release, re.ASCII | re.DOTALL)
    if match is None:
        return Verdict("unknown", f"the release {release[:80]!r} names no version")
    version, patch, rest = (int(match[1]), int(match[2])), int(match[3] or 0), match[4]
    if version not in ((6, 17), (6, 18)):
        return Verdict("good", "the change is not in it" if version < (6, 17) else "the fix is in it")
    if re.search(r"[-.]rc\d", rest):
        return Verdict("good", "the change is not in it")
    distributed = patch == 0 and re.match(r"-\d", rest) is not None
    if version == (6, 17):
        if patch == 0:
            return Verdict("bad", "kernels named 6.17.0 got a change of the driver without its fix")
        if "pve" in rest:
            return Verdict("unknown", "it is made of Ubuntu's 6.17.0, which got a change without its fix")
        return Verdict("good", "the change is not in it")
    if patch in (4, 5):
        return Verdict("bad", "6.18.4 and 6.18.5 have a change of the driver without its fix")
    if distributed:
        return Verdict("unknown", "the patches in a 6.18.0 of a distribution do not show in its name")
    return Verdict("good", "the change is not in it" if patch < 4 else "the fix is in it")


def ublk_refused(release: str, allowed: str | None = None) -> str | None:
    """Why ublk is not used on this kernel, with the remedy; None if it is.

    ``allowed`` is the release that the operator vouches for ([ublk] allow_kernel).
    """
    verdict = ublk_verdict(release)
    if verdict.kind == "good" or release == allowed:
        return None
    harm = "adding a device oopses" if verdict.kind == "bad" else "adding a device may oops"
    return (
        f"{harm} on Linux {release[:80]} ({verdict.why}): {GOOD_KERNELS}; "
        f"if this one was fixed, set [ublk] allow_kernel to its release"
    )
