"""Small texts that kmend reads: whatever stands in them, the error is one of kmend's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmend.core.errors import Failed, UsageError
from kmend.kernel import symvers
from kmend.module import descriptor


@pytest.mark.parametrize("text", ["0x0\tone\tvmlinux\tEXPORT_SYMBOL\x0c\t\n", "\x1c\n", "\n", "", "0x0\n\n"])
def test_symvers_with_other_line_ends_are_refused_or_read(text: str, tmp_path: Path) -> None:
    place = tmp_path / "Module.symvers"
    place.write_text(text)
    try:
        assert "one" in symvers.load(place)
    except Failed as error:
        assert error.rule == "bad-symvers"


@pytest.mark.parametrize(
    "text", ["name = " + "9" * 5000, "name = " + "[" * 5000, "a" * 10_000, "[[object]]\n" * 3]
)
def test_descriptors_beyond_measure_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        descriptor.parse(text, "kmend.toml")
    assert caught.value.rule == "bad-descriptor"
