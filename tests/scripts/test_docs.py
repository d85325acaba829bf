"""The documents say what the code does: commands, settings, files, links."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from glidefs.cli import manual
from glidefs.cli.template import TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def documented_commands() -> list[tuple[str, str]]:
    """Every line in a fenced block, or in backquotes, that begins with `glidefs `."""
    found: list[tuple[str, str]] = []
    for path in DOCUMENTS:
        if path.name == "cli.md":
            continue
        content = path.read_text(encoding="utf-8")
        for block in re.findall(r"```(?:sh|bash)?\n(.*?)```", content, re.DOTALL):
            found += [(path.name, line) for line in block.splitlines() if line.startswith("glidefs ")]
        found += [(path.name, code) for code in re.findall(r"`(glidefs [^`]+)`", content)]
    return found


def test_manual_is_that_of_the_commands() -> None:
    run = "run: python -m glidefs.cli.manual docs/cli.md"
    assert text("docs/cli.md") == manual.markdown(), run


def test_each_command_has_a_man_page(tmp_path: Path) -> None:
    """Which groff takes without a word, where it is installed."""
    manual.main(str(tmp_path))
    pages = {path.stem for path in tmp_path.iterdir()}
    assert pages == {"glidefs", *(name.replace(" ", "-") for name in manual.commands())}
    assert "eight at a time" in (tmp_path / "glidefs.1").read_text()
    assert r"\fB\-\-shrink\fR" in (tmp_path / "glidefs-resize.1").read_text()
    for page in sorted(tmp_path.iterdir()) if shutil.which("groff") else ():
        done = subprocess.run(
            ["groff", "-man", "-ww", "-z", "-Tutf8", str(page)], capture_output=True, text=True, check=True
        )
        assert done.stderr == "", page.name


def test_documents_use_commands() -> None:
    assert len(documented_commands()) > 20


@pytest.mark.parametrize(("document", "line"), sorted(set(documented_commands())))
def test_commands_in_documents_exist(document: str, line: str) -> None:
    words = shlex.split(line.split("#")[0].rstrip("& \n"))
    known = manual.commands()
    if words[1:] == ["--version"]:
        return
    name = " ".join(words[:3]) if " ".join(words[:3]) in known else " ".join(words[:2])
    assert name in known or name == "glidefs logs", f"{document}: {line}"
    if name not in known:
        return
    options = {o for p in known[name].params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-?\d.*", word):
            assert word.split("=")[0] in options, f"{document}: {line}: no option {word}"


def test_settings_are_those_of_the_template() -> None:
    """Section, key and default of every setting, in both directions."""
    from_template: dict[str, str] = {}
    section = ""
    for line in TEMPLATE.splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
        elif match := re.match(r"#?(\w+) = (\"[^\"]*\"|\[[^\]]*\]|\S+)", line):
            from_template[f"{section}.{match[1]}"] = match[2]
    documented: dict[str, str] = {}
    for line in text("docs/operations.md").splitlines():
        if match := re.match(r"### \[(\w+)\]", line):
            section = match[1]
        elif line.startswith("## "):
            section = ""
        elif section and (match := re.match(r"\| `([\w.]+)` \| (.+?) \|", line)):
            key = match[1] if "." in match[1] else f"{section}.{match[1]}"
            documented[key] = match[2]
    assert set(documented) == set(from_template)
    for key, default in documented.items():
        if default.startswith("`") and default.endswith("`"):
            assert default.strip("`") == from_template[key], key


def test_metrics_in_the_documents_exist() -> None:
    named = set(re.findall(r"`glidefs_(\w+)`", "".join(p.read_text(encoding="utf-8") for p in DOCUMENTS)))
    source = text("glidefs/daemon/metrics.py")
    for name in named:
        assert f'"{name.removesuffix("_total")}"' in source or f'"glidefs_{name}"' in source, name


def test_the_map_of_files_is_complete() -> None:
    """Each folder has a row, which names each of its files; what a row names is there."""
    rows = dict(
        re.findall(
            r"^\| `([\w./]+?)/?`[^|]*\| (.+) \|$", text("ARCHITECTURE.md").split("## Concurrency")[0], re.M
        )
    )
    folders = {path.parent for path in [*(ROOT / "csrc").rglob("*.c"), *(ROOT / "glidefs").rglob("*.py")]}
    for folder in sorted(folders):
        name = folder.relative_to(ROOT).as_posix()
        row = (
            rows.get(name)
            or rows.get(name.removeprefix("glidefs/"))
            or rows[name.removeprefix("glidefs/").split("/")[0]]
        )
        for path in [*folder.glob("*.c"), *folder.glob("*.py")]:
            assert path.name == "__init__.py" or f"`{path.name}`" in row, (
                f"{name}: {path.name} is not in the map"
            )
    there = {path.name for top in ("csrc", "glidefs") for path in (ROOT / top).rglob("*.*")}
    there |= {"setup.py", "_commit.py"}  # which only a checkout of git makes
    for name in re.findall(r"`(\w+\.(?:[ch]|py))`", "".join(rows.values())):
        assert name in there, f"{name} is in the map only"


@pytest.mark.parametrize("document", [path.relative_to(ROOT).as_posix() for path in DOCUMENTS])
def test_links_and_paths_lead_somewhere(document: str) -> None:
    content = text(document)
    here = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#]+)\)", content):
        if "://" not in target:
            assert (here / target).exists(), f"{document}: {target}"
    for path in re.findall(r"`((?:csrc|glidefs|packaging|tests|scripts|vm-test|docs)/[\w./-]+)`", content):
        assert (ROOT / path).exists(), f"{document}: {path}"


SCRIPTS = ["scripts/quickstart", "scripts/test", "scripts/bench", "scripts/install-service"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_explain_themselves(script: str) -> None:
    done = subprocess.run([ROOT / script, "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert script in done.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/common.sh", ".ci/run"])
def test_scripts_parse(script: str) -> None:
    done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_refuse_unknown_options(script: str) -> None:
    options = ["--nonsense"] if script == "scripts/install-service" else ["--no-install", "--nonsense"]
    done = subprocess.run([ROOT / script, *options], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "--nonsense" in done.stderr


def test_readme_names_the_scripts() -> None:
    for script in SCRIPTS:
        assert f"{script}" in text("README.md")
