"""``kmend build`` before a kernel is needed: which files it reads, and how they are stripped."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from kmend.cli.build import read_patches
from kmend.core.errors import UsageError


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A quilt series of three patches, one of them in a folder."""
    (tmp_path / "net").mkdir()
    for name in ("one.patch", "two.patch", "net/three.patch"):
        (tmp_path / name).write_text(f"the text of {name}\n")
    path = tmp_path / "series"
    path.write_text("# a comment\none.patch -p0\n\ntwo.patch # why\nnet/three.patch -p2\n")
    return path


def test_a_series_stands_for_its_files_each_with_its_own_level(series: Path) -> None:
    folder = series.parent
    patches, strip = read_patches([str(series)])
    names = [str(folder / name) for name in ("one.patch", "two.patch", "net/three.patch")]
    assert [name for name, _ in patches] == names
    assert patches[2][1] == b"the text of net/three.patch\n"
    assert strip == {names[0]: 0, names[2]: 2}


def test_the_users_level_is_for_the_others(series: Path) -> None:
    single = series.parent / "two.patch"
    patches, strip = read_patches([str(series), str(single)], 1)
    assert len(patches) == 4
    assert {Path(name).name: level for name, level in strip.items()} == {
        "one.patch": 0,
        "two.patch": 1,
        "three.patch": 2,
    }


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b"from a pipe")

    monkeypatch.setattr(sys, "stdin", Stdin())
    assert read_patches(["-"], 3) == ((("-", b"from a pipe"),), {"-": 3})


@pytest.mark.parametrize(
    ("text", "rule"),
    [("", "series"), ("# nothing\n", "series"), ("one.patch -R\n", "series"), ("gone.patch\n", "unreadable")],
)
def test_a_series_that_is_no_use(series: Path, text: str, rule: str) -> None:
    series.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_patches([str(series)])
    assert caught.value.rule == rule
    assert caught.value.next_step
