"""The program `glidefs`, and `python -m glidefs`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command that the arguments name."""
    args = sys.argv[1:]
    if hasattr(signal, "SIGPIPE") and args[:1] != ["run"]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    from glidefs.cli.look import looked

    if not looked(args):
        from glidefs.cli.main import run_command

        run_command(args)


if __name__ == "__main__":
    main()
