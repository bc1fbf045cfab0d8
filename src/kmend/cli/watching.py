"""``kmend status --watch``: looks again and again, as a live screen or as blocks of text.

On a terminal the screen is Rich's; keys choose a task and end it. A terminal that cannot move its cursor, and
anything that is no terminal, gets a block of text whenever something has changed.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from kmend.cli.context import Context
from kmend.core.errors import KmendError
from kmend.runtime import journal, persistence
from kmend.runtime.journal import Journal, Record
from kmend.runtime.observe import Seen, observe
from kmend.runtime.place import Place, entries, flag

if TYPE_CHECKING:
    from kmend.origin import Origins
    from kmend.report.watch import Acting, Done, View

#: At most half of the time is spent looking, however many tasks there are.
_SHARE = 1.0
#: Seconds between two looks at keys and at the window's size.
_TICK = 0.2
#: So many lines of the journal are shown at most.
_RECENT = 30
#: What terminals send for the keys that move; by (line, page, end).
_KEYS = {
    b"\x1b[A": -1, b"\x1bOA": -1, b"k": -1, b"\x1b[B": 1, b"\x1bOB": 1, b"j": 1,
    b"\x1b[5~": -10, b"\x1b[6~": 10, b"\x1b[H": -10**9, b"\x1b[1~": -10**9, b"g": -10**9,
    b"\x1b[F": 10**9, b"\x1b[4~": 10**9, b"G": 10**9,
}  # fmt: skip


def fancy() -> bool:
    """Whether stdout is a terminal that can draw a screen."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class Looker:
    """Looks at one machine. ``name``: show this patch alone."""

    def __init__(self, place: Place, context: Context, name: str | None) -> None:
        self.place, self.state, self.name = place, context.config.state, name
        self._origins: Origins | None = None

    def pulse(self) -> tuple[object, ...]:
        """What changes when a transition begins, turns or ends: two small files for each patch."""
        with suppress(KmendError):
            return tuple(
                (
                    name,
                    flag(self.place.livepatch / name / "enabled"),
                    flag(self.place.livepatch / name / "transition"),
                )
                for name in entries(self.place.livepatch)
            )
        return ()

    def look(self) -> tuple[Seen, View]:
        """One look at everything.

        Raises:
            Unable: the kernel has no livepatch support.
        """
        from kmend.cli.install import boot_text
        from kmend.cli.status import leftover, unfinished_text
        from kmend.origin import Origins
        from kmend.report.watch import View

        seen = observe(self.place, self.state)
        kernel = seen.kernel
        if self._origins is None:
            self._origins = Origins(self.state, kernel.release, kernel.boot_id)
        rows = _records(self.state, kernel.boot_id) if seen.acting or seen.transition is None else ()
        boot = persistence.look(self.place, self.state, kernel.release, kernel.boot_id)
        patches = tuple(row for row in seen.patches if self.name in (None, row.name))
        left = tuple(row for row in seen.left if self.name in (None, row.name))
        troubles = (
            *(unfinished_text(row, seen) for row in seen.unfinished),
            *(f"{row.name}: {leftover(row)}" for row in left),
            *seen.notes,
        )
        view = View(
            time=time.time(),
            machine=os.uname().nodename,
            kernel=kernel,
            patches=patches,
            left=left,
            transition=seen.transition,
            acting=acting(rows, kernel.boot_id) if seen.acting else None,
            busy=seen.acting,
            troubles=troubles,
            boot=tuple(boot_text(boot)),
            recent=tuple(map(_done, rows[-_RECENT:])),
            cves={row.name: self._origins.of(row).cves for row in (*patches, *left)},
        )
        return seen, view


def _records(state: os.PathLike[str], boot: str) -> tuple[Record, ...]:
    from pathlib import Path

    try:
        return Journal(Path(state), boot).records()
    except KmendError:  # observe() has said so in its notes
        return ()


def acting(rows: tuple[Record, ...], boot: str) -> Acting | None:
    """The action that has no end in the journal, while somebody holds the lock; the last one if several."""
    from kmend.report.watch import Acting

    begun = journal.unfinished(rows, boot)
    if not begun:
        return None
    row = begun[-1]
    wait, stall = row.detail.get("wait"), row.detail.get("on_stall")
    return Acting(
        row.verb,
        row.patch,
        row.user,
        row.pid,
        row.time,
        tuple(_done(one) for one in rows if one.id == row.id and one.event == "step"),
        float(wait) if isinstance(wait, int | float) else None,
        stall if isinstance(stall, str) else "",
        row.detail.get("wake") is not False,
    )


