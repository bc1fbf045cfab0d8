"""``kmend force`` and ``kmend signal``: the kernel's last resorts for a transition that does not end."""

from __future__ import annotations

import argparse

from kmend.cli.acting import add_report, each, manager
from kmend.cli.context import Context


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the two verbs."""
    if parser.prog.split()[-1] == "force":
        parser.add_argument("name", metavar="NAME", help="livepatch in transition")
        parser.add_argument(
            "--yes-i-know",
            action="store_true",
            help="do it; without this flag, show only which tasks are in which function",
        )
    else:
        parser.add_argument("name", metavar="NAME", nargs="?", help="livepatch in transition")
        parser.add_argument(
            "--interrupt-io-uring",
            action="store_true",
            help="interrupt also tasks in io_uring_enter(), even where its call then returns early",
        )
    add_report(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Exit status 0: done; 1: not confirmed, no transition, or refused by the kernel."""
    machine = manager(context)
    if args.verb == "force":
        return each(
            "force",
            [args.name],
            lambda name: machine.force(name, confirmed=args.yes_i_know),
            context,
            args.report,
        )
    return each(
        "signal",
        [args.name or ""],
        lambda name: machine.signal(name or None, io_uring=args.interrupt_io_uring),
        context,
        args.report,
    )
