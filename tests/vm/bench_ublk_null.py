"""What the ublk driver itself costs: IOPS of the null target in its buffer modes.

    vm-test/run --kernel 6.12 -- python tests/vm/bench_ublk_null.py [ROUNDS [SECONDS]]

fio, libaio, 4 KiB at depth 32 and 128 KiB at depth 8, one job, one queue. The modes take turns, round by
round, and the median is reported with the extremes: machines are noisy, and under emulated CPUs only
ratios mean something. "bare" answers requests without moving a byte: the floor of what the driver takes.
"file" answers reads from a file in the page cache, as log and block cache are; "file, registered" does
so without a copy of ours, by automatic buffer registration (Linux 6.16). Writes are copied in both: who
keeps a hash of what was written must look at it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from null_server import NullServer, blockers, build, control

MODES = {"user copy": [], "copy": ["--copy"], "bare": ["--bare"]}
FILE_BYTES = 512 << 20
AUTO_BUF_REG = 1 << 11
LOADS = [("randread", "4k", 32), ("randwrite", "4k", 32), ("randread", "128k", 8), ("randwrite", "128k", 8)]


def fio(device: Path, rw: str, block: str, depth: int, seconds: str) -> float:
    options = {
        "name": "null", "filename": device, "rw": rw, "bs": block, "iodepth": depth, "ioengine": "libaio",
        "direct": 1, "time_based": 1, "runtime": seconds, "ramp_time": 1, "size": "512M", "randrepeat": 0,
        "norandommap": 1, "thread": 1, "output-format": "json",
    }  # fmt: skip
    command = ["fio", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["write" if "write" in rw else "read"]["iops"])


def main() -> int:
    if reason := blockers():
        print(f"cannot run: {reason}", file=sys.stderr)
        return 2
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    seconds = sys.argv[2] if len(sys.argv) > 2 else "2"
    figures: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        program = build(Path(directory))
        modes = dict(MODES)
        backing = Path(os.environ.get("GLIDEFS_VM_SCRATCH", directory)) / "backing"
        with backing.open("wb") as file:
            for _ in range(FILE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        modes["file"] = ["--file", str(backing)]
        if int(control(program, "features"), 16) & AUTO_BUF_REG:
            modes["file, registered"] = [*modes["file"], "--auto"]
        for _ in range(rounds):
            for mode, options in modes.items():
                server = NullServer(program, "add", "0", *options)
                for i, load in enumerate(LOADS):
                    figures.setdefault((mode, i), []).append(fio(server.device, *load, seconds))
                server.stop()
        print(f"Linux {os.uname().release}, features {control(program, 'features').strip()}, {rounds} rounds")
    print(
        f"{'IOPS: median (least-most)':<26}" + "".join(f"{rw[4:]} {bs} x{d}".rjust(25) for rw, bs, d in LOADS)
    )
    for mode in modes:
        runs = [figures[mode, i] for i in range(len(LOADS))]
        cells = [f"{statistics.median(x):.0f} ({min(x):.0f}-{max(x):.0f})" for x in runs]
        print(f"{mode:<26}" + "".join(cell.rjust(25) for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
