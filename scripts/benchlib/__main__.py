"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from pathlib import Path

from benchlib.common import ROOT, BenchError, Settings, say, work_directory

SECTIONS = {
    "nbd": "NBD beside nbdkit (file, memory) and qemu-nbd: IOPS, bandwidth, CPU time per operation",
    "s3": "beside s3backer on the same SeaweedFS: cold reads, random writes until they are in the store",
    "cold": "cold reads from a store 0, 20 and 100 ms away, beside a client that only receives",
    "vhost": "vhost-user-blk beside qemu-storage-daemon and our own NBD socket",
    "holes": "reads of a 10 TiB volume without data beside reads of the log",
    "sustained": "random writes for 15 minutes over a log of 2 GiB",
    "upload": "CPU time and rate of uploads, beside the disk, raw PUTs and zstd -1",
    "forks": "500 forks of one base, made and read at once, from a store 20 ms away",
    "control": "list, /metrics and a start with up to 3,000 exports",
    "vm": "in a VM, /dev/ublkbN beside the kernel's loop driver and /dev/nbdN beside that of nbdkit",
    "cost": "bytes and PUTs that random writes cost at the store (about 25 minutes, 60 GB of disk)",
    "bless": "an image of a real file system becomes a base, beside zstd -1 -T2 over the same bytes",
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures GlideFS with its defaults beside other servers, in turns, and compares the "
        "medians. Prints tables; writes JSON and plots.",
        epilog="sections: " + "; ".join(f"{name}: {text}" for name, text in SECTIONS.items()),
    )
    made.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"{', '.join(SECTIONS)}, or all (default: nbd s3 vm)",
    )
    made.add_argument("--short", action="store_true", help="see that it works; the figures mean little")
    made.add_argument("--rounds", type=int, help="pairs per load (default 5; short: 1)")
    made.add_argument("--seconds", type=int, help="of each run (default 5; short: 1)")
    made.add_argument("--work", type=Path, metavar="DIR", help="for data (default: below TMPDIR or /var/tmp)")
    made.add_argument("--results", type=Path, default=ROOT / "bench-results", metavar="DIR")
    made.add_argument("--kernel", default="6.12", help="of the VM (default %(default)s)")
    made.add_argument("--check", action="store_true", help="exit with status 1 if a goal is missed")
    made.add_argument("--no-install", action="store_true", help="install nothing, use what is there")
    return made


def main() -> int:
    """Run the sections one after the other; one that cannot run does not stop the others."""
    options = parser()
    args = options.parse_args()
    chosen = args.sections or ["nbd", "s3", "vm"]
    if chosen == ["all"]:
        chosen = list(SECTIONS)
    for name in chosen:
        if name not in SECTIONS:
            options.error(f"no section {name}: choose from {', '.join(SECTIONS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed, missed = [], []
    for name in chosen:
        module = importlib.import_module(f"benchlib.{name}")
        try:
            with work_directory(args.work) as work:
                report = module.run(
                    Settings(
                        rounds=args.rounds or (1 if args.short else 5),
                        seconds=args.seconds or (1 if args.short else 5),
                        short=args.short,
                        work=work,
                        results=args.results,
                        kernel=args.kernel,
                    )
                )
        except BenchError as error:
            say(f"bench: {name}: {error}")
            failed.append(name)
            continue
        except KeyboardInterrupt:
            return 130
        report.print()
        report.write(args.results)
        missed += report.missed
    if failed:
        say(f"bench: could not run: {', '.join(failed)}")
        return 1
    return 1 if missed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
