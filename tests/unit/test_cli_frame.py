"""The frame of the command line: where text goes, what the exit status is, that no traceback gets out."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kmend import __version__, cli
from kmend.cli import main
from kmend.cli.context import Context, Lines, Live, Quiet, Unbroken, display
from kmend.core.errors import Failed, Refusal, Refused, Unable, UsageError

Run = Callable[[Context], int]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Run], None]]:
    """Put a verb ``probe`` in the table whose body the test gives."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "VERBS", (cli.Verb("probe", "kmend_probe", "for tests"),))

    def install(body: Run) -> None:
        module = ModuleType("kmend_probe")
        module.__dict__["configure"] = lambda parser: parser.add_argument("--flag")
        module.__dict__["run"] = lambda args, context: body(context)
        monkeypatch.setitem(sys.modules, "kmend_probe", module)

    yield install


def raising(error: BaseException) -> Run:
    def body(context: Context) -> int:
        raise error

    return body


ROWS = [Refusal("one-rule", "fs/x.c", "because\nof that", "do this"), Refusal("other", "fs/y.c", "so", "")]


@pytest.mark.parametrize(
    ("error", "status", "result"),
    [
        (Failed("it broke", why="disk", next_step="free space", rule="disk"), 1, "failed"),
        (Refused(ROWS), 1, "refused"),
        (UsageError("no such flag"), 2, "failed"),
        (Unable("no qemu", rule="missing-tool"), 3, "failed"),
    ],
)
def test_errors_become_text_and_a_document(
    verb: Callable[[Run], None],
    capsys: pytest.CaptureFixture[str],
    error: Failed | Refused | UsageError | Unable,
    status: int,
    result: str,
) -> None:
    verb(raising(error))
    assert main(["probe"]) == status
    plain = capsys.readouterr()
    assert plain.out == ""
    assert plain.err.startswith(f"kmend: {error.what}\n")
    assert main(["probe", "--json"]) == status
    both = capsys.readouterr()
    assert both.err == plain.err
    document = json.loads(both.out)
    assert (document["schema"], document["verb"], document["result"]) == (1, "probe", result)
    assert [row["rule"] for row in document["refused"]] == [row.rule for row in error.reasons]


def test_every_reason_is_shown(verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raising(Refused(ROWS, artefacts="/tmp/kept")))
    main(["probe"])
    assert capsys.readouterr().err == (
        "kmend: fs/x.c\n  why:  because\n        of that\n  next: do this\n"
        "kmend: fs/y.c\n  why:  so\n  kept: /tmp/kept\n"
    )


