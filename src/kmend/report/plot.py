"""A plot of a transition: tasks that have not switched, over time, with what was done. Geometry alone.

:func:`plot` computes where everything lies, in the units of an SVG view box; whoever renders it only has to
write the numbers down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kmend.core.live import ActionReport, End, Followed, Phase

WIDTH, HEIGHT = 960, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 34, 40
#: More points than this cannot be told apart in the picture; where tasks switch, none is left out.
POINTS = 1000
#: So many looks are shown as dots, each by itself.
LOOKS = 100
#: Marks closer than this share one label.
_APART = 18.0


@dataclass(frozen=True, slots=True)
class Tick:
    """A line of the grid: where it lies, and its label."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Curve:
    """One transition that was followed: an outline, the area below it, and a sentence.

    ``looks`` are the places of the looks at all tasks; empty when there were too many to be told apart.
    """

    line: str
    area: str
    direction: str
    caption: str
    middle: float
    looks: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line with the numbers of the steps that were done there."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Plot:
    """Everything that the picture is made of."""

    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def plot(report: ActionReport) -> Plot | None:
    """The picture of an action; None when no transition was watched in it."""
    watched = [row for row in report.followed if row.samples]
    if not watched:
        return None
    span = max(report.seconds, *(row.began + row.seconds for row in watched), 0.1)
    most = max(sample.left for row in watched for sample in row.samples)
    x_ticks, y_ticks = _nice(span), _nice(max(most, 1), whole=True)
    top = max(most, y_ticks[-1], 1)

    def x(seconds: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * min(max(seconds, 0.0), span) / span, 1)

    def y(number: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * number / top, 1)

    curves = []
    for row in watched:
        places = [(x(seconds), y(left)) for seconds, left in points(row)]
        curves.append(
            Curve(
                line=_steps(places),
                area=f"{_steps(places)} L{places[-1][0]} {y(0)} L{places[0][0]} {y(0)} Z",
                direction="unpatching" if row.goal is Phase.UNPATCHING else "patching",
                caption=f"{'unpatching' if row.goal is Phase.UNPATCHING else 'patching'}: {row.end.value}"
                f" after {row.seconds:.1f} s",
                middle=round((places[0][0] + places[-1][0]) / 2, 1),
                looks=tuple((x(row.began + one.seconds), y(one.left)) for one in row.samples)
                if len(row.samples) <= LOOKS
                else (),
            )
        )
    marks = _marks([(x(step.seconds), str(at)) for at, step in enumerate(report.steps, 1)])
    return Plot(
        tuple(curves),
        tuple(marks),
        tuple(Tick(x(value), f"{value:g}") for value in x_ticks),
        tuple(Tick(y(value), f"{value:g}") for value in y_ticks),
    )


def points(row: Followed) -> list[tuple[float, int]]:
    """(seconds since the action began, tasks left): every change, thinned out where nothing changes."""
    found = [(row.began + sample.seconds, sample.left) for sample in row.samples]
    # what was left before the first look is not known: no less than what it found
    found.insert(0, (row.began, found[0][1]))
    found.append((row.began + row.seconds, 0 if row.end is End.COMPLETE else found[-1][1]))
    if len(found) <= POINTS:
        return found
    kept = [
        one
        for at, one in enumerate(found)
        if at in (0, len(found) - 1) or one[1] != found[at - 1][1] or one[1] != found[at + 1][1]
    ]
    every = math.ceil(len(kept) / POINTS)
    return [*kept[:-1:every], kept[-1]]


def _steps(places: Sequence[tuple[float, float]]) -> str:
    """An outline as an SVG path: a number holds until the next look."""
    words = [f"M{places[0][0]} {places[0][1]}"]
    for at, height in places[1:]:
        words.append(f"H{at} V{height}")
    return " ".join(words)


def _marks(places: Iterable[tuple[float, str]]) -> list[Mark]:
    """Steps that lie close together share a label: ``2-4``."""
    groups: list[tuple[float, list[str]]] = []
    for at, label in places:
        if groups and at - groups[-1][0] < _APART:
            groups[-1][1].append(label)
        else:
            groups.append((at, [label]))
    return [Mark(at, labels[0] if len(labels) == 1 else f"{labels[0]}–{labels[-1]}") for at, labels in groups]


def _nice(span: float, *, whole: bool = False) -> list[float]:
    """Round numbers from 0 up to the span, at most eight."""
    rough = span / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    if whole:
        step = max(1.0, step)
    return [round(step * at, 6) for at in range(math.floor(span / step + 1e-9) + 1)]
