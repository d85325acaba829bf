"""``scripts/layers`` sees what points the wrong way."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TREES = {
    "right": ({"glidefs/host/a.py": "from glidefs.store import base\n"}, ""),
    "up": ({"glidefs/store/a.py": "from glidefs.host import host\n"}, "store uses host"),
    "up, late": ({"glidefs/store/a.py": "def f():\n    import glidefs.host.host\n"}, "store uses host"),
    "unknown": ({"glidefs/other/a.py": "from glidefs.store import base\n"}, "other has no layer"),
    "header up": ({"csrc/log/a.c": '#include "volume/volume.h"\n'}, "log uses volume"),
    "beside": ({"csrc/log/a.c": '#include "cache/block_cache.h"\n'}, "log uses cache"),
    "circle": (
        {
            "glidefs/host/a.py": "from glidefs.host.b import x\n",
            "glidefs/host/b.py": "from glidefs.host.a import y\n",
        },
        "a circle: glidefs.host.a, glidefs.host.b",
    ),
    "circle of modules by name": (
        {
            "glidefs/host/a.py": "from glidefs.host import b\n",
            "glidefs/host/b.py": "def f():\n    from glidefs.host import a\n",
        },
        "a circle: glidefs.host.a, glidefs.host.b",
    ),
    "only types": (
        {
            "glidefs/host/a.py": "from glidefs.host.b import x\n",
            "glidefs/host/b.py": "if TYPE_CHECKING:\n    from glidefs.host.a import y\n",
        },
        "",
    ),
}


def check(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([root / "scripts/layers"], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("tree", TREES)
def test_what_points_the_wrong_way(tmp_path: Path, tree: str) -> None:
    files, said = TREES[tree]
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/layers", tmp_path / "scripts/layers")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = check(tmp_path)
    assert (done.returncode, said in done.stdout) == (bool(said), True), done.stdout + done.stderr


def test_this_tree() -> None:
    assert check(ROOT).returncode == 0


def test_no_two_helpers_of_tests_share_a_name() -> None:
    """They are imported by their names, from whichever directory is first in the path."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == ["conftest.py"]
