"""``kmend klp``: the model of the kernel's livepatch core, to be looked at."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmend.cli.context import Context

if TYPE_CHECKING:
    from kmend.klp.demo import Timeline


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``klp``."""
    from kmend.cli import Parser, common_flags
    from kmend.klp.demo import DEMOS
    from kmend.klp.line import LINES

    verbs: Any = parser.add_subparsers(dest="klp_verb", metavar="WHAT", required=True, parser_class=Parser)
    demo = verbs.add_parser(
        "demo",
        parents=[common_flags()],
        help="walk through a scenario step by step",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Walks a scenario of the livepatch core step by step: func stacks, task states, log.\n"
        "Nothing is loaded anywhere: the scenario runs on kmend's model of kernel/livepatch/.",
        epilog="scenarios:\n" + "\n".join(f"  {row.name:12} {row.title}" for row in DEMOS),
    )
    demo.add_argument("scenario", metavar="SCENARIO", choices=[row.name for row in DEMOS], help="see below")
    demo.add_argument(
        "--line", choices=list(LINES), default="6.1", help="which kernel line's rules (default: 6.1)"
    )
    demo.add_argument("--svg", metavar="FILE", help="write the timeline as a picture")
    demo.add_argument("--html", metavar="FILE", help="write the timeline as a page")
    demo.add_argument("--pause", action="store_true", help="wait for Enter after each step")


def run(args: argparse.Namespace, context: Context) -> int:
    """Play a scenario and show it."""
    from kmend.core.files import write_atomically
    from kmend.klp.demo import BY_NAME, play
    from kmend.klp.line import LINES
    from kmend.klp.timeline import to_document, to_html, to_svg

    timeline = play(BY_NAME[args.scenario], LINES[args.line])
    if args.svg:
        write_atomically(Path(args.svg), to_svg(timeline).encode())
    if args.html:
        write_atomically(Path(args.html), to_html(timeline).encode())
    context.emit(to_document(timeline))
    if not (context.json and context.quiet):
        walk(timeline, context, pause=args.pause)
    return 0


def walk(timeline: Timeline, context: Context, *, pause: bool) -> None:
    """The moments one after the other: coloured on a terminal, plain elsewhere."""
    from kmend.klp.timeline import heading, lines_of

    out = sys.stderr if context.json else sys.stdout
    blocks = [[heading(timeline)], *(lines_of(timeline, moment) for moment in timeline.moments)]
    wait = pause and sys.stdin.isatty()
    for block in blocks:
        if out.isatty():
            _coloured(block, context)
        else:
            context.say("\n".join(block))
            context.say("")
        if wait and block is not blocks[-1]:
            sys.stdin.readline()


def _coloured(block: list[str], context: Context) -> None:
    from rich.console import Console
    from rich.text import Text

    context.progress.close()
    console = Console(stderr=context.json, highlight=False)
    for i, line in enumerate(block):
        text = Text(line, style="bold" if not i else "")
        text.highlight_regex(r"KLP_(TRANSITION_)?UNPATCHED.*", "yellow")
        text.highlight_regex(r"KLP_(TRANSITION_)?PATCHED.*", "cyan")
        text.highlight_regex(r"\bnop\b|\(in transition\)", "magenta")
        if line.startswith("    log "):
            text.stylize("dim")
        console.print(text, soft_wrap=True)
    console.print()
