"""The core against the model: see core_machine.py."""

from __future__ import annotations

from core_machine import CoreMachine
from model_length import sized

TestCoreModel = sized(CoreMachine.TestCase, 40, quick=60, normal=600, long=20000)
