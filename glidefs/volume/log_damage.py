"""Describes damage in a write log that is read offline; csrc/log/replay.c finds it, as at a start."""

from __future__ import annotations

from pathlib import Path

from glidefs.core.gather import LogDamage, LogLoss
from glidefs.errors import CorruptLog
from glidefs.formats.pack import SECTOR

FILES_NAMED = 3
RANGES_NAMED = 8
EXPORT_REMEDY = (
    "nothing was exported; put the files back from a copy if there is one, else "
    "'glidefs logs export --partial' exports what is whole and says what is lost"
)


def check(damage: LogDamage, directory: Path, remedy: str = EXPORT_REMEDY) -> None:
    """Raise CorruptLog if something that was synced is bad."""
    if damage.losses:
        raise CorruptLog(str(directory), f"{_files(damage, directory)}: {lost_text(damage)}", remedy)


def note(damage: LogDamage, directory: Path) -> str:
    """A line for whoever takes the whole parts; empty if nothing is damaged."""
    parts = [f"{_files(damage, directory)}: {lost_text(damage)}"] if damage.losses else []
    if damage.torn:
        parts.append(f"{damage.torn} torn records, which were never synced, are left out")
    return ", and ".join(parts)


def lost_text(damage: LogDamage) -> str:
    """What is lost of the volume, with ranges in bytes as offset+length."""
    lost = []
    if damage.sectors:
        ranges = [f"{first * SECTOR}+{count * SECTOR}" for first, count in damage.sectors[:RANGES_NAMED]]
        if len(damage.sectors) > RANGES_NAMED:
            ranges.append(f"{len(damage.sectors) - RANGES_NAMED} more ranges")
        lost.append(f"{sum(count for _, count in damage.sectors) * SECTOR} bytes at {', '.join(ranges)}")
    if any(loss.kind != "record" for loss in damage.losses):
        lost.append("writes whose place in the volume is not known")
    return f"lost are {', and '.join(lost)}" if lost else "newer writes have replaced all of that"


def segment_path(directory: Path, number: int) -> Path:
    """The file of a segment in the log of that directory."""
    return directory / f"{number:016x}.seg"


def _files(damage: LogDamage, directory: Path) -> str:
    named = [_file(loss, directory) for loss in damage.losses[:FILES_NAMED]]
    if len(damage.losses) > FILES_NAMED:
        named.append(f"{len(damage.losses) - FILES_NAMED} more such")
    return ", ".join(named)


def _file(loss: LogLoss, directory: Path) -> str:
    path = segment_path(directory, loss.segment)
    if loss.kind == "record":
        return f"{path} has {loss.count} bad records that were synced"
    if loss.kind == "place":
        return f"{path} has {loss.count} bad places in the journal of what was synced"
    return loss.why.split("; ")[0]
