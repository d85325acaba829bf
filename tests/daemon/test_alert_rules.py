"""Alert rules and the Grafana board name metrics that a daemon has, in either form of /metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from daemon_harness import ROOT, Daemon

pytest.importorskip("glidefs.core._core")

from glidefs.api import wire

yaml = pytest.importorskip("yaml")

RULES = ROOT / "packaging" / "prometheus" / "glidefs.rules.yml"
BOARD = ROOT / "packaging" / "grafana" / "glidefs.json"
METRIC = re.compile(r"\bglidefs_\w+")
LABELS = re.compile(r"\b(?:by|without) \(([^)]*)\)|[{,]\s*(\w+)\s*(?:=~|!~|!=|=)")
FROM_SCRAPES = {"instance", "job"}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[str]:
    """Of all panels, with the names of Grafana's variables filled in."""
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [query.replace("$__rate_interval", "5m").replace("$instance", ".*") for query in found]


def named_labels(query: str) -> set[str]:
    found = set()
    for grouped, matched in LABELS.findall(re.sub(r'"[^"]*"', '""', query)):
        found |= {name.strip() for name in grouped.split(",") if name.strip()} | ({matched} - {""})
    return found


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")
@pytest.mark.parametrize("detailed", ["true", "false"])
def test_what_is_named_exists(make_daemon: Callable[..., Daemon], detailed: str) -> None:
    daemon = make_daemon(extra='[debug]\nshadow_dir = "shadow"\n')
    daemon.config.write_text(
        daemon.config.read_text().replace("export_metrics = true", f"export_metrics = {detailed}")
    )
    daemon.start()
    daemon.client.call("PUT", "/api/exports/v1", {"size": "16MiB", "transport": "nbd"})
    daemon.io("v1", "write -P 1 0 1M", "read -P 1 0 1M")
    daemon.json("drain", "v1")
    _, data = wire.request(daemon.client.path, "GET", "/metrics", headers={"Cache-Control": "no-cache"})
    text = data.decode()
    # Single exports are named only where they are fenced or fail, so not here.
    known = set(METRIC.findall("\n".join(line for line in text.splitlines() if line[:1] != "#")))
    known |= {match[1] for match in re.finditer(r"^# TYPE (\S+) gauge", text, re.MULTILINE)}
    labels = (
        set(re.findall(r'[{,](\w+)="', text)) | FROM_SCRAPES | ({"export"} if detailed == "false" else set())
    )
    for query in [*(rule["expr"] for rule in rules()), *queries()]:
        metrics = set(METRIC.findall(query))
        assert metrics or query.startswith("up{"), query
        assert metrics <= known, f"{query}: {metrics - known}"
        assert named_labels(query) <= labels, f"{query}: {named_labels(query) - labels}"
    assert re.search(r'^glidefs_build_info\{version="[^"]+",commit="[^"]+"\} 1$', text, re.MULTILINE)
    took = [
        line.split() for line in text.splitlines() if line.startswith("glidefs_store_request_seconds_total")
    ]
    assert sum(float(value) for _, value in took) > 0


def test_each_alert_says_what_to_do_and_where_to_read() -> None:
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found) >= 15
    for rule in found:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"].startswith("{{ $labels.instance }}: ")
        assert rule["annotations"]["action"]
        document, _, anchor = rule["annotations"]["runbook"].partition("#")
        text = (ROOT / document).read_text(encoding="utf-8")
        headings = [
            re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in text.splitlines()
            if line[:1] == "#"
        ]
        assert anchor in headings, rule["alert"]


def test_the_board_is_whole() -> None:
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} covers another panel"
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert {one["name"] for one in board["templating"]["list"]} == {"datasource", "instance"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_them(tmp_path: Any) -> None:
    board = {
        "groups": [
            {
                "name": "board",
                "rules": [{"record": f"board:q{n}", "expr": q} for n, q in enumerate(queries())],
            }
        ]
    }
    (tmp_path / "board.yml").write_text(json.dumps(board))
    for path in (RULES, tmp_path / "board.yml"):
        done = subprocess.run(
            ["promtool", "check", "rules", path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
