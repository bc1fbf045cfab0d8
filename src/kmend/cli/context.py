"""What a verb is given: settings, streams, progress.

Only this package writes to stdout and stderr. The rule for the two: stdout is the
answer (one JSON document with ``--json``, people's text without), stderr is talk.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TextIO

from kmend.core.config import Config
from kmend.core.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

#: A finished step that took at least this many seconds leaves a line behind on a terminal.
WORTH_A_LINE = 1.0
#: A plain (non-terminal) display repeats the amount of one step at most every so many seconds.
PLAIN_EVERY = 5.0


class Display(Progress, Protocol):
    """A progress display that can be taken down before other text is written."""

    def close(self) -> None:
        """End the present step and leave the screen to others; a later step opens it again."""


class Quiet:
    """Shows nothing."""

    def step(self, text: str) -> None:
        pass

    def amount(self, done: int, total: int) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """One line per step, for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._said = 0.0
        self._text = ""

    def step(self, text: str) -> None:
        self._text = text
        self._said = monotonic()
        self._write(f"kmend: {text}…")

    def amount(self, done: int, total: int) -> None:
        if total <= 0 or monotonic() - self._said < PLAIN_EVERY:
            return
        self._said = monotonic()
        self._write(f"kmend: {self._text}: {100 * done // total} %")

    def close(self) -> None:
        self._out.flush()

    def _write(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


class Live:
    """A spinner, the step's name, a bar when the amount is known, and its seconds, on a terminal."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown: RichProgress | None = None
        self._task: TaskID | None = None
        self._text = ""
        self._began = 0.0

    def step(self, text: str) -> None:
        self._end_step()
        self._text, self._began = text, monotonic()
        shown = self._open()
        self._task = shown.add_task(text, total=None)

    def amount(self, done: int, total: int) -> None:
        if self._shown is not None and self._task is not None:
            self._shown.update(self._task, completed=done, total=total if total > 0 else None)

    def close(self) -> None:
        self._end_step()
        if self._shown is not None:
            self._shown.stop()
            self._shown = None

    def _open(self) -> RichProgress:
        if self._shown is None:
            # rich takes about 80 ms to import: a verb that ends at once never pays for it
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._shown = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                console=Console(file=self._out),
                transient=True,
            )
            self._shown.start()
        return self._shown

    def _end_step(self) -> None:
        if self._shown is None or self._task is None:
            return
        self._shown.remove_task(self._task)
        self._task = None
        took = monotonic() - self._began
        if took >= WORTH_A_LINE:
            self._shown.console.print(
                f"{self._text} ({took:.1f} s)", markup=False, highlight=False, style="dim"
            )


class Unbroken:
    """Another display, until it fails: its reader has gone (`kmend load … 2>&1 | less`), the disk is full.

    What is shown of an action is never to end the action.
    """

    def __init__(self, shown: Display) -> None:
        self.shown = shown

    def step(self, text: str) -> None:
        self._try(lambda shown: shown.step(text))

    def amount(self, done: int, total: int) -> None:
        self._try(lambda shown: shown.amount(done, total))

    def close(self) -> None:
        self._try(lambda shown: shown.close())

    def _try(self, what: Callable[[Display], None]) -> None:
        try:
            what(self.shown)
        except (OSError, ValueError):  # a closed file raises the second
            self.shown = Quiet()


def display(out: TextIO, *, quiet: bool, debug: bool) -> Display:
    """The display that suits the stream: none, plain lines, or a live one on a terminal.

    ``debug`` forces plain lines: the command lines that it shows would tear a live display.
    """
    if quiet:
        return Quiet()
    return Unbroken(Lines(out) if debug or not out.isatty() else Live(out))


@dataclass(frozen=True, slots=True)
class Context:
    """Handed to every verb's ``run``."""

    config: Config
    progress: Display
    json: bool = False
    quiet: bool = False
    debug: bool = False
    _emitted: list[object] = field(default_factory=list)

    def emit(self, document: object) -> None:
        """Print the one JSON document of this run on stdout; does nothing without ``--json``.

        Raises:
            RuntimeError: a second document (a reader would see two values where it expects one).
        """
        if not self.json:
            return
        if self._emitted:
            raise RuntimeError("a verb printed a second JSON document")
        self._emitted.append(document)
        self.progress.close()
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        sys.stdout.flush()

    @property
    def emitted(self) -> bool:
        """Whether the JSON document is already on stdout."""
        return bool(self._emitted)

    def say(self, text: str) -> None:
        """Print text for people: on stdout, or on stderr when stdout is a JSON document."""
        self.progress.close()
        out = sys.stderr if self.json else sys.stdout
        if self.json and self.quiet:
            return
        out.write(text.rstrip("\n") + "\n")
        out.flush()
