"""The pair of objects that the tests of this folder compare."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs import Pair, compiled

from kmend.diff.compare import ObjectDiff, compare
from kmend.diff.select import Selection, select


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Compare two C texts: the difference and what would be selected."""

    def make(old: str, new: str) -> tuple[ObjectDiff, Selection]:
        diff = compare(compiled(tmp_path, "old", old), compiled(tmp_path, "new", new))
        return diff, select(diff)

    return make
