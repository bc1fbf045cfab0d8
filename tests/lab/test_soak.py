"""Some cycles of bench/soak.py: livepatches come and go under load, and nothing of them stays behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kmend.core.config import Config
from kmend.core.target import Target

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import soak

pytestmark = [pytest.mark.lab, pytest.mark.target, pytest.mark.slow]

WARM, CYCLES = 4, 6


@pytest.mark.parametrize("line", ["target_56", "target_612"], ids=["6.1", "6.12"])
@pytest.mark.timeout(3600)
def test_some_cycles_under_load(
    line: str, request: pytest.FixtureRequest, config: Config, tmp_path: Path
) -> None:
    target: Target = request.getfixturevalue(line)
    assert soak.soaked(target, config, tmp_path, CYCLES, warm=WARM) == 0
