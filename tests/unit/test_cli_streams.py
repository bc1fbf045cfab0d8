"""What becomes of a run whose standard streams cannot be written: it does its work and says what it can."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FULL = "kmend: standard output cannot be written: No space left on device\n"


def shell(tmp_path: Path, words: str) -> tuple[int, str, str]:
    """Status, standard output and errors of a line in which ``kmend`` stands for it."""
    line = f'kmend() {{ "{sys.executable}" -m kmend --cache "{tmp_path}" "$@"; }}; {words}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "status", "errors"),
    [
        ("kmend --help >/dev/full", 1, FULL),
        ("kmend info nothing.ko --json >/dev/full", 2, "nothing.ko"),
        ("kmend load nothing.ko >/dev/full", 2, ""),
        ("kmend --help >&-", 0, ""),
        ("kmend nonsense >&-", 2, "nonsense"),
        ("kmend nonsense 2>&-", 2, ""),
        ("kmend nonsense --json 2>/dev/full", 2, ""),
        ("kmend nonsense <&- >&- 2>&-", 2, ""),
    ],
)
def test_streams_that_cannot_be_written(tmp_path: Path, words: str, status: int, errors: str) -> None:
    found, out, said = shell(tmp_path, words)
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert errors in said
    if "nothing.ko" not in words:  # what this machine's kernel can do decides there
        assert found == status
    if "--json 2>" in words:
        assert '"rule": "usage"' in out


def test_a_closed_descriptor_is_not_taken_by_another_file(tmp_path: Path) -> None:
    """The first file that is opened gets the lowest free number: what is printed would be written into it."""
    code = (
        "import os, kmend.cli; kmend.cli.main(['--version']); "
        f"fd = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_RDWR); os._exit(fd)"
    )
    for closing in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{code}" {closing}'], check=False)
        assert done.returncode > 2, closing


@pytest.mark.parametrize(("verb", "status"), [("load", 0), ("list", 1)])
def test_the_status_of_what_was_done_is_kept(tmp_path: Path, verb: str, status: int) -> None:
    code = f"""
import sys
from kmend import cli
from kmend.cli import acting, list_, load_
from kmend.core.live import ActionReport, Result
def run(args, context):
    return acting.tell("{verb}", [ActionReport("{verb}", "fix", Result.DONE, "fix is in force")], context)
load_.run = list_.run = run
sys.exit(cli.main(["{verb}"] + ["x.ko"] * ("{verb}" == "load")))
"""
    (tmp_path / "run.py").write_text(code)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, tmp_path / "run.py"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr.startswith(FULL)) == (status, True)
    assert ("the exit status says what was done" in done.stderr) is (verb == "load")
