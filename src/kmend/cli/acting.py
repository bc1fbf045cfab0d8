"""What the acting verbs have in common: flags of a transition, the question at a stall, the report."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from kmend.action import Ask, Choice, Following, OnStall
from kmend.cli.context import Context
from kmend.core.errors import KmendError, Refusal, Unable, UsageError
from kmend.core.files import write_atomically
from kmend.core.live import ActionReport, Occasion, Result, Transition
from kmend.manager import Manager
from kmend.runtime import journal
from kmend.runtime.follow import Patience
from kmend.runtime.place import Place

#: What the HTML report is made with: loaded before anything is done, not when the kernel has been patched.
_NEEDED = ("jinja2", "kmend.origin", "kmend.report.build", "kmend.report.html", "kmend.runtime.klog")
EPILOG = """\
On a stall: tasks that sleep in a function which is about to change are interrupted for a moment (--no-wake
forbids it); their system calls return what they would return under the kernel's own signal, which comes
after 15 seconds. What cannot be woken is waited for, up to --wait seconds; then --on-stall decides.

Exit status: 0 done (with --no-wait: begun); 1 refused, failed, taken back after a stall, or left as it is
when asked; 2 wrong usage; 3 this machine or user cannot do it.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every verb that follows a transition."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    default = Patience()
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=default.limit,
        metavar="SECONDS",
        help=f"how long a transition may take before it counts as stalled (default: {default.limit:g})",
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="return once the transition has begun; do not follow it"
    )
    parser.add_argument(
        "--on-stall",
        choices=[row.value for row in OnStall],
        default=OnStall.REVERSE.value,
        help="then: go back to how it was (default), wait on, or ask",
    )
    parser.add_argument("--no-wake", action="store_true", help="interrupt no task")
    parser.add_argument(
        "--interrupt-io-uring",
        action="store_true",
        help="interrupt also tasks in io_uring_enter(), even where its call then returns early",
    )
    add_report(parser)


def add_report(parser: argparse.ArgumentParser) -> None:
    """``--report``."""
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="write what was done, and what stood in the way, into one HTML file (.html), however it ends",
    )


