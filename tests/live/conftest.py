"""Tests of what is computed from counters: no daemon, no core's engine."""
