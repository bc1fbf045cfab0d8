"""A played demo as lines of text, as a document, as an SVG picture and as an HTML page."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from enum import Enum
from html import escape

from kmend.klp.demo import Moment, Timeline, describe
from kmend.klp.outcome import FuncView, StackView, TaskView


class Look(Enum):
    """How something is drawn: its colour says what its words say as well."""

    IDLE = "#e3e3e3"
    UNPATCHED = "#f5c26b"
    PATCHED = "#8fc9ea"
    NOP = "#ffffff"
    ORIGINAL = "#f4f4f4"


STATES = {-1: ("–", Look.IDLE), 0: ("unpatched", Look.UNPATCHED), 1: ("patched", Look.PATCHED)}
#: Sizes of the picture, in pixels.
LABEL, COLUMN, TASK, FUNC, GAP, CAPTION = 96, 166, 40, 22, 6, 14
FONT = 'font-family="DejaVu Sans, Helvetica, Arial, sans-serif"'
LEGEND = "grey: no transition · orange: unpatched · blue: patched · dashed: asked to switch, in transition"
#: Letters that fit into a column, in the captions' size.
LETTERS = 24


def owner(frame: str) -> tuple[str, str]:
    """A frame ``FUNCTION [OWNER]`` in its two parts."""
    name, _, rest = frame.partition(" [")
    return name, rest.rstrip("]")


def where(timeline: Timeline, task: TaskView) -> str:
    """Where a task is, in words: ``f: original``, ``f: p1``, ``user space``."""
    if not task.frames:
        return "user space"
    name, version = owner(task.frames[-1])
    patched = any(patch.name == version for patch in timeline.demo.patches)
    return f"{name}: {version if patched else 'original'}"


def tasks(timeline: Timeline, moment: Moment) -> tuple[TaskView, ...]:
    """The tasks that the demo is about."""
    names = {task.name for task in timeline.demo.tasks}
    return tuple(task for task in moment.state.tasks if task.name.rpartition(":")[0] in names)


def _func(func: FuncView) -> str:
    return func.patch + (" nop" if func.nop else "") + (" (in transition)" if func.transition else "")


def stack_line(stack: StackView) -> str:
    """``f: p2 (in transition) > p1 > original``, top first."""
    return f"{stack.function}: {' > '.join([*map(_func, stack.funcs), 'original'])}"


def heading(timeline: Timeline) -> str:
    """The title with the kernel line."""
    return f"{timeline.demo.title} (kernel {timeline.line.name})"


def lines_of(timeline: Timeline, moment: Moment) -> list[str]:
    """A moment as lines of text, the step first."""
    head = f"[{moment.seconds:6.2f} s] {moment.what}"
    lines = [head + (f": {moment.result}" if moment.result else "")]
    lines += textwrap.wrap(moment.words, 88, initial_indent="    ", subsequent_indent="    ")
    names = timeline.line.state_names
    for task in tasks(timeline, moment):
        pending = ", asked to switch" if task.pending else ""
        name = task.name.rpartition(":")[0]
        lines.append(f"    task {name:8} {where(timeline, task):16} {names[task.patch_state + 1]}{pending}")
    lines += [f"    func_stack    {stack_line(stack)}" for stack in moment.state.stacks]
    lines += [f"    shadow        {obj}, {id_}: {value}" for obj, id_, value in moment.shadows]
    lines += [f"    log           {text}" for text in moment.log]
    return lines


def to_text(timeline: Timeline) -> str:
    """All moments."""
    blocks = [heading(timeline), *("\n".join(lines_of(timeline, moment)) for moment in timeline.moments)]
    return "\n\n".join(blocks) + "\n"


def to_document(timeline: Timeline) -> dict[str, object]:
    """Schema 1: the scenario's name, and the moments as they are."""
    return {
        "schema": 1,
        "scenario": timeline.demo.name,
        "title": timeline.demo.title,
        "kernel": timeline.line.name,
        "steps": [describe(part.step) for part in timeline.demo.parts],
        "moments": [asdict(moment) for moment in timeline.moments],
    }


def _text(x: float, y: float, text: str, *, size: int = 11, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{more}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, look: Look, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
        f'fill="{look.value}" stroke="#333" stroke-width="1"{dash}/>'
    )


