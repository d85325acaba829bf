"""The tutorials run as they are written: each block that is marked, in an empty directory, without root.

That of PostgreSQL is run by test_newcomer.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks_of, missing, run_blocks

pytest.importorskip("glidefs.core._core")
PROGRAMS = ("qemu-img", "qemu-io", "nbdcopy", "nbdinfo", "mke2fs", "debugfs", "e2fsck", "sqlite3")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "docs").rglob("*.md")
    if path.name != "postgresql.md"
    and any(not block.place for block in blocks_of(path.read_text(encoding="utf-8")))
)


def test_pages_have_blocks() -> None:
    assert {"docs/index.md", "docs/tutorials/qemu.md", "docs/tutorials/ci-runners.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_written(page: str) -> None:
    blocks = [b for b in blocks_of(Path(ROOT, page).read_text(encoding="utf-8")) if not b.place]
    if absent := missing(blocks, PROGRAMS):
        pytest.skip(f"not installed: {', '.join(absent)}")
    run_blocks(blocks)
