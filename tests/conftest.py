"""Makes the helpers that lie beside it importable by every test: pytest puts its directory on the path."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("beside others", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("beside others")  # an example may take long where other tests have the CPUs

HERE = Path(__file__).parent
OUTER = {"acceptance", "daemon", "handoff", "mutations", "packaging", "sim"}
"""Directories of tests that start daemons or are as slow: the inner loop leaves them out."""
OUTER_TESTS = {line for line in (HERE / "outer_tests.txt").read_text().splitlines() if line[:1] != "#"}
SMOKE = {
    "test_restart_serves_the_same_exports",
    "test_detach_and_attach_elsewhere",
    "test_a_connection_is_not_reset",
}
"""Tests of those directories that it has."""
LONGEST = (
    "test_changed_model",
    "test_volume_model",
    "test_core_model",
    "test_fork_model",
    "test_either_side_stops_longer_than_the_other_waits",
    "test_a_hostile_driver",
    "test_one_mutation",
    "test_any_history_reads_like_a_byte_array",
    "test_no_false_alarm_under_everything_at_once",
    "test_a_transport_of_its_own",
    "test_handoffs_under_verify",
    "test_remove_of_a_fenced_export_leaves_the_store_alone",
    "test_cost_of_random_writes_over_a_full_volume",
    "test_handoffs_under_load",
    "test_kill_at_any_moment_of_create_and_remove",
    "test_a_disk_that_is_smaller_than_the_log",
    "test_an_outage_from_the_first_start_on",
    "test_seeds",
    "test_seeds_of_clones_and_stores",
)
"""Run first where tests are dealt out one by one, so that none of them is waited for alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.name.partition("[")[0], len(places)))
    for item in items:
        directory = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
        name = item.name.partition("[")[0]
        if name in OUTER_TESTS or (directory in OUTER and name not in SMOKE):
            item.add_marker("outer")