def _seconds(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e7:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of seconds")
    return value


def following(args: argparse.Namespace, number: int = 1) -> Following:
    """The flags as a value, for an action on so many patches.

    Raises:
        UsageError: ``--on-stall ask`` without a terminal to ask on; ``--no-wait`` for several patches.
    """
    if args.no_wait and number > 1:
        raise UsageError(
            "--no-wait is for one patch",
            why="the kernel makes one transition at a time: the next patch has to wait for its end",
            next_step="name one patch, or leave --no-wait out",
            rule="usage",
        )
    if args.on_stall == OnStall.ASK.value and not sys.stdin.isatty():
        raise UsageError(
            "--on-stall ask needs a terminal",
            why="nobody could answer",
            next_step="--on-stall reverse or wait",
            rule="usage",
        )
    return Following(
        wait=not args.no_wait,
        patience=Patience(limit=args.wait, wake=not args.no_wake, io_uring=args.interrupt_io_uring),
        on_stall=OnStall(args.on_stall),
    )


def manager(context: Context) -> Manager:
    """The manager of this machine; asks on the terminal."""
    return Manager(context.config, context.progress, ask=asker(context) if sys.stdin.isatty() else None)


def asker(context: Context) -> Ask:
    """Shows what holds the transition up and reads a letter."""

    def ask(last: Transition | None) -> Choice:
        from kmend.report import live

        context.progress.close()
        lines = list(live.blockers_text(last)) if last is not None else ["no task of user space is left"]
        out = sys.stderr
        try:
            out.write("\n".join(lines) + "\n")
            while True:
                out.write("[r]everse, [w]ait on, or [l]eave it as it is? ")
                out.flush()
                word = sys.stdin.readline()
                if not word:
                    return Choice.REVERSE  # the terminal is gone: the safe way
                choice = next((row for row in Choice if row.value[0] == word.strip().lower()[:1]), None)
                if choice is not None:
                    return choice
        except (OSError, ValueError):  # gone, or something else than text was typed
            return Choice.REVERSE

    return ask


def tell(verb: str, reports: Sequence[ActionReport], context: Context) -> int:
    """Print the reports; the verb's exit status."""
    from kmend.report.action import succeeded, to_document, to_text

    context.emit(to_document(verb, reports))
    for report in reports:
        text = to_text(report)
        if succeeded(report):
            context.say(text)
        else:
            context.progress.close()
            sys.stderr.write(text + "\n")
    return 0 if all(map(succeeded, reports)) else 1


class Recorder:
    """Writes the HTML report of a verb, when one is asked for."""

    def __init__(self, verb: str, file: str | None, context: Context) -> None:
        """
        Raises:
            UsageError: the file's name is no ``.html``, or nothing can be written there.
            Unable: (rule ``missing-tool``) a library that makes it is not there.
        """
        self.verb, self.context = verb, context
        self.file = None if file is None else Path(file)
        self.began = time.time()
        if self.file is None:
            return
        if self.file.suffix not in (".html", ".htm"):
            # `load --report fix.ko other.ko` must not cost somebody a module
            raise UsageError(
                f"{self.file} is no name for an HTML file",
                why="--report writes one, over what is there",
                next_step="name a file that ends in .html",
                rule="usage",
            )
        if self.file.is_dir() or not os.access(self.file.parent, os.W_OK | os.X_OK):
            raise UsageError(
                f"{self.file} cannot be written",
                why="it is a folder" if self.file.is_dir() else f"{self.file.parent} cannot be written",
                next_step="name another file: nothing has been done yet",
                rule="unwritable",
            )
        try:
            for name in _NEEDED:
                import_module(name)
        except ImportError as error:
            raise Unable(
                f"{self.file} cannot be made",
                why=str(error),
                next_step="leave --report out, or run `kmend doctor`: nothing has been done yet",
                rule="missing-tool",
            ) from error

    @contextmanager
    def watching(self, name: str, done: Sequence[ActionReport] = ()) -> Iterator[None]:
        """Write the report also when the action on ``name`` ends in an error or is interrupted."""
        try:
            yield
        except BaseException as error:
            self._or_say([*done, ended(self.verb, name, error)])
            raise

    def write(self, reports: Sequence[ActionReport]) -> list[ActionReport]:
        """Write the report. What was done is done: that it cannot be written is but a warning with it."""
        rows = list(reports)
        if not rows:
            self._or_say(rows)
            return rows
        try:
            self._write(rows)
        except Exception as error:  # whatever it is: the outcome must be told
            warning = self._unwritten(error)
            rows[-1] = replace(rows[-1], warnings=(*rows[-1].warnings, warning))
        return rows

    def _or_say(self, rows: Sequence[ActionReport]) -> None:
        try:
            self._write(rows)
        except Exception as error:
            row = self._unwritten(error)
            sys.stderr.write(f"kmend: {row.what}: {row.why}\n")

    def _unwritten(self, error: Exception) -> Refusal:
        why, next_step = f"{type(error).__name__}: {error}", "`kmend log` has the steps; please report this"
        if isinstance(error, KmendError):
            why, next_step = error.why, error.next_step
        return Refusal("report-unwritten", f"{self.file} was not written", why, next_step)

    def _write(self, rows: Sequence[ActionReport]) -> None:
        if self.file is None:
            return
        from kmend.origin import Origins
        from kmend.report.html import page
        from kmend.runtime.kernel_state import read_kernel
        from kmend.runtime.klog import epoch_of_boot

        place = Place()
        kernel = None
        with suppress(KmendError):
            kernel = read_kernel(place)
        by = journal.who(place, shlex.join(["kmend", *sys.argv[1:]]))
        occasion = Occasion(
            self.verb,
            by.command,
            by.login or by.user,
            os.uname().nodename,
            kernel,
            self.began,
            time.time(),
            epoch_of_boot(),
        )
        origins = Origins(
            self.context.config.state, kernel.release if kernel else "", kernel.boot_id if kernel else ""
        )
        text = page(occasion, rows, [origins.of_action(row).report for row in rows])
        write_atomically(self.file, text.encode(errors="backslashreplace"), mode=0o640)


#: One action of a command: what it is about, and what does it.
Part = tuple[str, Callable[[], Sequence[ActionReport]]]


def each(
    verb: str,
    names: Sequence[str],
    work: Callable[[str], ActionReport],
    context: Context,
    file: str | None = None,
) -> int:
    """Do it for each name in turn, up to the first that does not succeed; ``file`` is that of --report."""
    recorder = Recorder(verb, file, context)
    parts = [(name, lambda name=name: [work(name)]) for name in names]
    reports, status = perform(verb, parts, context, recorder)
    return tell(verb, recorder.write(reports), context) if status is None else status


def perform(
    verb: str, parts: Sequence[Part], context: Context, recorder: Recorder
) -> tuple[list[ActionReport], int | None]:
    """Do them in turn, up to the first that does not succeed: what came of them, for the caller to tell.

    What was done before an error or a signal is told here: after an error with its exit status, else the
    status is None.
    """
    from kmend.report.action import succeeded

    reports: list[ActionReport] = []
    for name, work in parts:
        try:
            with recorder.watching(name, reports):
                reports += work()
        except KmendError as error:
            if not reports:
                raise  # all that there is to tell
            tell(verb, [*reports, ended(verb, name, error)], context)
            return reports, error.exit_status
        except Exception:  # told where it is caught
            if reports:
                tell(verb, reports, context)
            raise
        except BaseException as error:
            tell(verb, [*reports, ended(verb, name, error)], context)
            raise
        if not all(map(succeeded, reports)):
            break
    return reports, None


def ended(verb: str, name: str, error: BaseException) -> ActionReport:
    """The report of an action that an error or a signal has ended, where it could not report itself."""
    if isinstance(error, KmendError):
        return ActionReport(verb, name, Result.REFUSED, error.what, refused=error.reasons)
    number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else getattr(error, "number", None)
    by = type(error).__name__ if number is None else signal.Signals(number).name
    return ActionReport(
        verb,
        name,
        Result.FAILED,
        f"{verb} {name} was stopped by {by}; the kernel goes on with what was begun",
        "`kmend status` shows it, the same command again goes on with it",
    )
