"""The machine that the tests of install, uninstall, healthy and load --all share."""

from __future__ import annotations

from pathlib import Path

import pytest
from installing import bare, enabled

from kmend.installer import Installer


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    return bare(tmp_path, monkeypatch)


@pytest.fixture
def enabling(machine: Installer, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    return enabled(machine, monkeypatch)
