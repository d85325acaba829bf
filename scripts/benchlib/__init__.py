"""Benchmarks of GlideFS beside other servers; `scripts/bench --help` says which."""
