"""The build report: the contract's document, there and back, and the text for people."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmend.core.errors import Failed, Refusal
from kmend.core.report import BuildReport, FunctionRow, KernelId, ObjectRow, Outcome, Verified
from kmend.product import cve_names
from kmend.report.build import from_document, to_document, to_text

REPORT = BuildReport(
    name="fix",
    result=Outcome.BUILT,
    kernel=KernelId("6.1.0-55-amd64", "#1 SMP Debian 6.1.192-1", "ab12"),
    module="/tmp/fix.ko",
    sha256="00ff",
    objects=(
        ObjectRow(
            "ext4",
            (
                FunctionRow("ext4_mb_load_buddy_gfp", 0, "changed", "directly edited"),
                FunctionRow("f", 2, "changed", "inlined callee g changed"),
                FunctionRow("helper", 0, "new", "directly edited"),
            ),
        ),
    ),
    warnings=(Refusal("hunk-moved", "fs/x.c", "+2 lines\nfrom there", "look"),),
    verified=Verified(2, 2, ("helper",)),
    timings={"compile": 1.5, "total": 2.25},
    cves=("CVE-2024-1234",),
    digest="cafe",
)


def test_the_document_is_the_contract() -> None:
    document = to_document(REPORT)
    assert list(document) == [
        "schema", "name", "result", "kernel", "module", "sha256", "objects", "refused", "warnings",
        "verified", "timings", "cves", "digest",
    ]  # fmt: skip
    assert document["schema"] == 1
    assert document["result"] == "built"
    assert document["kernel"] == {
        "release": "6.1.0-55-amd64",
        "version": "#1 SMP Debian 6.1.192-1",
        "build_id": "ab12",
    }
    objects: Any = document["objects"]
    assert objects[0]["functions"][0] == {
        "name": "ext4_mb_load_buddy_gfp",
        "sympos": 0,
        "status": "changed",
        "why": "directly edited",
    }
    assert document["verified"] == {"functions": 2, "identical": 2, "skipped": ["helper"]}


def test_text() -> None:
    assert to_text(REPORT).splitlines() == [
        "fix: built",
        "kernel   6.1.0-55-amd64  #1 SMP Debian 6.1.192-1",
        "module   /tmp/fix.ko",
        "mentions CVE-2024-1234",
        "",
        "object  function                status   why",
        "ext4    ext4_mb_load_buddy_gfp  changed  directly edited",
        "ext4    f (sympos 2)            changed  inlined callee g changed",
        "ext4    helper                  new      directly edited",
        "",
        "warning (hunk-moved): fs/x.c",
        "  why:  +2 lines",
        "        from there",
        "  next: look",
        "",
        "verified 2 of 2 functions equal the kernel's own bytes; passed over: helper",
        "",
        "took     compile 1.5 s, total 2.2 s",
    ]


def test_text_of_a_refusal_has_no_table() -> None:
    text = to_text(
        BuildReport("x", Outcome.REFUSED, KernelId("", "", ""), refused=(Refusal("r", "w", "y", "n"),))
    )
    assert text == "x: refused: nothing was built\n\nrefused (r): w\n  why:  y\n  next: n\n"


TEXT = st.text(max_size=8)
REFUSALS = st.lists(st.builds(Refusal, TEXT, TEXT, TEXT, TEXT), max_size=3).map(tuple)
REPORTS = st.builds(
    BuildReport,
    name=TEXT,
    result=st.sampled_from(Outcome),
    kernel=st.builds(KernelId, TEXT, TEXT, TEXT),
    module=st.none() | TEXT,
    sha256=st.none() | TEXT,
    objects=st.lists(
        st.builds(
            ObjectRow,
            TEXT,
            st.lists(st.builds(FunctionRow, TEXT, st.integers(0, 9), TEXT, TEXT), max_size=3).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    refused=REFUSALS,
    warnings=REFUSALS,
    verified=st.builds(Verified, st.integers(0, 9), st.integers(0, 9), st.lists(TEXT, max_size=3).map(tuple)),
    timings=st.dictionaries(TEXT, st.integers(0, 10**6).map(lambda ms: ms / 1000), max_size=3),
)


@given(REPORTS)
def test_there_and_back(report: BuildReport) -> None:
    assert from_document(json.loads(json.dumps(to_document(report)))) == report
    assert to_text(report).endswith("\n")


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": True},
        {"result": "splendid"},
        {"name": 5},
        {"kernel": None},
        {"objects": [5]},
        {"objects": [{"name": "x", "functions": [{"name": "f"}]}]},
        {"timings": {"total": "long"}},
        {"module": 7},
        {"refused": {}},
    ],
)
def test_damaged_documents_are_an_error(change: dict[str, object]) -> None:
    with pytest.raises(Failed) as caught:
        from_document({**to_document(REPORT), **change})
    assert caught.value.rule == "report-damaged"
    with pytest.raises(Failed):
        from_document([])


def test_many_reasons_of_one_rule_are_shortened() -> None:
    rows = tuple(Refusal("changed-data", f"variable_{n}", "why", "next") for n in range(40))
    text = to_text(BuildReport("x", Outcome.REFUSED, KernelId("r", "v", "b"), refused=rows))
    assert text.count("refused (changed-data)") == 5
    assert "36 more of the kind: variable_4, " in text
    assert "variable_39" not in text


def test_reports_of_older_versions_can_be_read() -> None:
    document = to_document(REPORT)
    del document["cves"], document["digest"]
    assert (from_document(document).cves, from_document(document).digest) == ((), "")
    with pytest.raises(Failed):
        from_document({**document, "cves": "CVE-2024-1234"})


def test_names_of_cves_are_found_in_the_text_and_ordered() -> None:
    text = b"cve-2024-12345, CVE-2024-9999 (CVE-2024-9999), xCVE-2024-1111, CVE-2024-123, CVE-2024-12345678"
    assert cve_names("CVE-2023-52447.patch", text) == ("CVE-2023-52447", "CVE-2024-9999", "CVE-2024-12345")
    assert cve_names(b"") == ()
