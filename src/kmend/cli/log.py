"""``kmend log``: what kmend did and what the kernel said about livepatching, by time."""

from __future__ import annotations

import argparse

from kmend.cli.context import Context


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``log``."""
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="only what was done with this patch, and what the kernel said",
    )
    parser.add_argument("-n", "--lines", type=int, metavar="N", help="only the last N lines")


def run(args: argparse.Namespace, context: Context) -> int:
    """Exit status 0; what cannot be read is named, and the rest is shown."""
    from kmend.report import live
    from kmend.runtime.observe import about, read_log
    from kmend.runtime.place import Place

    rows, notes = read_log(Place(), context.config.state)
    if args.name:
        rows = about(rows, args.name)
    if args.lines is not None:
        rows = rows[-args.lines :] if args.lines > 0 else ()
    context.emit(
        {
            "schema": 1,
            "verb": "log",
            "entries": [live.log_document(row) for row in rows],
            "notes": list(notes),
        }
    )
    if not rows:
        context.say("nothing has been logged")
    for line in (*(live.log_line(row) for row in rows), *(f"note: {note}" for note in notes)):
        context.say(line)
    return 0
