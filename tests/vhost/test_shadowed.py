"""Shadow verify of a volume whose guests write into the memory that they read to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from core_rig import BLOCK, CoreRig, pattern
from shadow_rig import Shadows
from vhost_rig import VhostRig


def test_a_guest_makes_no_differences(make_rig: Callable[..., CoreRig], tmp_path: Path) -> None:
    rig = make_rig()
    shadows = Shadows(rig)
    vol = shadows.vol(base={3: pattern(3, BLOCK)})
    vhost = VhostRig(rig, vol, tmp_path / "s").start()
    guest = vhost.front_end()
    with rig.hold():
        pending = guest.prepare(0, 3 * BLOCK // 512, room=4096)
        guest.submit(pending)
        guest.write(0, pattern(1, 4096))
    assert guest.finish(pending) == (0, pattern(3, BLOCK)[:4096])
    assert guest.read(0, 4096) == pattern(1, 4096)
    assert not shadows.differences
    assert vol.core.stats().shadow_compared
    vhost.close()
    shadows.close()
