"""``kmend build``: patch files to a livepatch module and its report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kmend.cli import output
from kmend.cli.context import Context
from kmend.cli.files import read_file
from kmend.core.errors import UsageError
from kmend.core.report import Outcome


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``build``."""
    parser.add_argument("patch", nargs="+", help="patch file, or a quilt series file; - is standard input")
    output.configure(parser, name="from the first patch file")
    parser.add_argument(
        "--no-replace",
        action="store_true",
        help="leave older livepatches in force (default: replace them)",
    )
    parser.add_argument(
        "--fuzz", type=_number, default=0, metavar="N", help="ignore up to N context lines (default: none)"
    )
    parser.add_argument(
        "-p", "--strip", type=_number, metavar="N", help="leading folders to take off the names in the patch"
    )
    parser.add_argument(
        "--allow",
        metavar="RULE",
        action="append",
        default=[],
        help="build although this rule refuses (docs/refusals.md says which a human may decide; repeatable)",
    )


def _number(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def run(args: argparse.Namespace, context: Context) -> int:
    """Build; exit status 0 for built and nothing changed, 1 for refused and failed."""
    from kmend.pipeline import BuildRequest, build
    from kmend.report.build import to_document, to_text
    from kmend.verify.allow import checked

    signing, folder = output.signing(args), output.folder(args)
    patches, strip = read_patches(args.patch, args.strip)
    request = BuildRequest(
        patches=patches,
        release=output.release(args),
        output=folder,
        name=args.name,
        replace=not args.no_replace,
        fuzz=args.fuzz,
        strip=strip,
        signing=signing,
        allow=checked(args.allow),
    )
    report = build(request, context.config, context.progress)
    context.emit(to_document(report))
    context.say(to_text(report))
    return 0 if report.result in (Outcome.BUILT, Outcome.NOTHING_CHANGED) else 1


def read_patches(
    names: list[str], strip: int | None = None
) -> tuple[tuple[tuple[str, bytes], ...], dict[str, int]]:
    """The patch files, and what to strip of the names in them (``-p``).

    A quilt ``series`` stands for its files. A ``-pN`` behind a patch in the series counts for that
    patch, ``strip`` for all others.

    Raises:
        UsageError: a file cannot be read; the series names none.
    """
    from kmend.patch.intake import read_series

    out: list[tuple[str, bytes]] = []
    strips: dict[str, int] = {}

    def add(path: Path, level: int | None) -> None:
        out.append((str(path), _read(path)))
        if level is not None:
            strips[str(path)] = level

    for name in names:
        path = Path(name)
        if path.name != "series":
            add(path, strip)
            continue
        entries = read_series(_read(path).decode(errors="replace"))
        if not entries:
            raise UsageError(
                f"{name} names no patch",
                why="every line of it is empty or a comment",
                next_step="name a patch file, or a series with patches in it",
                rule="series",
            )
        for entry in entries:
            add(path.parent / entry.name, strip if entry.strip is None else entry.strip)
    return tuple(out), strips


def _read(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read()
    return read_file(str(path), "a patch file")
