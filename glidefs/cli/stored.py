"""Commands on volumes as the store knows them: list them, and take over those of a lost host or disk."""

from __future__ import annotations

from typing import Any

from glidefs.api.client import Client, export_path
from glidefs.cli import output
from glidefs.errors import GlideError


def _stored(client: Client, prefix: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.call("GET", "/api/volumes", query={"prefix": prefix})
    return found


def list_stored(client: Client, prefix: str | None, as_json: bool) -> None:
    """Print the volumes of a prefix, with the verb that deals with each."""
    found = _stored(client, prefix)
    if as_json:
        output.emit(found)
        return
    rows = [
        [v["name"], output.size_text(v["size"]), v["owner_node"] or "-", v["owner_host"] or "-", _note_of(v)]
        for v in found
    ]
    output.table(["NAME", "SIZE", "NODE", "HOST", "NOTE"], rows, right=(1,))


def _note_of(volume: dict[str, Any]) -> str:
    """What there is to say about a volume in the store, and the verb that deals with it."""
    if volume["damaged"]:
        return str(volume["damaged"])
    if volume["removed_at"]:
        when = output.time_text(volume["removed_at"])
        return f"removed {when}; until gc deletes it: glidefs undelete NAME"
    if volume["served_here"]:
        return "served here"
    if volume["candidate"]:
        return "of another host with this node's name; if that host is lost: glidefs attach NAME --take-over"
    return "" if volume["owner_host"] else "free: glidefs attach NAME"


def attach_all(
    client: Client, node: str | None, prefix: str | None, wanted: dict[str, Any], as_json: bool
) -> None:
    """Attach what a node had; each that fails is one line, and the exit status says that some did."""
    chosen = [
        volume["name"]
        for volume in _stored(client, prefix)
        if not volume["served_here"]
        and not volume["removed_at"]
        and (volume["candidate"] if node is None else volume["owner_host"] and volume["owner_node"] == node)
    ]
    attached: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for name in chosen:
        try:
            status = client.call("POST", export_path(name, "attach"), wanted)
        except GlideError as error:
            failed.append({"name": name, "error": str(error)})
            output.say(f"{name}: {error}")
            continue
        attached.append(status)
        if not as_json:
            print(f"{status['name']}: {status['transport']} {status['device']}")
    if as_json:
        output.emit({"attached": attached, "failed": failed})
    elif not chosen:
        output.say("nothing to attach: the store has no other volume of that node")
    if failed:
        raise SystemExit(1)
