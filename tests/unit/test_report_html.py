"""The HTML report of an action: whole, self-contained, and nothing in it that a task's name could run."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kmend.cli import acting
from kmend.cli.context import Context, Quiet
from kmend.core.config import Config
from kmend.core.errors import Failed, Refusal, UsageError
from kmend.core.kmsg import KernelMessage
from kmend.core.live import (
    ActionReport,
    Blocker,
    Cause,
    Check,
    End,
    Followed,
    Frame,
    KernelState,
    Occasion,
    Phase,
    Result,
    Sample,
    Step,
    Task,
    Transition,
)
from kmend.core.report import BuildReport, FunctionRow, KernelId, ObjectRow, Outcome, Verified
from kmend.core.taint import decode
from kmend.report import html, plot

EVIL = "<script>alert(1"
KERNEL = KernelState("6.1.0", "#1", "ab" * 20, "b", True, 4096, decode(4096), False, "", False, True)
OCCASION = Occasion("load", f"kmend load {EVIL}", "admin", "host", KERNEL, 1e9, 1e9 + 3, 1e9 - 100)
#: elements without an end tag
VOID = {"meta", "link", "br", "line", "rect", "path", "img"}


def blocker(pid: int, name: str = "sleep") -> Blocker:
    task = Task(pid, pid, name, name, "S", False, 0, (Frame("schedule", 9), Frame("nap", 1)), pids=(pid,))
    return Blocker(task, Cause.IN_FUNCTION, "nap", "vmlinux", "sleeps inside nap()", "wake it", True)


def report(**other: object) -> ActionReport:
    rows = (*(blocker(pid) for pid in range(100, 120)), blocker(7, EVIL))
    look = Transition("fix", Phase.PATCHING, 1, 50, 21, rows)
    samples = (Sample(0.2, 21, 50), Sample(0.4, 21, 50), Sample(1.2, 3, 50), Sample(1.4, 0, 50))
    followed = Followed(End.COMPLETE, 1.5, samples, first=look, began=0.5, goal=Phase.PATCHING)
    made = ActionReport(
        "load",
        "fix",
        Result.DONE,
        "fix is in force",
        checks=(Check("release", True, "built for it"), Check("code", None, EVIL), Check("x", False, "no")),
        steps=(Step(0.1, "took it"), Step(0.9, f"interrupted ({EVIL})", (100,)), Step(2.0, "complete")),
        followed=(followed,),
        messages=(
            KernelMessage(101.0, 5, "livepatch: 'fix': starting"),
            KernelMessage(100.05, 5, "livepatch: early"),
        ),
        warnings=(Refusal("kernel-complained", "what\x1b[2J", f"line\n{EVIL}", "next"),),
        seconds=2.1,
        file=f"/root/{EVIL}.ko",
        sha256="00ff",
        note={"title": f"a fix {EVIL}", "cves": ["CVE-2024-1234", EVIL]},
        began=100.0,
    )
    return replace(made, **other)  # type: ignore[arg-type]  # any of its fields


BUILD = BuildReport(
    "fix",
    Outcome.BUILT,
    KernelId("6.1.0", "#1", "ab"),
    objects=(ObjectRow("vmlinux", (FunctionRow("nap", 2, "changed", f"edited {EVIL}"),)),),
    verified=Verified(3, 3),
)


class Reader(HTMLParser):
    """Elements, attributes and text; every element is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(*reports: ActionReport, build: BuildReport | None = BUILD) -> Reader:
    return Reader(html.page(OCCASION, reports, [build] * len(reports)))


def test_everything_is_in_it() -> None:
    text = read(report()).text
    for words in (
        "done fix is in force",
        "admin: kmend load",
        "6.1.0 #1, build id abababababab…",
        "taint 4096 (O): O a module built outside",
        "sha256 00ff",
        "mentions CVE-2024-1234",
        "patching: complete after 1.5 s",
        "At the first look (patching): patching fix: 21 of 50 tasks left",
        f"21 tasks (sleep, {EVIL}) sleep inside nap()",
        "pids: 100, 101, 102",
        "nap+0x1 ← patched",
        "helps: wake it",
        "not looked at: ",
        "warning · kernel-complained : what\\x1b[2J",
        "vmlinux nap,2 changed edited",
        "verified 3 of 3 functions",
    ):
        assert words in text, words


def test_names_that_somebody_chose_are_text_and_nothing_is_fetched_or_run() -> None:
    found = read(report())
    assert found.text.count(EVIL) >= 8
    assert "script" not in found.elements
    assert not {"src", "href"} & {name for name, _ in found.attributes}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    policy = dict(found.attributes)["content"]
    page = html.page(OCCASION, [report()], [None])
    assert "default-src 'none'" in page
    assert policy is not None
    assert re.findall(r"https?:|url\(|@import", page) == []


