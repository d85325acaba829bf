"""Volumes, forks, copies and gc on two nodes against the model: see fork_machine.py."""

from __future__ import annotations

from fork_machine import ForkMachine
from model_length import sized

TestForkModel = sized(ForkMachine.TestCase, 30, quick=50, normal=2000, long=10000)
