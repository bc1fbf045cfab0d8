"""A short fuzz run with every kind of input; ``bench/fuzz.py --count 1000000`` is the long one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kmend.core.target import Target

FUZZ = Path(__file__).resolve().parents[2] / "bench" / "fuzz.py"


@pytest.mark.target
def test_damaged_input_never_ends_in_a_traceback(
    target_55: Target, target_56: Target, target_612: Target
) -> None:
    done = subprocess.run(
        [sys.executable, FUZZ, "--count", "5000", "--seed", "20", "--jobs", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Fuzz run: 5000 of 5000 inputs" in done.stdout
    assert "defects: 0 inputs, 0 places" in done.stdout
    # Damage must not end at the door: a good part of each kind is read, and comes out as something.
    for kind, outcome in (
        ("diff", "refused"),
        ("diff", "changed"),
        ("check", "objections"),
        ("patch", "applies"),
        ("types", "changed"),
        ("text", "series"),
    ):
        assert re.search(rf"^ +{kind} +\d+ .*\b{outcome}\b", done.stdout, re.MULTILINE), (kind, done.stdout)


@pytest.mark.parametrize("number", ["76", "77", "78", "79"])
def test_an_input_can_be_made_again(number: str, tmp_path: Path) -> None:
    kept = []
    for name in ("one", "two"):
        words = ["--plain", "--seed", "3", "--replay", number, "--keep", str(tmp_path / name)]
        done = subprocess.run([sys.executable, FUZZ, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        kept.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert kept[0] == kept[1] != {}
