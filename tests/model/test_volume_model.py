"""Two hosts and a store against the model: see volume_machine.py."""

from __future__ import annotations

from model_length import model_test
from volume_machine import VolumeMachine

test_volume_model = model_test(VolumeMachine, 25, quick=15, normal=180, long=10000)
