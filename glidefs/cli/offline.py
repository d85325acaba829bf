"""The commands that need no daemon: doctor, inspect, export-image, bless, bases, gc."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from glidefs.cli import output
from glidefs.config import Config, age_text, load_config
from glidefs.errors import ConfigError, GlideError
from glidefs.exports.logs.leftovers import unnamed_prefixes
from glidefs.exports.requests import check_named
from glidefs.names import check_prefix
from glidefs.places import config_path
from glidefs.store import open_configured
from glidefs.store.probe import probe_store
from glidefs.store.resilient import ResilientStore
from glidefs.store.which import WhichStore

if TYPE_CHECKING:
    from glidefs.gc.run import GcResult, Tally

OFFLINE_DEADLINE = 60.0
"""Seconds that an offline tool waits for a store before it gives up."""


def settings(explicit: str | None) -> Config:
    """The configuration; the defaults where none is named and the default file is absent."""
    path = config_path(explicit)
    if explicit is None and not path.exists():
        return Config()
    return load_config(path)


def doctor_command(config: str | None, as_json: bool) -> int:
    """Print the checks; 1 if one failed."""
    from glidefs.doctor.doctor import run_checks

    checks = run_checks(config)
    failed = any(check.state == "fail" for check in checks)
    if as_json:
        rows = [{"check": c.name, "state": c.state, "detail": c.detail, "remedy": c.remedy} for c in checks]
        output.emit({"ok": not failed, "checks": rows})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            line = f"{check.state:<4}  {check.name:<{width}}  {check.detail}"
            print(output.printable(line + (f"; {check.remedy}" if check.remedy else "")))
    return int(failed)


def inspect_command(target: str, store_url: str | None, config: str | None, as_json: bool) -> None:
    """Describe one object."""
    from glidefs.offline.inspect import inspect, open_source

    with contextlib.ExitStack() as stack:
        store = None
        if not Path(target.removeprefix("file://")).is_file():
            base, target = _split_url(target, store_url)
            store = stack.enter_context(_patient(settings(config), base))
        found = inspect(open_source(store, target))
    if as_json:
        output.emit(found)
    else:
        output.fields({key: _brief(value) for key, value in found.items()})


def _split_url(target: str, store_url: str | None) -> tuple[str | None, str]:
    """Store URL and key of "s3://bucket/key", or the store that was given and the key as it is."""
    parts = urlsplit(target)
    if parts.scheme == "s3" and parts.netloc:
        return f"s3://{parts.netloc}", parts.path.lstrip("/")
    if parts.scheme == "file":
        raise ConfigError(f"{target}: no such file")
    return store_url, target


def _brief(value: Any) -> Any:
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} entries (all of them with --json)"
    if isinstance(value, dict):
        return {key: _brief(item) for key, item in value.items()}
    return value


def export_command(
    name: str,
    file: Path,
    prefix: str | None,
    store_url: str | None,
    force: bool,
    config: str | None,
    as_json: bool,
) -> None:
    """Write an image."""
    from glidefs.offline.export import export_image

    chosen = settings(config)
    with (
        _patient(chosen, store_url) as store,
        output.progress(f"export {name}") as update,
    ):
        result = export_image(
            store, prefix or chosen.store.default_prefix, name, file, force=force, progress=update
        )
    if as_json:
        output.emit({"path": str(file.absolute()), **result._asdict()})
    else:
        data = output.size_text(result.data_bytes)
        print(f"{file}: {output.size_text(result.size)}, {data} of it data, sequence {result.sequence}")
    if result.removed_at:
        output.say(
            f"note: {name} was removed at {output.time_text(result.removed_at)}; gc will delete its data"
        )


def bless_command(
    image: str,
    base: str,
    prefix: str | None,
    store_url: str | None,
    config: str | None,
    as_json: bool,
    *,
    new_prefix: bool = False,
) -> None:
    """Make a base of an image."""
    from glidefs.bless.bless import bless
    from glidefs.core import heap

    heap.keep_large_buffers_apart()
    chosen = settings(config)
    prefix = prefix or chosen.store.default_prefix
    check_named(check_prefix(prefix), chosen.store.prefixes, new=new_prefix)
    source = 0 if image == "-" else Path(image)
    with (
        _patient(chosen, store_url) as store,
        output.progress(f"bless {base}") as update,
    ):
        probe_store(store, prefix)
        try:
            result = bless(
                store,
                prefix,
                base,
                source,
                pack_bytes=chosen.upload.pack_size,
                level=chosen.upload.compression_level,
                progress=update,
                max_age=chosen.store.gc_grace / 2,
            )
        except KeyboardInterrupt:
            why = "interrupted; the same command goes on where this one stopped"
            output.fail(InterruptedError(None, why), as_json, 130)
    if as_json:
        output.emit(result._asdict())
        return
    if result.created:
        data, stored = output.size_text(result.data_bytes), output.size_text(result.stored_bytes)
        print(f"{base}: {output.size_text(result.size)}, {data} of it data, {stored} in {result.packs} packs")
        if result.reused_packs:
            output.say(f"{result.reused_packs} of them from a bless that was interrupted")
    else:
        print(f"{base}: there already, with this content")
    if result.note:
        output.say(f"note: {result.note}")


def bases_command(prefix: str | None, store_url: str | None, config: str | None, as_json: bool) -> None:
    """List bases."""
    import msgspec

    from glidefs.bases.stored import list_bases

    chosen = settings(config)
    with _patient(chosen, store_url) as store:
        found = list_bases(store, prefix or chosen.store.default_prefix)
    if as_json:
        output.emit([msgspec.to_builtins(base) for base in found])
        return
    rows = [
        [
            base.name,
            output.size_text(base.size),
            "-" if base.stored_bytes is None else output.size_text(base.stored_bytes),
            output.time_text(base.created_at),
            base.source or "-",
            f"removed {output.time_text(base.removed_at)}" if base.removed_at else "",
        ]
        for base in found
    ]
    output.table(["NAME", "SIZE", "STORED", "CREATED", "SOURCE", "STATE"], rows, right=(1, 2))


def bases_remove_command(
    base: str, prefix: str | None, store_url: str | None, config: str | None, as_json: bool
) -> None:
    """Remove a base."""
    import msgspec

    from glidefs.bases.stored import remove_base

    chosen = settings(config)
    with _patient(chosen, store_url) as store:
        found = remove_base(store, prefix or chosen.store.default_prefix, base)
    if as_json:
        output.emit(msgspec.to_builtins(found))
    else:
        print(f"{base}: removed at {output.time_text(found.removed_at)}; gc will delete its data")


def gc_command(
    prefix: str | None,
    dry_run: bool,
    grace: float | None,
    limit: int,
    store_url: str | None,
    force: bool,
    config: str | None,
    as_json: bool,
) -> int:
    """Collect the garbage of one prefix, or of all that are configured; 1 if one of them failed."""
    from glidefs.gc.run import collect

    chosen = settings(config)
    seconds = checked_grace(grace, chosen.store.gc_grace, force)
    documents: list[dict[str, Any]] = []
    with _patient(chosen, store_url) as store:
        for name in (prefix,) if prefix else chosen.store.prefixes:
            try:
                with output.counting(f"gc {name}") as update:
                    result = collect(
                        store, name, grace=seconds, limit=limit, dry_run=dry_run, progress=update
                    )
            except GlideError as error:
                # The other prefixes have nothing to do with it.
                output.say(f"glidefs: {name}: {error}")
                reason, hint = output.split_reason(error)
                documents.append({"prefix": name, "error": reason, "hint": hint})
                continue
            documents.append(msgspec.to_builtins(result))
            if not as_json:
                _print_gc(result)
        try:
            unnamed = unnamed_prefixes(store.list_dirs, chosen.store.prefixes)
        except GlideError as error:
            output.say(f"note: other prefixes cannot be listed: {error}")
            unnamed = []
    failed = [document for document in documents if "error" in document]
    if as_json:
        first = {key: failed[0][key] for key in ("error", "hint")} if failed else {}
        output.emit({**first, "prefixes": documents, "unnamed_prefixes": unnamed})
    if unnamed:
        output.say(f"note: [store] prefixes does not name {', '.join(unnamed)}: gc here leaves that alone")
    return int(bool(failed))


def checked_grace(wanted: float | None, configured: float, force: bool) -> float:
    """The grace of a run in seconds. Raises ConfigError for one shorter than the hosts assume."""
    if wanted is None:
        return configured
    if wanted < configured and not force:
        raise ConfigError(
            f"a grace of {age_text(wanted)} is shorter than the {age_text(configured)} that hosts "
            "assume ([store] gc_grace): gc could delete what they are about to commit; "
            "if no host uses the prefix, add --force"
        )
    return wanted


def _print_gc(result: GcResult) -> None:
    def text(tally: Tally) -> str:
        return f"{tally.objects} objects, {output.size_text(tally.bytes)}"

    lines = {
        "roots": result.roots,
        "listed": text(result.listed),
        "marked": text(result.marked),
        "unreferenced": text(result.unreferenced),
        "waiting": f"{text(result.waiting)} (grace {age_text(result.grace)})",
    }
    if result.dry_run:
        lines["due"] = f"{text(result.due)} (dry run: nothing was deleted)"
    else:
        lines |= {"deleted": text(result.deleted), "left": f"{text(result.left)} (for the next run)"}
    if result.tombstones:
        lines["tombstones"] = f"{result.tombstones} of removed bases and volumes deleted"
    if result.pins:
        lines["pins"] = f"{result.pins} that interrupted forks and copies left behind deleted"
    if result.checkpoints:
        lines["checkpoints"] = f"{result.checkpoints} of interrupted blesses deleted"
    if result.strays:
        lines["strays"] = f"{result.strays} objects among packs and pages are not ours; left alone"
    print(f"{result.prefix}:")
    output.fields(lines, "  ")
    if result.note:
        output.say(f"note: {result.prefix}: {result.note}")


def _patient(config: Config, url: str | None) -> ResilientStore:
    """The configured store, or the one at ``url``; it must be there."""
    store = open_configured(config.store, url)
    store.check_there()
    patient = ResilientStore(store, deadline=OFFLINE_DEADLINE)
    patient.identity = WhichStore(None, lambda _: None)
    return patient
