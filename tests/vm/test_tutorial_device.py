"""The tutorial of PostgreSQL as written, on devices of the kernel: a backup, restored by a second daemon.

Both hosts are this machine: two daemons with one store. There is no udev in the VM, so what its rule does,
`/dev/glidefs/NAME`, is done here.
"""

from __future__ import annotations

import os
import shutil

import pytest
from doc_blocks import ROOT, Block, blocks_of, run_blocks

PROGRAMS = ("/usr/lib/postgresql/15/bin/initdb", "psql", "runuser", "mkfs.ext4")
PLACES = ("device", "device, second host")
pytestmark = pytest.mark.skipif(
    not os.environ.get("GLIDEFS_VM"), reason="writes to /srv and /dev: only in the VM"
)

HOSTS = """
for host in a b; do
    mkdir $host
    command glidefs init $host/glidefs.toml --store "file://$PWD/store" \\
        --cache-dir "$PWD/$host/cache" --run-dir "$PWD/$host/run"
    sed -i "s/^#node = .*/node = \\"host-$host\\"/; s/^log_size.*/log_size = \\"512MiB\\"/" $host/glidefs.toml
    sed -i "s/^block_cache_size.*/block_cache_size = \\"256MiB\\"/" $host/glidefs.toml
    command glidefs run -c $host/glidefs.toml 2> $host/daemon.log &
done
for host in a b; do
    until GLIDEFS_CONFIG=$PWD/$host/glidefs.toml command glidefs list > /dev/null 2>&1; do sleep 0.2; done
done
glidefs() {
    command glidefs "$@"
    if [ "$1" = create ]; then
        mkdir -p /dev/glidefs
        device=$(command glidefs show "$2" --json | grep -o '/dev/[a-z]*[0-9]*' | head -n 1)
        ln -sfn "$device" "/dev/glidefs/$2"
    fi
}
top=$PWD
"""
FIRST = "export GLIDEFS_CONFIG=$top/a/glidefs.toml"
SECOND = "export GLIDEFS_CONFIG=$top/b/glidefs.toml"
END = """
for port in pg pg-restored; do
    runuser -u postgres -- /usr/lib/postgresql/15/bin/pg_ctl -D /srv/$port/data -m immediate stop > /dev/null
    umount /srv/$port
done
"""


def test_postgresql_is_backed_up_and_restored_as_written() -> None:
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"not installed: {', '.join(absent)}")
    page = (ROOT / "docs/tutorials/postgresql.md").read_text(encoding="utf-8")
    blocks = [block for block in blocks_of(page) if block.place in PLACES]
    assert [block.place for block in blocks] == ["device", "device", "device, second host"]
    run_blocks(
        [*blocks, Block(END, "", None)],
        prologue=HOSTS,
        before=dict(zip(PLACES, (FIRST, SECOND), strict=True)),
    )
