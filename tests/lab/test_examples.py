"""The main job from end to end, as a user types it: build, try, look at what the guest did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kmend.cli import main
from kmend.core.target import Target

pytestmark = [pytest.mark.lab, pytest.mark.target]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def kmend(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, dict[str, Any]]:
    """Run a verb with ``--json``: exit status and document."""
    status = main([*map(str, args), "--json", "--quiet"])
    return status, json.loads(capsys.readouterr().out)


def messages(document: dict[str, Any]) -> str:
    return "\n".join(document["patched"]["messages"]["livepatch"])


def test_the_ext4_fix_stops_the_crash(
    target_55: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loaded before ext4.ko; stock oopses, patched passes, taken back."""
    status, built = kmend(
        capsys, "build", EXAMPLES / "ext4-null-folio.patch", "--kernel", target_55.release, "-o", tmp_path
    )
    assert (status, built["result"]) == (0, "built")
    status, verdict = kmend(capsys, "try", built["module"], "--run", EXAMPLES / "ext4-recipe.sh")
    assert status == 0
    assert verdict["result"] == "passed"
    (stock,), (patched,) = verdict["stock"]["runs"], verdict["patched"]["runs"]
    assert "ext4_mb_load_buddy_gfp" in json.dumps(verdict["stock"]["oopses"])
    assert stock["status"] != 0
    assert patched["status"] == 0
    assert verdict["patched"]["oopses"] == []
    assert verdict["patched"]["sysfs"][0]["objects"][0]["functions"] == [
        "ext4_mb_init_group,1",
        "ext4_mb_load_buddy_gfp,1",
    ]
    assert "applying patch 'kmend_ext4_null_folio' to loading module 'ext4'" in messages(verdict)
    assert "'kmend_ext4_null_folio': unpatching complete" in messages(verdict)


def test_the_cmdline_change_comes_and_goes(
    target_56: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Changed while loaded, restored after; taint bit 15 decoded."""
    status, built = kmend(
        capsys, "build", EXAMPLES / "cmdline.patch", "--kernel", target_56.release, "-o", tmp_path
    )
    assert (status, built["result"]) == (0, "built")
    status, verdict = kmend(capsys, "try", built["module"], "--run", EXAMPLES / "cmdline-check.sh", "--after")
    assert status == 0, verdict
    assert verdict["result"] == "passed"
    shown = {run["phase"]: run["stdout"].rstrip() for run in verdict["patched"]["runs"]}
    assert shown["patched"].endswith(" kmend=1")
    assert not shown["restored"].endswith(" kmend=1")
    assert "'kmend_cmdline': patching complete" in messages(verdict)
    assert "'kmend_cmdline': unpatching complete" in messages(verdict)
    taint = {row["bit"]: row["meaning"] for row in verdict["patched"]["taint"]["flags"]}
    assert taint[15] == "the kernel has been live patched"
