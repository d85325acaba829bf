"""Volumes, forks, copies and gc on two nodes against the model: see fork_machine.py."""

from __future__ import annotations

from fork_machine import ForkMachine
from model_length import model_test

test_fork_model = model_test(ForkMachine, 30, quick=15, normal=180, long=10000)
