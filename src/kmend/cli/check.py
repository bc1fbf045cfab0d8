"""``kmend check``: hold a finished module against every rule, with no effect on anything."""

from __future__ import annotations

import argparse

from kmend.cli.context import Context
from kmend.cli.files import read_file
from kmend.core.target import Release


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``check``."""
    parser.add_argument("module", metavar="KO", help="the module")
    parser.add_argument(
        "--kernel", metavar="RELEASE", help="the kernel to hold it against (default: the one of its vermagic)"
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Exit status 0: the module passes; 1: refused, with every reason."""
    from kmend.elf.reader import read
    from kmend.kernel import store
    from kmend.module.describe import describe
    from kmend.view import TargetView

    data = read_file(args.module, "a livepatch module (.ko)")
    description = describe(read(data, args.module), None, args.module)
    target = store.open_target(
        context.config, Release(description.release if args.kernel is None else args.kernel)
    )
    checked = TargetView(context.config, target).check(data, args.module)
    context.emit(
        {
            "schema": 1,
            "name": checked.description.name,
            "kernel": target.release,
            "result": "refused" if checked.refusals else "passed",
            "checked": checked.checked,
            "refused": [
                {"rule": r.rule, "what": r.what, "why": r.why, "next_step": r.next_step}
                for r in checked.refusals
            ],
            "warnings": [
                {"rule": r.rule, "what": r.what, "why": r.why, "next_step": r.next_step}
                for r in checked.warnings
            ],
        }
    )
    for row in checked.refusals:
        context.say(f"refused  {row.rule}: {row.what}\n  why:  {row.why}\n  next: {row.next_step}")
    for row in checked.warnings:
        context.say(f"warning  {row.rule}: {row.what}\n  why:  {row.why}\n  next: {row.next_step}")
    looked = ", ".join(f"{number} {what}" for what, number in checked.checked.items())
    context.say(f"{args.module} for {target.release}: {len(checked.refusals)} objections ({looked})")
    return 1 if checked.refusals else 0
