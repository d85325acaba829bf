"""A newcomer who has the documents and nothing else: a backup by snapshot, restored on a second host.

Only the text of the section is used: its blocks are run, and what it promises that they print is compared.
The two hosts are two daemons with one store. The database is SQLite in a file system that goes over NBD:
PostgreSQL on a mounted device needs root and a driver.
"""

from __future__ import annotations

import re

import pytest
from doc_blocks import ROOT, Block, blocks_of, missing, run_blocks

pytest.importorskip("glidefs.core._core")
PAGE = ROOT / "docs" / "tutorials" / "postgresql.md"
PROGRAMS = ("sqlite3", "mke2fs", "debugfs", "e2fsck", "nbdcopy")


@pytest.fixture
def section() -> list[Block]:
    """The blocks of the section, on a machine that has what it says it needs."""
    found = re.search(r"^## Rehearse it without root$(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert found is not None, "the section is gone"
    blocks = blocks_of(found[1])
    if absent := missing(blocks, PROGRAMS):
        pytest.skip(f"not installed: {', '.join(absent)}")
    return blocks


def test_a_newcomer_restores_a_database_on_a_second_host(section: list[Block]) -> None:
    promised = [block.prints for block in section if block.prints is not None]
    assert promised == ["ok\nfirst\nsecond\n", "0\n"]
    run_blocks(section)


def test_the_newcomer_would_notice_a_backup_that_is_not_one(section: list[Block]) -> None:
    """The tag moved to the state after the mistake: what is promised is not printed."""
    late = [
        b._replace(code=b.code.replace("on a drain", "on a snapshot shop --tag nightly; on a drain"))
        for b in section
    ]
    assert late != section
    with pytest.raises(AssertionError, match="printed"):
        run_blocks(late)
