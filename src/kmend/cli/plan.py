"""``kmend plan``: what loading a livepatch module would do on this machine; changes nothing."""

from __future__ import annotations

import argparse

from kmend.cli.context import Context

EPILOG = """\
Tells whether the module would load here, the func stacks before and after, which patches it replaces, its
callbacks in their order, what else is at the functions' entries (kprobes, BPF programs), which tasks are
inside of functions that change, and whether and when the transition would end.

Exit status: 0 it would load and its transition end; 1 it would be refused, or its transition is not seen to
end, with the reasons; 2 wrong usage; 3 this machine or user cannot do it.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``plan``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("module", metavar="KO", help="livepatch module")
    parser.add_argument(
        "--samples",
        type=_count,
        default=5,
        metavar="N",
        help="how often all tasks are looked at, spread over a second (default: 5)",
    )


def _count(word: str) -> int:
    if not word.isdigit() or not 1 <= int(word) <= 1000:
        raise argparse.ArgumentTypeError(f"{word!r} is no number from 1 to 1000")
    return int(word)


def run(args: argparse.Namespace, context: Context) -> int:
    """Exit status 0: it would load and end; 1: it would be refused or stall."""
    from kmend.plan import plan
    from kmend.report import plan as rendering

    found = plan(context.config, context.progress, args.module, samples=args.samples)
    context.emit(rendering.to_document(found))
    context.say(rendering.to_text(found))
    return 0 if rendering.succeeded(found) else 1
