"""``kmend unload``, ``disable``, ``enable``: take a patch back, and bring it into force again."""

from __future__ import annotations

import argparse

from kmend.cli.acting import add_flags, each, following, manager
from kmend.cli.context import Context
from kmend.core.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the three verbs."""
    parser.add_argument("name", nargs="*", metavar="NAME", help="livepatch, as `kmend list` shows it")
    if parser.prog.split()[-1] == "unload":
        parser.add_argument("--all", action="store_true", help="all, from the top of the stack down")
    add_flags(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Exit status 0: every patch is as asked for; 1: one is not, and is as it was before."""
    machine = manager(context)
    everything = getattr(args, "all", False)
    if everything == bool(args.name):
        raise UsageError(
            "no livepatch is named" if not args.name else "--all and names exclude each other",
            why="one of the two is needed",
            next_step="kmend list",
            rule="usage",
        )
    names = machine.loaded() if everything else tuple(name.removesuffix(".ko") for name in args.name)
    how = following(args, len(names))
    if not names:
        machine.close_killed("unload --all")
    match args.verb:
        case "unload":
            return each("unload", names, lambda name: machine.unload(name, how), context, args.report)
        case "disable":
            return each("disable", names, lambda name: machine.disable(name, how), context, args.report)
        case _:
            return each("enable", names, lambda name: machine.enable(name, how), context, args.report)
