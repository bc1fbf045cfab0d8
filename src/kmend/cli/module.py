"""``kmend module``: replacement functions written by hand to a livepatch module; or a beginning of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from kmend.cli import output
from kmend.cli.context import Context
from kmend.core.errors import UsageError
from kmend.core.report import Outcome


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``module``."""
    parser.add_argument(
        "path",
        nargs="?",
        metavar="DIR-or-TOML",
        help="a folder with C files and kmend.toml, such a file, or a C file with its own module_init",
    )
    output.configure(parser, name="from kmend.toml, or the folder's")
    new = parser.add_argument_group("a beginning")
    new.add_argument("--new", metavar="NAME", help="make a folder NAME to begin with, instead of building")
    new.add_argument(
        "--func", metavar="FUNCTION", action="append", help="a function to be replaced (repeatable)"
    )
    new.add_argument("--object", metavar="MODULE", default="vmlinux", help="where it is (default: vmlinux)")
    new.add_argument("--source", metavar="FILE", help="the source file, where several define the function")


def run(args: argparse.Namespace, context: Context) -> int:
    """Build, or write a beginning; exit status 0 when done, 1 for refused and failed."""
    if args.new is not None:
        return _new(args, context)
    from kmend.handmade import ModuleRequest, build_module
    from kmend.report.build import to_document, to_text

    if args.path is None or args.func or args.source:
        raise UsageError(
            "kmend module needs a folder, or --new NAME --func FUNCTION",
            why="--func and --source belong to --new" if args.path else "nothing says what to build",
            next_step="see `kmend module --help`",
            rule="usage",
        )
    request = ModuleRequest(
        path=Path(args.path),
        release=output.release(args),
        output=output.folder(args),
        name=args.name,
        signing=output.signing(args),
    )
    report = build_module(request, context.config, context.progress)
    context.emit(to_document(report))
    context.say(to_text(report))
    return 0 if report.result is Outcome.BUILT else 1


def _new(args: argparse.Namespace, context: Context) -> int:
    from kmend.scaffold import Beginning, begin

    if args.path is not None or not args.func:
        raise UsageError(
            "--new wants at least one --func, and no folder to build",
            why="it writes a new folder with the text of those functions",
            next_step="kmend module --new my_fix --func vfs_read",
            rule="usage",
        )
    made = begin(
        Beginning(
            name=args.new,
            functions=tuple(args.func),
            obj=args.object,
            release=output.release(args),
            output=output.folder(args),
            source=args.source,
        ),
        context.config,
        context.progress,
    )
    context.emit(
        {
            "schema": 1,
            "folder": str(made.folder),
            "files": list(made.files),
            "functions": [{"name": name, "source": source} for name, source in made.functions],
            "notes": list(made.notes),
        }
    )
    lines = [f"{made.folder}: {', '.join(made.files)}"]
    lines += [f"  {name} from {source}" for name, source in made.functions]
    lines += [f"  note: {note}" for note in made.notes]
    lines.append(f"change the text, then: kmend module {made.folder} --kernel {output.release(args)}")
    context.say("\n".join(lines))
    return 0