def _done(row: Record) -> Done:
    from kmend.report.watch import Done

    tids = row.detail.get("tids")
    known = frozenset(one for one in tids if isinstance(one, int)) if isinstance(tids, list) else frozenset()
    if row.event == "step":
        return Done(row.time, row.text, known)
    result = f" [{row.result}]" if row.result else f", by {row.user}"
    return Done(row.time, f"{row.verb} {row.patch}: {row.text}{result}", known)


# -- blocks of text ----------------------------------------------------------------------------------


def blocks(looker: Looker, interval: float, context: Context) -> int:
    """A block whenever something has changed; that time goes by is no change. Never returns."""
    from kmend.cli.status import lines, waiting

    began: dict[int, float] = {}
    last: list[str] = []
    while True:
        start = time.monotonic()
        seen, view = looker.look()
        text = [*lines(seen, looker.name), *view.boot]
        if view.acting is not None and view.acting.steps:
            text += ["", *(f"kmend {view.acting.verb}: {step.text}" for step in view.acting.steps[-3:])]
        since = list(waiting(seen, began))
        if text != last:
            last = text
            context.say("\n".join((time.strftime("%H:%M:%S"), *text, *since, "")))
        time.sleep(max(interval, _SHARE * (time.monotonic() - start)))


# -- a screen ----------------------------------------------------------------------------------------


class Keys:
    """The keyboard, if there is one: the terminal gives each key at once and shows none."""

    def __init__(self) -> None:
        self.fd = -1
        self._before: list[object] | None = None

    def open(self) -> None:
        """Take the keyboard; nothing happens without one, or in the background."""
        import termios
        import tty

        with suppress(OSError, ValueError, termios.error):
            fd = sys.stdin.fileno()
            if os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp():
                self._before = termios.tcgetattr(fd)
                tty.setcbreak(fd)
                self.fd = fd

    def close(self) -> None:
        """Give it back as it was."""
        import termios

        if self._before is not None:
            with suppress(OSError, termios.error):
                # typeshed: what tcgetattr() gives is not what tcsetattr() takes
                termios.tcsetattr(self.fd, termios.TCSADRAIN, self._before)  # type: ignore[arg-type]
            self._before, self.fd = None, -1

    def wait(self, seconds: float) -> bytes:
        """The key that is pressed within so many seconds; nothing for none."""
        if self.fd < 0:
            time.sleep(seconds)
            return b""
        ready, _, _ = select.select([self.fd], [], [], seconds)
        if not ready:
            return b""
        with suppress(OSError):
            data = os.read(self.fd, 32)
            if data:
                return data
        self.close()  # the terminal is gone
        return b""


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Ctrl-Z fills the list instead of stopping us on a screen that is not ours."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTSTP, lambda number, _frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTSTP, before)


def screens(looker: Looker, interval: float) -> int:
    """The live screen, until q or Ctrl-C. Returns the exit status."""
    from rich.console import Console
    from rich.live import Live

    from kmend.report.watch import History, screen

    # the window's own size: what a shell once exported of it does not follow when it changes
    console = Console(_environ={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")})
    history, keys = History(), Keys()
    selected = 0
    shown = Live(
        console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    )
    with stoppable() as asked:
        try:
            keys.open()
            shown.start()
            while True:
                start, pulse = time.monotonic(), looker.pulse()
                _, view = looker.look()
                history.note(view)
                due = time.monotonic() + max(interval, _SHARE * (time.monotonic() - start))
                most = len(view.transition.blockers) - 1 if view.transition is not None else 0
                selected, drawn = min(selected, max(most, 0)), (0, 0)
                # a transition may be over within a second: that one begins or ends is seen at once
                while (rest := due - time.monotonic()) > 0 and looker.pulse() == pulse:
                    if asked:
                        asked.clear()
                        shown.stop()
                        keys.close()
                        os.kill(os.getpid(), signal.SIGSTOP)  # until the shell lets us go on
                        keys.open()
                        shown.start()
                        drawn = (0, 0)
                    size = (console.size.width, console.size.height)
                    if drawn != size:
                        shown.update(screen(view, history, *size, selected), refresh=True)
                        drawn = size
                    key = keys.wait(min(rest, _TICK))
                    if key in (b"q", b"Q", b"\x04"):
                        return 0
                    if key in _KEYS:
                        selected = max(0, min(selected + _KEYS[key], most))
                        drawn = (0, 0)
        finally:
            shown.stop()
            keys.close()
