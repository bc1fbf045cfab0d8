"""What an acting verb ends with: its exit status, and its report, whatever happens while that is written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kmend.cli import acting
from kmend.cli.context import Context, Quiet
from kmend.core.config import Config
from kmend.core.errors import Unable, UsageError
from kmend.core.live import ActionReport, End, Followed, Result
from kmend.report import html


def context(folder: Path) -> Context:
    return Context(Config(folder, folder, 1, ""), Quiet())


def report(result: Result = Result.DONE, *followed: Followed) -> ActionReport:
    return ActionReport("load", "fix", result, "fix: how it ended", followed=followed)


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (report(), 0),
        (report(Result.DONE, Followed(End.COMPLETE, 1.0)), 0),
        (report(Result.PENDING), 0),  # --no-wait
        (report(Result.PENDING, Followed(End.STALLED, 60.0)), 1),  # asked, and left as it is
        (report(Result.REVERSED, Followed(End.STALLED, 60.0)), 1),
    ],
)
def test_what_goes_on_is_done_only_where_nobody_was_to_wait(
    ended: ActionReport, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []

    def work(name: str) -> ActionReport:
        tried.append(name)
        return ended

    assert acting.each("load", ["a", "b"], work, context(tmp_path)) == status
    assert tried == ["a", "b"][: 2 - status]
    shown = capsys.readouterr()
    assert "how it ended" in (shown.err if status else shown.out)
    assert "left as it is" in acting.EPILOG


def test_whatever_goes_wrong_with_the_report_the_outcome_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError("a mistake in the template")

    monkeypatch.setattr(html, "page", broken)
    file = tmp_path / "out.html"
    assert acting.each("load", ["fix"], lambda _: report(), context(tmp_path), str(file)) == 0
    shown = capsys.readouterr().out
    assert "fix: how it ended" in shown
    assert "report-unwritten" in shown
    assert "ZeroDivisionError: a mistake in the template" in shown

    def stopped(_: str) -> ActionReport:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        acting.each("load", ["fix"], stopped, context(tmp_path), str(file))
    assert "was not written: ZeroDivisionError" in capsys.readouterr().err
    recorder = acting.Recorder("load", str(file), context(tmp_path))
    assert recorder.write([]) == []
    assert "was not written" in capsys.readouterr().err


class Terminated(BaseException):
    number = 15


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UsageError("the kernel has no livepatch b", rule="unknown-patch"), 2, "no livepatch b"),
        (Unable("no longer root", rule="not-root"), 3, "no longer root"),
        (KeyboardInterrupt(), None, "load b was stopped by SIGINT"),
        (Terminated(), None, "load b was stopped by SIGTERM"),
        (ZeroDivisionError(), None, ""),
    ],
)
def test_what_was_done_before_an_error_is_told(
    error: BaseException, status: int | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(name: str) -> ActionReport:
        if name == "b":
            raise error
        return report()

    shown = replace(context(tmp_path), json=True)
    if status is None:
        with pytest.raises(type(error)):
            acting.each("load", ["a", "b", "c"], work, shown)
    else:
        assert acting.each("load", ["a", "b", "c"], work, shown) == status
    said = capsys.readouterr()
    found = json.loads(said.out)["actions"]
    assert found[0]["result"] == "done"
    assert [row["patch"] for row in found[1:]] == (["b"] if words else [])
    assert words in said.err
    if status is not None:  # nothing done before it: the error is told by who catches it
        with pytest.raises(type(error)):
            acting.each("load", ["b"], work, context(tmp_path))


def test_what_makes_the_report_is_there_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done: list[str] = []

    def work(name: str) -> ActionReport:
        done.append(name)
        return report()

    with pytest.raises(Unable) as error:
        acting.each("load", ["fix"], work, context(tmp_path), str(tmp_path / "out.html"))
    assert (error.value.rule, done) == ("missing-tool", [])
    assert acting.each("load", ["fix"], work, context(tmp_path)) == 0
