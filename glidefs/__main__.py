"""`python -m glidefs`: the same as the program `glidefs`."""

from glidefs.cli.main import main

main()
