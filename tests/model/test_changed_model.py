"""What changed since a snapshot, against the model: see changed_machine.py."""

from __future__ import annotations

from changed_machine import ChangedMachine
from model_length import model_test

test_changed_model = model_test(ChangedMachine, 30, quick=15, normal=80, long=1000)
