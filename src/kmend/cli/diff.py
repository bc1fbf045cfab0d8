"""``kmend diff``: compare two object files, without a kernel."""

from __future__ import annotations

import argparse

from kmend.cli.context import Context
from kmend.cli.files import read_file


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``diff``."""
    parser.add_argument("original", metavar="ORIG.o", help="the original object")
    parser.add_argument("patched", metavar="PATCHED.o", help="the patched object")


def run(args: argparse.Namespace, context: Context) -> int:
    """Exit status 0: compared, whatever was found; 1: something could not be understood."""
    from kmend.diff.compare import compare
    from kmend.diff.select import select
    from kmend.diff.unit import UnitObject
    from kmend.report.objects import to_document, to_text

    pair = [
        UnitObject.parse(read_file(name, "an x86-64 object file"), name)
        for name in (args.original, args.patched)
    ]
    diff = compare(pair[0], pair[1])
    selection = select(diff)
    context.emit(to_document(diff, selection))
    context.say(to_text(diff, selection))
    return 0
