"""The live view of ``kmend status --watch``: what is kept from look to look, and the screen made of it.

Nothing here reads the machine or the clock: a :class:`View` is one look, :class:`History` what the looks so
far tell together, :func:`screen` a Rich renderable of both. Texts of the machine are never markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kmend.core.live import Blocker, KernelState, LivePatch, Phase, Transition, printable, tasks
from kmend.report import live

#: Eighths of a character cell, from none to all.
_BLOCKS = " ▁▂▃▄▅▆▇█"
#: From this width on the stack stands beside the list of tasks, else below it.
_WIDE = 100
#: So many steps of what is being done are shown.
_STEPS = 4
#: Within so many seconds a sleeper is interrupted.
_SOON = 3.0
_DIM, _GOOD, _BAD, _WARN, _LINE = "dim", "green", "bold red", "yellow", "cyan"


@dataclass(frozen=True, slots=True)
class Done:
    """A line of kmend's journal: when (seconds since the epoch), what, to which threads."""

    time: float
    text: str
    tids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Acting:
    """The kmend that acts now. ``wait``: its patience in seconds, None if not known; then ``on_stall``.

    ``wakes``: it interrupts sleepers.
    """

    verb: str
    patch: str
    user: str
    pid: int
    began: float
    steps: tuple[Done, ...] = ()
    wait: float | None = None
    on_stall: str = ""
    wakes: bool = True


@dataclass(frozen=True, slots=True)
class View:
    """One look at everything. ``time`` is seconds since the epoch, ``recent`` the journal's last lines."""

    time: float
    machine: str
    kernel: KernelState
    patches: tuple[LivePatch, ...]
    left: tuple[LivePatch, ...]
    transition: Transition | None
    acting: Acting | None
    busy: bool
    troubles: tuple[str, ...]
    boot: tuple[str, ...]
    recent: tuple[Done, ...]
    cves: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Ended:
    """A transition that has ended while somebody watched."""

    text: str
    samples: tuple[tuple[float, int], ...]
    seconds: float


@dataclass(slots=True)
class History:
    """What is kept between looks: (seconds, tasks left) of the transition, since when each task is seen."""

    samples: list[tuple[float, int]] = field(default_factory=list)
    since: dict[int, float] = field(default_factory=dict)
    began: float = 0.0
    now: float = 0.0
    ended: Ended | None = None
    _key: tuple[str, Phase] | None = None

    def note(self, view: View) -> None:
        """Take a look in."""
        self.now = view.time
        row = view.transition
        key = (row.patch, row.phase) if row is not None else None
        if key != self._key:
            self._end(view, turned=key is not None and self._key is not None and key[0] == self._key[0])
            self._key, self.began = key, view.time
            self.samples, self.since = [], {}
        if row is None:
            return
        self.samples.append((view.time - self.began, row.left))
        if len(self.samples) > 20_000:  # hours: every second one tells enough
            self.samples = self.samples[:1] + self.samples[1:-1:2] + self.samples[-1:]
        here = {one.task.tid for one in row.blockers}
        self.since = {tid: at for tid, at in self.since.items() if tid in here}
        for tid in here:
            self.since.setdefault(tid, view.time)

    def _end(self, view: View, *, turned: bool) -> None:
        if self._key is None or not self.samples:
            return
        name, phase = self._key
        patch = next((one for one in view.patches if one.name == name), None)
        word = "patching" if phase is Phase.PATCHING else "unpatching"
        if turned:
            how = "was turned round"
        elif (patch is not None and patch.phase is Phase.ENABLED) is (phase is Phase.PATCHING):
            how = "is complete"
        else:
            how = "did not come to its end"
        seconds = view.time - self.began
        most = max(left for _, left in self.samples)
        text = f"{word} {name} {how} after {seconds:.1f} s of watching; {tasks(most)} at most were left"
        self.ended = Ended(text, tuple(self.samples), seconds)

    @property
    def seconds(self) -> float:
        """For how long the present transition has been watched."""
        return self.now - self.began

    def seen(self, row: Blocker) -> float:
        """For how long a task has been seen to hold the transition up."""
        return self.now - self.since.get(row.task.tid, self.now)


