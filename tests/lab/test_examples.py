"""The main job from end to end, as a user types it: build, try, look at what the guest did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kmend.cli import main
from kmend.core.config import Config
from kmend.core.target import Target
from kmend.lab.guest import Guest

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


def test_the_newer_line_of_kernels(
    target_612: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """6.12: code with ENDBR and padding in front of each function."""
    status, built = kmend(
        capsys, "build", EXAMPLES / "cmdline.patch", "--kernel", target_612.release, "-o", tmp_path
    )
    assert (status, built["result"]) == (0, "built")
    assert built["verified"]["identical"] == 1
    status, verdict = kmend(capsys, "try", built["module"], "--run", EXAMPLES / "cmdline-check.sh", "--after")
    assert status == 0, verdict
    shown = {run["phase"]: run["stdout"].rstrip() for run in verdict["patched"]["runs"]}
    assert shown["patched"].endswith(" kmend=1")
    assert not shown["restored"].endswith(" kmend=1")
    assert verdict["patched"]["warnings"] == verdict["patched"]["oopses"] == []
    assert verdict["patched"]["sysfs"][0]["replace"] is True


def test_a_patched_module_may_go_and_come_again(
    target_55: Target, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before 6.3 the kernel would refuse to load it again (glue.c, kmend_forget); patched after it, too."""
    status, built = kmend(
        capsys, "build", EXAMPLES / "ext4-null-folio.patch", "--kernel", target_55.release, "-o", tmp_path
    )
    assert status == 0
    patched = f"cat /sys/kernel/livepatch/{built['name']}/ext4/patched"
    with Guest.of(target_55, config.lab) as guest:
        guest.put("/root/p.ko", Path(built["module"]).read_bytes())
        guest.put("/root/recipe.sh", (EXAMPLES / "ext4-recipe.sh").read_bytes(), 0o755)
        guest.run("modprobe ext4 && insmod /root/p.ko", check=True)
        assert guest.run(patched, check=True).text.strip() == "1"
        for _ in range(2):
            guest.run("rmmod ext4 && modprobe ext4", check=True)
            assert guest.run(patched, check=True).text.strip() == "1"
        guest.run("/root/recipe.sh", check=True, timeout=120)
        guest.run(f"echo 0 >/sys/kernel/livepatch/{built['name']}/enabled", check=True)
        gone = (
            f"for i in $(seq 60); do [ -e /sys/kernel/livepatch/{built['name']} ] || exit 0; sleep .2; done"
        )
        guest.run(f"{gone}; exit 1", check=True)
        guest.run(f"rmmod {built['name']} && rmmod ext4 && modprobe ext4", check=True)
        log = [message.text for message in guest.dmesg()]
    assert sum("reverting patch" in line for line in log) == 2
    assert not [line for line in log if "invalid relocation" in line or "BUG" in line or "WARNING" in line]
