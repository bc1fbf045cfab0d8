"""Trials on the real kernel: each outcome, with modules that were made to end so."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pytest

from kmend.cli import main
from kmend.core.config import Config
from kmend.core.progress import Silent
from kmend.core.trial import Outcome, Phase
from kmend.lab.host import Settings
from kmend.lab.trial import TrialRequest, run_trial
from kmend.report.verdict import to_document, to_text

pytestmark = [pytest.mark.lab, pytest.mark.target]

Request = Callable[..., TrialRequest]
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_good_patch_passes_and_leaves_no_trace(request_55: Request) -> None:
    report = run_trial(
        request_55("lab_cmdline", after=True, script=(EXAMPLES / "cmdline-check.sh").read_text()), Silent()
    )
    assert report.outcome is Outcome.PASSED, to_text(report)
    assert report.stock is not None
    stock, patched = report.stock, report.patched
    assert [run.status for run in (*stock.runs, *patched.runs)] == [0, 0, 0]
    assert [run.phase for run in patched.runs] == [Phase.PATCHED, Phase.RESTORED]
    assert patched.runs[0].stdout == "patched: from the patch kmend=1\n"
    assert "kmend=1" not in patched.runs[1].stdout
    (tree,) = patched.sysfs
    assert (tree.name, tree.enabled, tree.transition) == ("lab_cmdline", True, False)
    assert [(row.name, row.patched, row.functions) for row in tree.objects] == [
        ("vmlinux", True, ("cmdline_proc_show,1",))
    ]
    (patch,) = report.patches
    assert patch.gone
    assert patch.unpatched
    assert patch.transition is not None
    assert patch.transition < 20
    assert (stock.taint_before, stock.taint_after, patched.taint_before) == (0, 0, 0)
    assert (patched.taint_after or 0) >> 15 & 1
    texts = [row.text for row in patched.messages if row.livepatch]
    assert texts[0] == "livepatch: enabling patch 'lab_cmdline'"
    assert texts[-1] == "livepatch: 'lab_cmdline': unpatching complete"
    assert not stock.messages or not any(row.livepatch for row in stock.messages)
    assert report.timings["verdict"] < report.timings["total"]


def test_without_a_script_it_loads_and_takes_back(request_55: Request) -> None:
    report = run_trial(request_55("lab_cmdline"), Silent())
    assert report.outcome is Outcome.PASSED
    assert report.stock is None
    assert report.patches[0].gone
    assert report.patched.runs == ()


def test_a_patched_run_that_fails_is_failed_and_still_taken_back(request_55: Request) -> None:
    report = run_trial(request_55("lab_cmdline", script='[ "$KMEND_PHASE" = stock ] || exit 5'), Silent())
    assert report.outcome is Outcome.FAILED
    assert "status 5" in report.why
    assert report.patches[0].gone


def test_a_script_that_does_not_end_is_killed_and_its_output_kept(request_55: Request) -> None:
    report = run_trial(request_55("lab_cmdline", script="echo begun; sleep 1000", timeout=2), Silent())
    assert report.outcome is Outcome.FAILED
    run = report.patched.run_of(Phase.PATCHED)
    assert run is not None
    assert run.status is None
    assert run.stdout == "begun\n"
    assert "killed" in run.note


def test_an_oops_of_the_patch_is_no_failed_check(request_55: Request) -> None:
    script = '[ "$KMEND_PHASE" = stock ] || { cat /proc/cmdline; exit 0; }'
    report = run_trial(request_55("lab_oops", script=script), Silent())
    assert report.outcome is Outcome.OOPS  # although the script's status was 0
    assert report.patched.oopses[0].where.endswith("[lab_oops]")
    assert "replacement" in report.patched.oopses[0].where
    assert "lab_oops" in to_text(report)


def test_a_panic_of_the_patch_is_an_oops_and_not_a_lost_guest(request_55: Request) -> None:
    report = run_trial(
        request_55("lab_panic", script='[ "$KMEND_PHASE" = stock ] || cat /proc/cmdline'), Silent()
    )
    assert report.outcome is Outcome.OOPS
    assert "from the patch" in report.why
    assert report.patched.lost
    assert report.patched.console
    assert report.stock is not None
    assert report.stock.runs[0].status == 0


def test_a_lost_guest_is_neither(request_55: Request) -> None:
    report = run_trial(
        request_55("lab_cmdline", script='[ "$KMEND_PHASE" = stock ] || poweroff -f; sleep 3'), Silent()
    )
    assert report.outcome is Outcome.LOST
    assert "QEMU ended" in report.why


def test_what_happens_to_the_stock_kernel_is_shown_and_no_failure(request_55: Request) -> None:
    script = 'if [ "$KMEND_PHASE" = stock ]; then echo c >/proc/sysrq-trigger; sleep 9; fi'
    report = run_trial(request_55("lab_cmdline", script=script), Silent())
    assert report.outcome is Outcome.PASSED
    assert report.stock is not None
    assert "sysrq" in report.stock.oopses[0].headline
    assert report.stock.lost
    assert "oops on the stock kernel" in to_text(report)


def test_a_patch_that_the_kernel_refuses_is_failed_with_its_words(request_55: Request) -> None:
    report = run_trial(request_55("lab_absent", script="true"), Silent())
    assert report.outcome is Outcome.FAILED
    assert "symbol 'no_such_function' not found" in report.why
    assert report.patches[0].loaded is False
    assert report.patched.runs == ()


def test_a_patch_that_cannot_be_taken_back_is_failed_and_says_who_is_in_it(request_55: Request) -> None:
    script = '[ "$KMEND_PHASE" = stock ] || { cat /proc/cmdline & sleep 1; }'
    report = run_trial(request_55("lab_sleep", script=script, transition_timeout=3.0), Silent())
    assert report.outcome is Outcome.FAILED
    assert "taking back did not end" in report.why
    assert "(cat)" in report.why
    assert "replacement+" in report.why
    assert not report.patches[0].gone


def test_a_module_to_be_patched_may_come_after_the_patch(request_55: Request) -> None:
    script = """set -e
