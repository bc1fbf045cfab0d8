"""Where a loaded patch comes from: its note, the report that belongs to it, and none that does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kmend import origin
from kmend.core.live import LiveModule, LivePatch, Phase
from kmend.core.report import BuildReport, KernelId, Outcome
from kmend.report.build import to_document
from kmend.runtime.journal import Record

NOTE: dict[str, object] = {
    "patch": "fix",
    "build_id": "ab",
    "report": "cafe",
    "cves": ["CVE-2024-1234", "CVE-x\x1b[2J", 7],
}
REPORT = BuildReport(
    "fix", Outcome.BUILT, KernelId("6.1.0", "#1", "ab"), sha256="00", cves=("CVE-2024-9999",), digest="cafe"
)


def patch(note: dict[str, object]) -> LivePatch:
    module = LiveModule("fix", 1, "live", "OEK", (), note, "id")
    return LivePatch("fix", Phase.ENABLED, None, 1, False, (), module)


def loaded(folder: Path, report: BuildReport) -> dict[str, Record]:
    (folder / "fix.json").write_text(json.dumps(to_document(report)))
    detail = {"file": str(folder / "fix.ko")}
    return {"fix": Record(1.0, "begin", "x", "b", "load", "fix", "", "", 1, "root", detail)}


def test_the_report_beside_the_file_that_was_loaded(tmp_path: Path) -> None:
    found = origin.of_name(tmp_path, "6.1.0", loaded(tmp_path, REPORT), "fix", NOTE)
    assert found.report == REPORT
    assert found.report_file == str(tmp_path / "fix.json")
    assert found.cves == ("CVE-2024-1234",)
    older = {key: value for key, value in NOTE.items() if key != "cves"}
    assert origin.of_name(tmp_path, "6.1.0", loaded(tmp_path, REPORT), "fix", older).cves == (
        "CVE-2024-9999",
    )


@pytest.mark.parametrize(
    "other",
    [
        replace(REPORT, digest="beef"),
        replace(REPORT, digest=""),
        replace(REPORT, name="other"),
        replace(REPORT, kernel=KernelId("6.1.0", "#1", "cd")),
    ],
)
def test_a_report_of_another_build_is_not_shown(tmp_path: Path, other: BuildReport) -> None:
    found = origin.of_name(tmp_path, "6.1.0", loaded(tmp_path, other), "fix", NOTE)
    assert (found.report, found.report_file) == (None, "")
    assert found.loaded is not None


def test_modules_of_others_have_none(tmp_path: Path) -> None:
    assert origin.of_name(tmp_path, "6.1.0", loaded(tmp_path, REPORT), "fix", {}).report is None


def test_of_a_file(tmp_path: Path) -> None:
    loaded(tmp_path, REPORT)
    path = str(tmp_path / "fix.ko")
    assert origin.of_file(path, "00", {}).report == REPORT  # the very bytes
    assert origin.of_file(path, "11", NOTE).report == REPORT  # signed meanwhile: made from the same
    assert origin.of_file(path, "11", {}).report is None
    (tmp_path / "fix.json").write_text("{")
    assert origin.of_file(path, "00", NOTE).report is None


def test_it_is_looked_for_once(tmp_path: Path) -> None:
    origins = origin.Origins(tmp_path, "6.1.0", "b")
    one = origins.of(patch(NOTE))
    assert origins.all_of([patch(NOTE)])["fix"] is one
