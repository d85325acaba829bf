"""The mutations of ``mutations.py`` are run by hand; that each still has its place is looked at here."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    for test in mutation.tests:
        assert (ROOT / Path(test.split("::")[0])).exists()
