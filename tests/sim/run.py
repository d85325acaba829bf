"""Replay seeds of the simulation: ``python -m tests.sim.run SEED [SEED...] [--identity] [--quiet]``.

With ``--count N`` the seeds from SEED on. Shows the trace of a seed that fails, with ``--trace`` of all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
for directory in (".", "core", "volume", "forks", "gc", "model", "sim"):
    sys.path.insert(0, str(TESTS / directory))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--identity", action="store_true", help="with clones and swapped stores")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    options = parser.parse_args()
    from simulation import simulate

    counts: Counter[str] = Counter()
    failed = []
    began = time.monotonic()
    seeds = [seed + i for seed in options.seeds for i in range(options.count)]
    for seed in seeds:
        try:
            result = simulate(seed, keep_trace=options.trace or not options.quiet, identity=options.identity)
        except Exception as error:
            failed.append(seed)
            if options.quiet:
                print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            else:
                import traceback

                traceback.print_exc()
            if options.stop:
                break
            continue
        counts += result.counts
        if options.trace:
            print("\n".join(result.trace))
        if not options.quiet:
            print(f"seed {seed}: ok, {result.digest[:16]}")
    print(f"{len(seeds)} seeds in {time.monotonic() - began:.1f} s, failed: {failed}")
    for name, count in sorted(counts.items()):
        print(f"{count:8} {name}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
