"""Names and keys: the layout, and that nothing escapes from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glidefs import names
from glidefs.errors import GlideError, InvalidName

ID = "0123456789abcdef" * 2


def test_layout() -> None:
    assert names.pack_key("p", ID) == f"p/packs/01/{ID}"
    assert names.page_key("p", ID) == f"p/pages/01/{ID}"
    assert names.manifest_key("p", "v") == "p/volumes/v/manifest"
    assert names.snapshot_key("p", "v", 7) == "p/volumes/v/snapshots/00000000000000000007"
    assert names.base_manifest_key("p", "b") == "p/bases/b/manifest"
    assert names.hot_set_key("p", "b") == "p/bases/b/hot-set"
    assert names.tag_key("p", "t") == "p/tags/t"
    assert names.gc_state_key("p") == "p/gc/state"
    assert names.gc_clock_key("p") == "p/gc/clock"
    assert names.volumes_prefix("p") == "p/volumes/"


@pytest.mark.parametrize("bad", ["", ".", "..", ".a", "-a", "_a", "a/b", "a b", "a\n", "ä", "a" * 129, "a\0"])
def test_bad_names(bad: str) -> None:
    with pytest.raises(InvalidName) as caught:
        names.check_name("export", bad)
    assert "\n" not in str(caught.value)
    for build in (
        names.volumes_prefix,
        lambda n: names.manifest_key("p", n),
        lambda n: names.tag_key("p", n),
    ):
        with pytest.raises(InvalidName):
            build(bad)


@given(st.text(max_size=140))
def test_what_is_accepted_is_one_path_part(text: str) -> None:
    try:
        names.check_name("x", text)
    except InvalidName:
        return
    assert 1 <= len(text) <= 128
    assert text.isascii()
    assert not set(text) & set("/\\\0\n")
    assert text not in (".", "..")


@pytest.mark.parametrize("bad", ["", ID[:-1], ID.upper(), ID + "0", "../" + ID[3:], ID + "\n"])
def test_bad_ids(bad: str) -> None:
    with pytest.raises(InvalidName):
        names.pack_key("p", bad)


@given(st.integers(0, names.MAX_SEQUENCE), st.integers(0, names.MAX_SEQUENCE))
def test_snapshots_sort_by_sequence(a: int, b: int) -> None:
    assert (names.snapshot_key("p", "v", a) < names.snapshot_key("p", "v", b)) == (a < b)


def test_snapshot_bounds() -> None:
    for seq in (-1, names.MAX_SEQUENCE + 1):
        with pytest.raises(InvalidName):
            names.snapshot_key("p", "v", seq)


def test_every_error_has_one_line_and_a_temporary_mark() -> None:
    import glidefs.errors as errors

    made = [
        errors.CorruptObject("k", 3, "why"),
        errors.CorruptLog("/l", "why"),
        errors.Fenced("v", "why"),
        errors.OwnedElsewhere("v", "n"),
        errors.InvalidName("tag", "x\ny"),
        errors.ExportExists("v"),
        errors.UnknownExport("v"),
        errors.DeviceError("why", device="/dev/ublkb0"),
        errors.CacheBusy("/c", 1),
        errors.ConfigError("why"),
        errors.NotSupported("why"),
        errors.GcRefused("p", "why"),
        errors.StoreUnavailable(key="k", op="get"),
        errors.Throttled("why"),
        errors.NotFound(key="k"),
        errors.PreconditionFailed(key="k"),
        errors.Conflict(),
        errors.AccessDenied(),
        errors.NoSuchBucket(),
        errors.StoreUnsupported(),
    ]
    for error in made:
        assert isinstance(error, GlideError)
        assert str(error)
        assert "\n" not in str(error)
    temporary = {type(error).__name__ for error in made if error.temporary}
    assert temporary == {"StoreUnavailable", "Throttled", "Conflict"}
    assert errors.NoSuchBucket(temporary=True).temporary
