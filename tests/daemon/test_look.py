"""`list` and `show` without Typer mean what they mean with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glidefs.cli import look, main

ROOT = Path(__file__).resolve().parents[2]
WORDS = st.sampled_from(
    ["list", "show", "a", "b", "", "--json", "-c", "--config", "f", "-", "--", "-h", "--store", "-cf"]
)


def means(run: Any, args: list[str]) -> list[Any]:
    """What ``run`` calls for these words."""
    called: list[Any] = []

    def listed(config: str | None, as_json: bool, view: look.View = look.ALL) -> None:
        called.append(("list", config, as_json, view))

    with (
        mock.patch.object(look, "list_exports", listed),
        mock.patch.object(look, "show", lambda *given: called.append(("show", *given))),
    ):
        run(args)
    return called


def through_typer(args: list[str]) -> None:
    app = main.app
    commands, groups = app.registered_commands, app.registered_groups
    try:
        with pytest.raises(SystemExit) as end:
            main.run_command(args)
        assert not end.value.code, f"{args} is an error of usage"
    finally:
        app.registered_commands, app.registered_groups = commands, groups


@given(st.sampled_from(["list", "show"]), st.lists(WORDS, max_size=5))
@example("list", ["--json", "-c", "f"])
@example("show", ["a", "--config", "f", "--json"])
@example("show", ["--json", "--json", "a"])
def test_what_is_carried_out_at_once_is_what_typer_makes_of_it(command: str, words: list[str]) -> None:
    args = [command, *words]
    at_once = means(look.looked, args)
    if at_once:
        assert at_once == means(through_typer, args)


@pytest.mark.parametrize("args", [["list"], ["list", "--json"], ["show", "a"], ["show", "-c", "f", "a"]])
def test_the_plain_commands_do_not_wait_for_typer(args: list[str]) -> None:
    assert means(look.looked, args)


@pytest.mark.parametrize(
    "args",
    [["list", "x"], ["show"], ["show", "a", "b"], ["list", "-c"], ["list", "--help"], ["list", "--store"]],
)
def test_all_else_is_left_to_typer(args: list[str]) -> None:
    assert look.looked(args) is False


def test_typer_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom glidefs.__main__ import main\n"
        "try: main()\nexcept SystemExit as end: sys.exit(3 if 'typer' in sys.modules else end.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "list"],
        env={"GLIDEFS_SOCKET": str(tmp_path / "none"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "no daemon answers" in done.stderr
