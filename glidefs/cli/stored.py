"""Volumes as the store knows them: the list of them, and those that a lost host or disk had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glidefs.api.client import Client
from glidefs.cli import output
from glidefs.cli.look import matches


def _stored(client: Client, prefix: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.call("GET", "/api/volumes", query={"prefix": prefix})
    return found


def list_stored(client: Client, prefix: str | None, patterns: Sequence[str], as_json: bool) -> None:
    """Print the volumes of a prefix, with the verb that deals with each."""
    found = [volume for volume in _stored(client, prefix) if matches(volume["name"], patterns)]
    if as_json:
        output.emit(found)
        return
    rows = [
        [
            v["name"],
            output.size_text(v["size"]),
            output.time_text(v["created_at"]) if v["created_at"] else "-",
            v["owner_node"] or "-",
            v["owner_host"] or "-",
            v["source"] or "-",
            _note_of(v),
        ]
        for v in found
    ]
    output.table(["NAME", "SIZE", "CREATED", "NODE", "HOST", "SOURCE", "NOTE"], rows, right=(1,))


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


def of_node(client: Client, node: str | None, prefix: str | None) -> list[str]:
    """The volumes that a node had in the store, or this one where another host has its name."""
    return [
        volume["name"]
        for volume in _stored(client, prefix)
        if not volume["served_here"]
        and not volume["removed_at"]
        and (volume["candidate"] if node is None else volume["owner_host"] and volume["owner_node"] == node)
    ]