def chart(samples: Sequence[tuple[float, int]], span: float, width: int, height: int) -> list[str]:
    """Bars of the highest number in each slice of time, ``height`` lines of ``width`` characters.

    A number holds until the next look. What is not zero is never shown as nothing.
    """
    if not samples or width < 1 or height < 1:
        return [" " * max(width, 0)] * max(height, 0)
    span = max(span, samples[-1][0], 1e-6)
    top = max(1, *(left for _, left in samples))
    values: list[int | None] = [None] * width
    for at, (seconds, left) in enumerate(samples):
        until = samples[at + 1][0] if at + 1 < len(samples) else span
        first = min(int(seconds / span * width), width - 1)
        last = min(max(first, math.ceil(until / span * width) - 1), width - 1)
        for column in range(first, last + 1):
            values[column] = max(left, values[column] or 0)
    eighths = [0 if not value else max(1, round(value / top * height * 8)) for value in values]
    return [
        "".join(_BLOCKS[min(8, max(0, one - 8 * (height - 1 - row)))] for one in eighths)
        for row in range(height)
    ]


def screen(view: View, history: History, width: int, height: int, selected: int = 0) -> Layout:
    """The whole screen. ``selected`` is the place of a task in the list of blockers."""
    rows: list[tuple[RenderableType, int]] = [(_head(view, width), 1)]
    rest = height - 1
    if view.transition is None:
        body = _still(view, history, width, rest)
    else:
        body = _moving(view, view.transition, history, width, rest, selected)
    rows += body
    parts = []
    for one, size in rows:
        parts.append(Layout(one, size=min(size, height)))
        height -= min(size, height)
        if not height:
            break
    if height:
        parts.append(Layout(Text(" "), size=height))
    layout = Layout()
    layout.split_column(*parts)
    return layout


# -- a transition ------------------------------------------------------------------------------------


