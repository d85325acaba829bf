"""Holes against the model: see hole_machine.py."""

from __future__ import annotations

from hole_machine import HoleMachine
from model_length import model_test

test_hole_model = model_test(HoleMachine, 40, quick=100, normal=400, long=20000)