def to_svg(timeline: Timeline) -> str:
    """A column per moment: what happened, the tasks, the func stacks. A dashed edge: in transition."""
    moments = timeline.moments
    captions = [_caption(moment) for moment in moments]
    names = [task.name for task in tasks(timeline, moments[0])]
    functions = _functions(timeline)
    shadows = max(len(moment.shadows) for moment in moments)
    width = LABEL + COLUMN * len(moments) + GAP
    y_tasks = 58 + CAPTION * max(map(len, captions)) + GAP
    y_funcs = y_tasks + (TASK + GAP) * len(names) + 2 * GAP
    heights = {name: (depth + 1) * FUNC + 3 * GAP for name, depth in functions.items()}
    y_shadows = y_funcs + sum(heights.values())
    height = y_shadows + shadows * FUNC + 4 * GAP + 16
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" {FONT} role="img">',
        f"<title>{escape(heading(timeline))}</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        _text(8, 20, heading(timeline), size=14, more=' font-weight="bold"'),
    ]
    for i, name in enumerate(names):
        y = y_tasks + i * (TASK + GAP)
        out.append(_text(8, y + TASK / 2 + 4, f"task {name.rpartition(':')[0]}"))
    y = y_funcs
    for name in functions:
        out.append(_text(8, y + FUNC - 6, f"{name}()"))
        y += heights[name]
    if shadows:
        out.append(_text(8, y_shadows + FUNC - 6, "shadow"))
    for i, (moment, caption) in enumerate(zip(moments, captions, strict=True)):
        x = LABEL + i * COLUMN
        out.append(_text(x + 2, 42, f"{moment.seconds:g} s", size=10, more=' fill="#555"'))
        for j, (line, bold) in enumerate(caption):
            weight = ' font-weight="bold"' if bold else ""
            out.append(_text(x + 2, 58 + j * CAPTION, line, more=weight))
        for j, task in enumerate(tasks(timeline, moment)):
            out += _task(timeline, task, x, y_tasks + j * (TASK + GAP))
        y = y_funcs
        found = {stack.function: stack for stack in moment.state.stacks}
        for name, depth in functions.items():
            out += _stack(found.get(name), depth, x, y, absent=_absent(timeline, moment, name))
            y += heights[name]
        for j, (obj, id_, value) in enumerate(moment.shadows):
            out.append(_box(x, y_shadows + j * FUNC, COLUMN - GAP, FUNC - 3, Look.IDLE))
            out.append(_text(x + 6, y_shadows + j * FUNC + 14, f"{obj}, {id_}: {value}"))
    out.append(_text(8, height - 8, LEGEND, size=10, more=' fill="#555"'))
    return "\n".join([*out, "</svg>"]) + "\n"


def _caption(moment: Moment) -> list[tuple[str, bool]]:
    """The lines over a column, and whether they are bold."""
    lines = [(line, True) for line in textwrap.wrap(moment.what, LETTERS)]
    return lines + [(line, False) for line in textwrap.wrap(moment.result, LETTERS)]


def _functions(timeline: Timeline) -> dict[str, int]:
    """The functions that any patch redirects in this demo, and their highest func stack."""
    found = {func.old_name: 0 for patch in timeline.demo.patches for obj in patch.objs for func in obj.funcs}
    for moment in timeline.moments:
        for stack in moment.state.stacks:
            found[stack.function] = max(found.get(stack.function, 0), len(stack.funcs))
    return found


def _task(timeline: Timeline, task: TaskView, x: float, y: float) -> list[str]:
    state, look = STATES[task.patch_state]
    return [
        _box(x, y, COLUMN - GAP, TASK, look, dashed=task.pending),
        _text(x + 6, y + 16, where(timeline, task)),
        _text(x + 6, y + 32, state, size=10, more=' fill="#333"'),
    ]


def _absent(timeline: Timeline, moment: Moment, function: str) -> bool:
    """Whether the function is one of a module that is not loaded."""
    loaded = {module.name for module in moment.state.modules}
    return any(function in decl.functions and decl.name not in loaded for decl in timeline.demo.modules)


def _stack(stack: StackView | None, depth: int, x: float, y: float, *, absent: bool) -> list[str]:
    """A func stack, its bottom (the original) always at the same height."""
    funcs = stack.funcs if stack else ()
    out = []
    for i, func in enumerate(funcs):
        at = y + (depth - len(funcs) + i) * FUNC
        look = Look.NOP if func.nop else Look.PATCHED
        out.append(_box(x, at, COLUMN - GAP, FUNC - 3, look, dashed=func.transition))
        out.append(_text(x + 6, at + 14, func.patch + (": nop" if func.nop else "")))
    at = y + depth * FUNC
    if absent:
        return [_text(x + 6, at + 14, "not loaded", more=' fill="#555"')]
    out.append(_box(x, at, COLUMN - GAP, FUNC - 3, Look.ORIGINAL))
    out.append(_text(x + 6, at + 14, "original"))
    return out


STYLE = """
body { font-family: sans-serif; margin: 2em; color: #222; background: #fff; }
figure { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; }
td, th { border: 1px solid #bbb; padding: 0.3em 0.6em; vertical-align: top; text-align: left; }
pre { margin: 0; white-space: pre-wrap; }
"""


def to_html(timeline: Timeline) -> str:
    """A page that needs nothing else: the picture, and a row per moment with words and log."""
    rows = []
    for moment in timeline.moments:
        stacks = "\n".join(stack_line(stack) for stack in moment.state.stacks)
        what = escape(moment.what) + (f"<br><b>{escape(moment.result)}</b>" if moment.result else "")
        log = escape("\n".join(moment.log))
        rows.append(
            f"<tr><td>{moment.seconds:g} s</td><td>{what}</td><td>{escape(moment.words)}</td>"
            f"<td><pre>{escape(stacks)}</pre></td><td><pre>{log}</pre></td></tr>"
        )
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(heading(timeline))}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{escape(heading(timeline))}</h1>\n"
        f"<figure>\n{to_svg(timeline)}</figure>\n"
        "<table><thead><tr><th>Time</th><th>Step</th><th>What is to be seen</th><th>Func stacks</th>"
        "<th>Kernel log</th></tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>\n</body></html>\n"
    )