def _moving(
    view: View, row: Transition, history: History, width: int, height: int, selected: int
) -> list[tuple[RenderableType, int]]:
    rows: list[tuple[RenderableType, int]] = []
    bars = max(2, min(8, height // 5))
    progress = Group(
        _progress(row, history, width - 4), *_chart(history.samples, history.seconds, width - 4, bars)
    )
    word = "patching" if row.phase is Phase.PATCHING else "unpatching"
    rows.append((_panel(progress, f"{word} {printable(row.patch)}"), bars + 4))
    doing = list(_doing(view, row))
    rows.append((_panel(Group(*doing), "what is being done"), len(doing) + 2))
    rest = height - sum(size for _, size in rows)
    if rest < 4:  # a small window: the first lines matter most
        return rows
    if not row.blockers:
        text = (
            "every task has switched; the kernel waits for idle processors or is finishing"
            if not row.left
            else "they have gone meanwhile"
        )
        return [*rows, (_panel(Text(text, style=_DIM), "tasks left"), 3)]
    selected = max(0, min(selected, len(row.blockers) - 1))
    chosen = row.blockers[selected]
    if width >= _WIDE:
        listed = min(rest, max(len(row.blockers) + 3, _detail_height(chosen, width * 2 // 5)))
        both = Layout()
        both.split_row(
            Layout(_panel(_tasks(view, row, history, listed - 3, selected), _left_title(row)), ratio=3),
            Layout(_panel(_detail(view, history, chosen), live.task_name(chosen)), ratio=2),
        )
        rows.append((both, listed))
        return rows
    detail = min(_detail_height(chosen, width), max(rest // 2, 4))
    listed = min(len(row.blockers) + 3, rest - detail)
    if listed < 4:
        return [*rows, (_panel(_tasks(view, row, history, rest - 3, selected), _left_title(row)), rest)]
    rows.append((_panel(_tasks(view, row, history, listed - 3, selected), _left_title(row)), listed))
    rows.append((_panel(_detail(view, history, chosen), live.task_name(chosen)), rest - listed))
    return rows


def _left_title(row: Transition) -> str:
    shown = "" if len(row.blockers) == row.left else f", {len(row.blockers)} looked at"
    return f"{tasks(row.left)} left{shown}"


def _progress(row: Transition, history: History, width: int) -> Text:
    done = row.tasks - row.left
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{row.left}", style="bold")
    text.append(f" of {tasks(row.tasks)} left, ")
    text.append(f"watched for {history.seconds:.0f} s")
    if row.unreadable:
        text.append(f", {row.unreadable} could not be asked", style=_WARN)
    room = width - text.cell_len - 8
    if room >= 10 and row.tasks:
        full = round(done / row.tasks * min(room, 40))
        text.append("  ")
        text.append("━" * full, style=_GOOD)
        text.append("━" * (min(room, 40) - full), style=_DIM)
        text.append(f" {100 * done // row.tasks} %", style=_GOOD)
    return text


def _chart(samples: Sequence[tuple[float, int]], span: float, width: int, height: int) -> list[Text]:
    """The bars with the highest number at their left and the seconds below them."""
    most = max((left for _, left in samples), default=0)
    label = len(str(most)) + 1
    found = []
    for at, bars in enumerate(chart(samples, span, max(width - label - 1, 1), height)):
        number = str(most) if at == 0 else "0" if at == height - 1 else ""
        found.append(Text.assemble((number.rjust(label - 1) + " ┤", _DIM), (bars, _LINE), no_wrap=True))
    end = f"{span:.0f} s"
    axis = "0".ljust(max(width - label - 1 - len(end), 1)) + end
    found.append(Text(" " * (label + 1) + axis, style=_DIM, no_wrap=True, overflow="crop"))
    return found


def _doing(view: View, row: Transition) -> Iterator[Text]:
    """What the kmend that acts has done, or that none does and what would help."""
    acting = view.acting
    if acting is None:
        if view.busy:
            yield Text("a kmend acts on this kernel; its journal cannot be read", style=_WARN)
        else:
            helps = f"kmend signal interrupts sleepers; kmend unload {row.patch} takes it back"
            yield Text("nothing: no kmend acts on this kernel", style=_WARN, no_wrap=True)
            yield Text(printable(helps), style=_DIM, no_wrap=True, overflow="ellipsis")
        return
    waited = view.time - acting.began
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(printable(f"kmend {acting.verb} {acting.patch}"), style="bold")
    text.append(printable(f" of {acting.user} (process {acting.pid}), {waited:.0f} s ago"))
    if acting.wait is not None:
        then = {"reverse": "then it goes back", "wait": "then it waits on", "ask": "then it asks"}
        text.append(f"; waits for up to {acting.wait:g} s, {then.get(acting.on_stall, 'then it ends')}")
    yield text
    for step in acting.steps[-_STEPS:]:
        yield Text.assemble(
            (f"{max(step.time - acting.began, 0):7.1f} s  ", _DIM),
            printable(step.text),
            no_wrap=True,
            overflow="ellipsis",
        )


def _about(view: View, row: Blocker, seen: float) -> tuple[str, str]:
    """What is being done about one task, and its style."""
    if view.acting is not None:
        times = [step.time for step in view.acting.steps if row.task.tid in step.tids]
        if times:
            often = f", {len(times)} times" if len(times) > 1 else ""
            return f"interrupted {view.time - times[-1]:.0f} s ago{often}", _GOOD
        if row.wakeable and not view.acting.wakes:
            return "left to the kernel's signal", _WARN
        if row.wakeable:
            return "about to be interrupted" if seen < _SOON else "not interrupted yet", _DIM
        return "waited for", _WARN
    return "nothing", _DIM


def _tasks(view: View, row: Transition, history: History, room: int, selected: int) -> Table:
    """The blockers around the selected one."""
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True, header_style=_DIM)
    for name, justify in (("PID", "right"), ("THREAD", "right"), ("NAME", "left"), ("S", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]  # a literal by its use
    table.add_column("SEEN", justify="right", no_wrap=True)
    table.add_column("IN", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("DONE ABOUT IT", no_wrap=True, overflow="ellipsis")
    room = max(room, 1)
    start = max(0, min(selected - room // 2, len(row.blockers) - room))
    for at, one in enumerate(row.blockers[start : start + room], start):
        about, style = _about(view, one, history.seen(one))
        task = one.task
        table.add_row(
            str(task.pid),
            str(task.tid) if task.tid != task.pid else "",
            Text(printable(task.name)),
            task.state,
            f"{history.seen(one):.0f} s",
            Text(printable(f"{one.function}()") if one.function else one.cause.value),
            Text(about, style="" if at == selected else style),
            style="reverse" if at == selected else "",
        )
    return table


def _detail(view: View, history: History, row: Blocker) -> Group:
    """Everything about one task."""
    about, style = _about(view, row, history.seen(row))
    lines = [
        Text(printable(f"{row.why} [{row.task.state}]")),
        Text.assemble(("helps: ", _DIM), printable(row.remedy)),
        Text.assemble(
            ("done about it: ", _DIM), (about, style), (f"; seen for {history.seen(row):.0f} s", _DIM)
        ),
        Text(""),
    ]
    if row.task.stack is None:
        lines.append(Text("its stack cannot be read", style=_WARN))
    elif not row.task.stack:
        lines.append(Text("it runs: there is no stack to see", style=_DIM))
    for frame in row.task.stack or ():
        here = bool(row.function) and frame.function == row.function
        lines.append(
            Text(
                printable(str(frame)) + (" ← here" if here else ""),
                style=_BAD if here else "",
                no_wrap=True,
                overflow="ellipsis",
            )
        )
    return Group(*lines)


def _detail_height(row: Blocker, width: int) -> int:
    """How many lines :func:`_detail` wants."""
    room = max(width - 4, 10)
    text = sum(math.ceil((len(words) + 8) / room) for words in (row.why, row.remedy))
    return text + 1 + 1 + max(len(row.task.stack or ()), 1) + 2


# -- no transition -----------------------------------------------------------------------------------


def _still(view: View, history: History, width: int, height: int) -> list[tuple[RenderableType, int]]:
    rows: list[tuple[RenderableType, int]] = []
    patches = [*reversed(view.patches), *view.left]
    if patches:
        rows.append((_panel(_stack(view, patches), "livepatches, top first"), len(patches) + 3))
    else:
        rows.append((_panel(Text("no livepatch is loaded", style=_DIM), "livepatches"), 3))
    lines = [Text(printable(line)) for line in live.kernel_text(view.kernel)]
    rows.append((_panel(Group(*lines), "kernel"), _heights(lines, width)))
    troubles = [Text(printable(line), style=_WARN) for line in view.troubles]
    if troubles:
        rows.append((_panel(Group(*troubles), "to be looked at"), _heights(troubles, width)))
    if view.boot:
        boot = [Text(printable(line)) for line in view.boot]
        rows.append((_panel(Group(*boot), "at boot"), _heights(boot, width)))
    if history.ended is not None:
        ended = history.ended
        bars = _chart(ended.samples, ended.seconds, width - 4, 4)
        rows.append(
            (
                _panel(Group(Text(printable(ended.text), no_wrap=True), *bars), "last transition"),
                len(bars) + 3,
            )
        )
    rest = height - sum(size for _, size in rows)
    if view.recent and rest >= 3:
        recent = [_recent(row) for row in view.recent[-(rest - 2) :]]
        rows.append((_panel(Group(*recent), "kmend's journal"), len(recent) + 2))
    return rows


def _stack(view: View, patches: Sequence[LivePatch]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=_DIM)
    for name in ("#", "NAME", "PHASE", "FUNCTIONS", "OBJECTS", "CVES", "TITLE"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for row in patches:
        style = _GOOD if row.phase is Phase.ENABLED else _DIM if row.phase is Phase.LEFT else _WARN
        note = row.module.note if row.module is not None else {}
        mark = " PINNED" if row.pinned_by else " FORCED" if row.forced else ""
        facts = row.phase.value + (" replaces" if row.replace else "")
        table.add_row(
            str(row.order or ""),
            Text(printable(row.name)),
            Text.assemble((facts, style), (mark, _BAD)),
            str(row.functions) if row.order else "",
            Text(printable(", ".join(one.name for one in row.objects))),
            Text(", ".join(view.cves.get(row.name, ()))),
            Text(printable(str(note.get("title") or ""))),
        )
    return table


def _recent(row: Done) -> Text:
    return Text.assemble(
        (live.moment(row.time)[11:19] + "  ", _DIM), printable(row.text), no_wrap=True, overflow="ellipsis"
    )


# -- frame -------------------------------------------------------------------------------------------


def _head(view: View, width: int) -> Text:
    left = printable(f" kmend status --watch   {view.machine}   {view.kernel.release}")
    right = f"{live.moment(view.time)[11:19]} UTC   ↑↓ choose   q ends "
    room = width - len(left) - len(right)
    text = left + (" " * room + right if room >= 1 else "")
    return Text(text.ljust(width)[:width], style="reverse", no_wrap=True)


def _panel(what: RenderableType, title: str) -> Panel:
    return Panel(what, title=Text(title, style="bold"), title_align="left", border_style=_DIM)


def _heights(lines: Sequence[Text], width: int) -> int:
    """Lines that a panel with these texts takes."""
    room = max(width - 4, 1)
    return 2 + sum(max(1, math.ceil(line.cell_len / room)) for line in lines)
