"""Two hosts and a store against the model: see volume_machine.py."""

from __future__ import annotations

from model_length import sized
from volume_machine import VolumeMachine

TestVolumeModel = sized(VolumeMachine.TestCase, 25, quick=15, normal=300, long=10000)