def test_unforeseen_errors_are_one_sentence_with_a_log(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    verb(raising(ZeroDivisionError("of all things")))
    assert main(["probe", "--json"]) == 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    assert "ZeroDivisionError" in shown.err
    assert "--debug" in shown.err
    (log,) = (tmp_path / "cache" / "kmend" / "log").iterdir()
    assert str(log) in shown.err
    assert "Traceback" in log.read_text()
    assert json.loads(shown.out)["refused"][0]["rule"] == "internal"


def test_debug_shows_the_traceback(verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raising(ZeroDivisionError("of all things")))
    assert main(["probe", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_log_goes_elsewhere_when_the_cache_cannot_be_written(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    verb(raising(ZeroDivisionError()))
    assert main(["probe", "--cache", str(tmp_path / "file" / "cache")]) == 1
    place = next(word for word in capsys.readouterr().err.split() if word.endswith(".log"))
    assert Path(place).is_file()
    Path(place).unlink()


def test_interrupt(verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raising(KeyboardInterrupt()))
    assert main(["probe"]) == 130
    assert capsys.readouterr().err == "\nkmend: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_signals_that_end_it(verb: Callable[[Run], None], number: signal.Signals) -> None:
    def ended(context: Context) -> int:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not arrive")

    verb(ended)
    before = signal.signal(number, signal.default_int_handler)  # under nohup it would be ignored
    try:
        assert main(["probe"]) == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_nohup_keeps_what_it_is_for(verb: Callable[[Run], None]) -> None:
    def goes_on(context: Context) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    verb(goes_on)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["probe"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "args", [[], ["nonsense"], ["probe", "--nonsense"], ["probe", "--fla", "x"], ["probe", "--jobs", "none"]]
)
def test_wrong_usage_is_two(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    verb(lambda context: 0)
    assert main(args) == 2
    assert capsys.readouterr().err.startswith("kmend: ")
    assert main([*args, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["result"] == "failed"


def test_common_flags_before_and_behind_the_verb(verb: Callable[[Run], None], tmp_path: Path) -> None:
    seen: list[Context] = []

    def body(context: Context) -> int:
        seen.append(context)
        return 0

    verb(body)
    flags = ["--json", "--quiet", "--cache", str(tmp_path), "--jobs", "3"]
    assert main([*flags, "probe"]) == main(["probe", *flags]) == main(["probe"]) == 0
    for context in seen[:2]:
        assert (context.json, context.quiet, context.config.cache, context.config.jobs) == (
            True,
            True,
            tmp_path,
            3,
        )
        assert isinstance(context.progress, Quiet)
    assert not seen[2].json


def test_json_goes_to_stdout_and_text_to_stderr(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def body(context: Context) -> int:
        context.progress.step("working")
        context.emit({"a": "ö"})
        context.say("for people")
        return 0

    verb(body)
    assert main(["probe", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"a": "ö"}
    assert shown.err == "kmend: working…\nfor people\n"
    assert main(["probe", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("for people\n", "")


def test_second_document_is_a_bug_that_is_seen(verb: Callable[[Run], None]) -> None:
    def body(context: Context) -> int:
        context.emit({})
        with pytest.raises(RuntimeError):
            context.emit({})
        return 0

    verb(body)
    assert main(["probe", "--json"]) == 0


def test_error_after_the_document_prints_no_second_one(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def body(context: Context) -> int:
        context.emit({"result": "built"})
        raise Failed("late")

    verb(body)
    assert main(["probe", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"result": "built"}


def test_displays() -> None:
    out = io.StringIO()
    lines = display(out, quiet=False, debug=False)
    assert isinstance(lines, Unbroken) and isinstance(lines.shown, Lines)
    lines.step("fetching")
    lines.amount(1, 2)
    lines.close()
    assert out.getvalue() == "kmend: fetching…\n"


def test_live_display_leaves_the_screen_clean() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    live = display(out, quiet=False, debug=False)
    assert isinstance(live, Unbroken) and isinstance(live.shown, Live)
    live.amount(1, 2)  # before any step: nothing to show
    live.step("fetching [bold]")
    live.amount(5, 10)
    live.amount(5, 0)
    live.step("unpacking")
    live.close()
    live.close()
    plain = display(out, quiet=False, debug=True)
    assert isinstance(plain, Unbroken) and isinstance(plain.shown, Lines)


# --- as a program --------------------------------------------------------------------------------


def kmend(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]  # options are run()'s own
        [sys.executable, "-m", "kmend", *args], text=True, capture_output=True, check=False, **options
    )


def test_module_and_version() -> None:
    done = kmend("--version")
    assert (done.returncode, done.stdout) == (0, f"kmend {__version__}\n")


def test_help_names_every_verb_and_every_verb_has_help() -> None:
    done = kmend("--help")
    assert done.returncode == 0
    assert "Exit status" in done.stdout
    for row in cli.VERBS:
        assert f"    {row.name} " in done.stdout
        assert main([row.name, "--help"]) == 0


def test_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m kmend doctor --json | head -c 1; echo ${{PIPESTATUS[0]}}"],
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("{")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        late = subprocess.run(
            [sys.executable, "-m", "kmend", "--help"], stdout=out, stderr=subprocess.PIPE, check=False
        )
    assert late.stderr == b""
    assert late.returncode in (0, 141)  # argparse itself swallows the error where output is unbuffered


def test_starting_imports_no_verb_and_nothing_heavy() -> None:
    """Start-up stays cheap: the verb's own module, rich and the parsers come later."""
    code = "import sys, kmend.cli as c; c.main(['--version']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    for name in ("rich", "kmend.cli.build", "kmend.pipeline", "capstone", "kmend.patch.intake", "asyncio"):
        assert f"'{name}'" not in done.stdout


class Full(io.StringIO):
    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_display_that_fails_ends_nothing() -> None:
    shown = display(Full(), quiet=False, debug=False)
    shown.step("loading")
    shown.amount(1, 2)
    shown.step("following")
    shown.close()
    assert isinstance(shown, Unbroken) and isinstance(shown.shown, Quiet)
