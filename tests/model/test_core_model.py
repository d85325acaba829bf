"""The core against the model: see core_machine.py."""

from __future__ import annotations

from core_machine import CoreMachine
from model_length import model_test

test_core_model = model_test(CoreMachine, 40, quick=60, normal=400, long=20000)