modprobe loop
modprobe ext4
[ "$KMEND_PHASE" = stock ] || cat /sys/kernel/livepatch/lab_ext4/ext4/patched
truncate -s 8M /tmp/i
mkfs.ext4 -q /tmp/i
mkdir -p /mnt/i
mount -o loop /tmp/i /mnt/i
sync
umount /mnt/i"""
    report = run_trial(request_55("lab_ext4", script=script), Silent())
    assert report.outcome is Outcome.PASSED, to_text(report)
    texts = [row.text for row in report.patched.messages]
    assert "livepatch: applying patch 'lab_ext4' to loading module 'ext4'" in texts
    assert "lab_ext4: kmend: patched sync" in texts or "kmend: patched sync" in texts
    assert report.patched.runs[0].stdout == "1\n"
    assert report.patched.sysfs[0].objects[0].patched
    assert report.stock is not None
    assert report.stock.runs[0].stdout == ""


def test_several_patches_are_loaded_in_order_and_taken_back(request_55: Request) -> None:
    report = run_trial(request_55("lab_ext4", "lab_cmdline", script="grep . /proc/cmdline"), Silent())
    assert report.outcome is Outcome.PASSED, to_text(report)
    assert [tree.name for tree in report.patched.sysfs] == ["lab_cmdline", "lab_ext4"]
    assert all(patch.gone and patch.unpatched for patch in report.patches)


def test_the_stock_kernel_really_has_the_ext4_crash(request_55: Request) -> None:
    """The recipe kills ext4 of 6.1.192-1 each time; a patch that does not touch the cause does not help."""
    report = run_trial(request_55("lab_cmdline", script=(EXAMPLES / "ext4-recipe.sh").read_text()), Silent())
    assert report.stock is not None
    for side in (report.stock, report.patched):
        assert side.oopses[0].where.startswith("ext4_mb_load_buddy_gfp")
        assert side.runs[0].status == 1
    assert report.outcome is Outcome.OOPS


def test_on_two_processors(request_55: Request) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do cat /proc/cmdline >/dev/null & done; wait; nproc"
    report = run_trial(request_55("lab_cmdline", script=script, settings=Settings(cpus=2)), Silent())
    assert report.outcome is Outcome.PASSED, to_text(report)
    assert report.patched.runs[0].stdout == "2\n"


def test_keep_writes_what_was_seen(request_55: Request, config: Config) -> None:
    report = run_trial(request_55("lab_cmdline", script="echo said", keep=True), Silent())
    folder = Path(report.artefacts)
    names = {path.name for path in folder.iterdir()}
    assert {"patched.console", "patched.dmesg", "stock.dmesg", "patched.stdout", "stock.stderr"} <= names
    assert (folder / "patched.stdout").read_text() == "said\n"
    assert "livepatch: enabling patch" in (folder / "patched.dmesg").read_text()
    assert "livepatch: enabling patch" in (folder / "patched.console").read_text()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_the_command(modules: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    script = str(EXAMPLES / "cmdline-check.sh")
    assert main(["try", str(modules["lab_cmdline"]), "--run", script, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["result"] == "passed"
    assert document["kernel"]["release"] == "6.1.0-55-amd64"  # read from the module's vermagic
    assert main(["try", str(modules["lab_absent"]), "--quiet"]) == 1
    assert capsys.readouterr().out.startswith("failed: lab_absent: loading:")


def test_an_interrupted_trial_leaves_no_guest(modules: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "long.sh"
    script.write_text("#!/bin/sh\nsleep 1000\n")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        argv = [sys.executable, "-m", "kmend", "try", str(modules["lab_cmdline"]), "--run", str(script)]
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            deadline = monotonic() + 60
            while len(guests := guests_of(child.pid)) < 2 and monotonic() < deadline:
                sleep(0.1)
            assert len(guests) == 2
            child.send_signal(number)
            assert child.wait(20) != 0
        deadline = monotonic() + 5
        while any(is_qemu(pid) for pid in guests) and monotonic() < deadline:
            sleep(0.05)
        assert not any(is_qemu(pid) for pid in guests)


def guests_of(parent: int) -> list[int]:
    """The QEMU processes that any thread of that process started."""
    found: list[int] = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return [pid for pid in found if is_qemu(pid)]


def is_qemu(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.startswith("qemu-system")
    except OSError:
        return False


def test_the_report_of_a_real_trial_is_a_document(request_55: Request) -> None:
    report = run_trial(request_55("lab_cmdline", script="exit 1"), Silent())
    document = json.loads(json.dumps(to_document(report)))
    assert document["result"] == "failed"
    assert document["stock"]["runs"][0]["status"] == 1
