"""``kmend load``: check a livepatch module, load it, bring its transition to its end."""

from __future__ import annotations

import argparse

from kmend.cli.acting import add_flags, each, following, manager
from kmend.cli.context import Context


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``load``."""
    parser.add_argument(
        "module", nargs="+", metavar="KO", help="livepatch module; several load in this order"
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
    how = following(args)
    machine = manager(context)
    parameters = " ".join(args.param)
    return each("load", args.module, lambda name: machine.load(name, how, parameters), context)
