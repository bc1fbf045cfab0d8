"""The demos: what they show is true, the pictures in the documents are theirs, the verb prints them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kmend.cli import main
from kmend.klp.demo import BY_NAME, DEMOS, Demo, play
from kmend.klp.line import LINE_6_1, LINE_6_12, Feature
from kmend.klp.scenario import run
from kmend.klp.timeline import lines_of, stack_line, to_document, to_html, to_svg, to_text

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
EACH = pytest.mark.parametrize("demo", DEMOS, ids=[demo.name for demo in DEMOS])


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@EACH
def test_the_pictures_in_the_documents_are_the_models(demo: Demo) -> None:
    drawn = (ROOT / f"docs/img/klp-{demo.name}.svg").read_text()
    assert drawn == to_svg(play(demo)), f"kmend klp demo {demo.name} --svg docs/img/klp-{demo.name}.svg"
    assert f"img/klp-{demo.name}.svg" in (ROOT / "docs/consistency-model.md").read_text()


@EACH
def test_a_demo_is_the_scenario_that_it_shows(demo: Demo) -> None:
    for line in (LINE_6_1, LINE_6_12):
        timeline = play(demo, line)
        outcome = run(demo.scenario, line)
        assert outcome.final == timeline.moments[-1].state
        assert outcome.log == tuple(text for moment in timeline.moments for text in moment.log)
        assert [m.seconds for m in timeline.moments] == sorted(m.seconds for m in timeline.moments)
        assert len(timeline.moments) > len(demo.parts)


@EACH
def test_pictures_and_pages_hold_what_happened(demo: Demo) -> None:
    timeline = play(demo)
    root = ElementTree.fromstring(to_svg(timeline))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for node in root.iter(f"{SVG}rect"):
        right = float(node.get("x", "0")) + float(node.attrib["width"])
        bottom = float(node.get("y", "0")) + float(node.attrib["height"])
        assert right <= width
        assert bottom <= height
    page = to_html(timeline)
    assert page.count("<tr>") == len(timeline.moments) + 1
    assert "livepatch: &#x27;p1&#x27;: starting patching transition" in page
    document = to_document(timeline)
    assert json.loads(json.dumps(document))["scenario"] == demo.name


def test_the_sleeper_moves_when_the_kernel_signals() -> None:
    moments = play(BY_NAME["sleeper"]).moments
    (signal,) = [moment for moment in moments if "signaling remaining tasks" in moment.result]
    assert 15 <= signal.seconds < 16.3
    before = moments[moments.index(signal) - 1]
    assert before.state.tasks[0].frames == ("f [vmlinux]",)
    assert signal.state.tasks[0].frames == ("f [p1]",)
    assert moments[-1].result == "patching complete"


def test_replace_shows_the_nop_and_force_the_pinned_module() -> None:
    lines = {stack_line(stack) for m in play(BY_NAME["replace"]).moments for stack in m.state.stacks}
    assert "g: p2 nop (in transition) > p1 > original" in lines
    last = play(BY_NAME["force"]).moments[-1]
    assert (last.what, last.result) == ("rmmod p1", "error: Resource temporarily unavailable")
    absent = texts(to_svg(play(BY_NAME["late-module"])))
    assert "not loaded" in absent


def test_states_have_the_lines_own_names() -> None:
    for line in (LINE_6_1, LINE_6_12):
        text = to_text(play(BY_NAME["sleeper"], line))
        assert ("KLP_TRANSITION_UNPATCHED" in text) == line.has(Feature.STATE_NAMES)
        assert "UNPATCHED, asked to switch" in text
        assert all(len(row) < 110 for row in text.splitlines())


def test_the_verb_prints_every_moment(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    svg, html = tmp_path / "t.svg", tmp_path / "t.html"
    assert main(["klp", "demo", "reverse", "--svg", str(svg), "--html", str(html)]) == 0
    out = capsys.readouterr().out
    timeline = play(BY_NAME["reverse"])
    for moment in timeline.moments:
        assert "\n".join(lines_of(timeline, moment)) in out
    assert svg.read_text() == to_svg(timeline)
    assert html.read_text() == to_html(timeline)


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["klp", "demo", "replace", "--json", "--line", "6.12"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["schema"], document["kernel"]) == (1, "6.12")
    assert document["moments"][-1]["state"]["patches"] == ["p2"]
    assert "insmod p2" in captured.err
    assert main(["klp", "demo", "replace", "--json", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "status"), [(["klp"], 2), (["klp", "demo"], 2), (["klp", "demo", "nothing"], 2)]
)
def test_wrong_usage(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == status
    assert "next: see `kmend klp" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert main(["klp", "demo", "simple", "--svg", str(tmp_path / "file/x.svg")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_terminal_gets_colours() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kmend", "klp", "demo", "replace"]
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=theirs, stdin=subprocess.DEVNULL, env=env)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:  # EIO: the other side has ended
        pass
    os.close(ours)
    assert process.wait() == 0
    assert b"\x1b[" in shown
    assert b"\x1b[35mnop" in shown