def test_kernel_and_kmend_are_merged_by_time() -> None:
    log = html._log(OCCASION, report())
    assert [(row.source, row.text[:12], row.number) for row in log] == [
        ("kernel", "livepatch: e", None),
        ("kmend", "took it", 1),
        ("kmend", "interrupted ", 2),
        ("kernel", "livepatch: '", None),
        ("kmend", "complete", 3),
    ]
    assert log[1].time == "01:46:40.100"


def test_a_refusal_and_a_reversal() -> None:
    row = Refusal("transition-stalled", "it did not end", "who\nwhy", "try again")
    refused = ActionReport("load", "fix", Result.REFUSED, "fix was not loaded", refused=(row,))
    found = read(refused, build=None)
    assert "refused fix was not loaded" in found.text
    assert "refused · transition-stalled : it did not end who why next: try again" in found.text
    assert "No transition was followed." in found.text
    assert "svg" not in found.elements
    back = Followed(End.COMPLETE, 0.5, (Sample(0.2, 2, 50),), began=1.6, goal=Phase.UNPATCHING)
    turned = report(result=Result.REVERSED, followed=(*report().followed, back), refused=(row,))
    text = read(turned).text
    assert "patching: complete after 1.5 s; unpatching: complete after 0.5 s" in text


def first_height(found: plot.Plot) -> float:
    """Where the outline begins."""
    return float(found.curves[0].line.split()[1])


def test_the_plot_has_every_change_in_its_frame() -> None:
    found = plot.plot(report())
    assert found is not None
    assert len(found.curves) == 1
    assert [mark.label for mark in found.marks] == ["1", "2", "3"]
    numbers = [float(word) for word in re.findall(r"[\d.]+", found.curves[0].line)]
    assert max(numbers) <= found.width
    heights = [float(word) for word in re.findall(r"V([\d.]+)", found.curves[0].line)]
    assert len(set(heights)) == 3  # 21, 3, 0
    assert heights[-1] == found.bottom
    samples = report().followed[0].samples
    assert len(found.curves[0].looks) == len(samples) > 1
    assert {height for _, height in found.curves[0].looks} <= {first_height(found), *heights}
    assert plot.plot(report(followed=())) is None
    often = replace(report().followed[0], samples=samples * plot.LOOKS)
    many = plot.plot(report(followed=(often,)))
    assert many is not None
    assert many.curves[0].looks == ()


def test_a_long_stall_keeps_its_changes() -> None:
    samples = tuple(Sample(at / 5, 7 if at < 4000 else 6, 50) for at in range(20000))
    row = Followed(End.STALLED, 4000.0, samples, goal=Phase.PATCHING)
    found = plot.points(row)
    assert len(found) <= plot.POINTS
    assert [left for at, (_, left) in enumerate(found) if at == 0 or found[at - 1][1] != left] == [7, 6]
    assert found[-1] == (4000.0, 6)
    every = tuple(Sample(at / 5, at % 7, 50) for at in range(20000))
    assert len(plot.points(replace(row, samples=every))) <= plot.POINTS + 1


# -- writing it ------------------------------------------------------------------------------------


def context(folder: Path) -> Context:
    return Context(Config(folder, folder, 1, ""), Quiet())


@pytest.mark.parametrize("name", ["fix.ko", "no/such/folder.html", "folder.html"])
def test_nothing_is_done_when_it_could_not_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.html").mkdir()
    done: list[str] = []

    def work(one: str) -> ActionReport:
        done.append(one)
        return report()

    with pytest.raises(UsageError):
        acting.each("load", ["fix"], work, context(tmp_path), str(tmp_path / name))
    assert done == []


def test_it_is_written_however_the_action_ends(tmp_path: Path) -> None:
    file = tmp_path / "out.html"

    def fails(name: str) -> ActionReport:
        if name == "good":
            return report()
        if name == "stopped":
            raise KeyboardInterrupt
        raise Failed("it broke", why="because", rule="failed")

    assert acting.each("load", ["good"], fails, context(tmp_path), str(file)) == 0
    assert "fix is in force" in Reader(file.read_text()).text
    assert acting.each("load", ["good", "bad"], fails, context(tmp_path), str(file)) == 1
    text = Reader(file.read_text()).text
    assert "fix is in force" in text
    assert "it broke because" in text
    with pytest.raises(KeyboardInterrupt):
        acting.each("load", ["stopped"], fails, context(tmp_path), str(file))
    assert "the kernel goes on with what was begun" in Reader(file.read_text()).text


def test_that_it_cannot_be_written_afterwards_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise Failed("x", why="the disk is full", next_step="free space")

    monkeypatch.setattr(acting, "write_atomically", full)
    file = str(tmp_path / "out.html")
    assert acting.each("load", ["fix"], lambda _: report(), context(tmp_path), file) == 0
    assert "report-unwritten" in capsys.readouterr().out
