"""A running daemon gives its exports to a new process: see docs/handoff.md."""
