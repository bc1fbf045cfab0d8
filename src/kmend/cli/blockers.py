"""``kmend blockers``: the tasks that a transition waits for, where they are, and what helps."""

from __future__ import annotations

import argparse

from kmend.cli.context import Context


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``blockers``."""
    parser.add_argument(
        "--limit",
        type=_count,
        default=1000,
        metavar="N",
        help="look at so many tasks in full; the others are counted (default: 1000)",
    )


def _count(word: str) -> int:
    if not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word!r} is no number")
    return int(word)


def run(args: argparse.Namespace, context: Context) -> int:
    """Exit status 0, whether there are any or not."""
    from kmend.report import live
    from kmend.runtime.observe import observe
    from kmend.runtime.place import Place

    seen = observe(Place(), context.config.state, limit=args.limit)
    context.emit(
        {
            "schema": 1,
            "verb": "blockers",
            "transition": live.transition_document(seen.transition),
            "notes": list(seen.notes),
        }
    )
    if seen.transition is None:
        context.say("no transition is under way")
    else:
        context.say("\n".join(live.blockers_text(seen.transition)))
    for note in seen.notes:
        context.say(f"note: {note}")
    return 0
