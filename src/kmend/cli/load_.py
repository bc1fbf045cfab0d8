"""``kmend load``: check a livepatch module (or all that are installed), load it, end its transition."""

from __future__ import annotations

import argparse

from kmend.cli.acting import add_flags, each, following, manager
from kmend.cli.context import Context
from kmend.core.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``load``."""
    parser.add_argument(
        "module", nargs="*", metavar="KO", help="livepatch module; several load in this order"
    )
    parser.add_argument(
        "--all", action="store_true", help="everything that is installed for the running kernel, in its order"
    )
    parser.add_argument(
        "--boot",
        action="store_true",
        help="with --all: the machine starts; if `kmend healthy` does not follow, the next boot loads "
        "nothing",
    )
    parser.add_argument(
        "--retry",
        action="store_true",
        help="with --all: also after a boot that was never found to be healthy",
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the module; may be given several times",
    )
    add_flags(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Exit status 0: every module is in force; 1: one was refused, or was taken back."""
    how = following(args, 2 if args.all else len(args.module))
    if (
        args.all == bool(args.module)
        or (not args.all and (args.boot or args.retry))
        or (args.all and args.param)
    ):
        raise UsageError(
            "no module is named"
            if not args.all and not args.module
            else "these arguments exclude each other",
            why="modules with --param, or --all with --boot and --retry",
            next_step="kmend load --help",
            rule="usage",
        )
    if args.all:
        from kmend.cli.install import load_all

        return load_all(args, how, context)
    machine = manager(context)
    parameters = " ".join(args.param)
    return each("load", args.module, lambda name: machine.load(name, how, parameters), context, args.report)
