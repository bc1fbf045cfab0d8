"""``kmend info``: what a built module holds, or a livepatch of the running kernel."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.cli.context import Context
from kmend.cli.files import read_file
from kmend.core.errors import KmendError
from kmend.core.live import printable
from kmend.core.target import Release

if TYPE_CHECKING:
    from kmend.origin import Origin


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``info``."""
    parser.add_argument(
        "module", metavar="KO-or-NAME", help="a module's file, or the name of a livepatch that is loaded"
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Describe a module from its own bytes; its functions where its kernel is in the cache."""
    if is_name(args.module):
        return loaded(args.module, context)
    from kmend.elf.reader import read
    from kmend.kernel.prepared import open_target
    from kmend.module.describe import describe
    from kmend.origin import of_file
    from kmend.report import live
    from kmend.report.build import to_document
    from kmend.view import TargetView

    data = read_file(args.module, "a livepatch module (.ko)")
    elf = read(data, args.module)
    found = describe(elf, None, args.module)
    try:
        target = open_target(context.config, Release(found.release))
        found = describe(elf, TargetView(context.config, target).layout, args.module)
    except KmendError:
        pass  # without the kernel's layout the rest can still be told
    digest = hashlib.sha256(data).hexdigest()
    origin = of_file(args.module, digest, found.note or {})
    document = {
        "schema": 1,
        "name": found.name,
        "kernel": found.release,
        "vermagic": found.vermagic,
        "sha256": digest,
        "replace": found.replace,
        "note": found.note,
        "modinfo": [list(row) for row in found.info],
        "objects": None
        if found.objects is None
        else [
            {
                "name": o.name,
                "functions": [{"name": f.old_name, "sympos": f.sympos} for f in o.funcs],
                "callbacks": {kind.value: name for kind, name in o.callbacks},
            }
            for o in found.objects
        ],
        "cves": list(origin.cves),
        "report": origin.report_file or None,
        "build_report": None if origin.report is None else to_document(origin.report),
    }
    context.emit(document)
    lines = [f"{found.name} for {found.release}"]
    lines += [f"  {line}" for line in live.note_text(found.note or {})]
    if found.objects is None:
        lines.append("  its functions can be shown once its kernel is in the cache (kmend kernel fetch)")
    else:
        lines.append("  replaces all older livepatches" if found.replace else "  stacks on older livepatches")
        for obj in found.objects:
            names = [f"{f.old_name},{f.sympos}" if f.sympos else f.old_name for f in obj.funcs]
            lines.append(f"  {obj.name}: {', '.join(names) or 'no functions'}")
            lines += [f"    {kind.words} callback: {name}" for kind, name in obj.callbacks]
    lines += [f"  {line}" for line in origin_text(origin)]
    context.say("\n".join(lines))
    return 0


def is_name(word: str) -> bool:
    """Whether it can only be the name of a loaded patch: no file of that name, and none that is missing."""
    return "/" not in word and not word.endswith(".ko") and not Path(word).exists()


def loaded(name: str, context: Context) -> int:
    """Describe a livepatch of the running kernel."""
    from kmend.cli.status import document, origins_of
    from kmend.report import live
    from kmend.report.build import to_document
    from kmend.runtime import refusals
    from kmend.runtime.observe import observe
    from kmend.runtime.place import Place

    seen = observe(Place(), context.config.state, limit=0)
    refusals.known(seen, name)
    origin = origins_of(seen, context)[name]
    report = None if origin.report is None else to_document(origin.report)
    context.emit({**document(seen, {name: origin}, name), "verb": "info", "build_report": report})
    patch = seen.named(name)
    if patch is not None:
        lines = [
            *live.patch_text(patch, every=True),
            *(f"     {line}" for line in live.note_text(origin.note)),
        ]
        lines += [f"     {line}" for line in origin_text(origin)]
        context.say("\n".join(lines))
    return 0


def origin_text(origin: Origin) -> Iterator[str]:
    """From where it was loaded, and what was proved when it was built."""
    from kmend.report.build import rows_text, verified_line
    from kmend.report.live import moment

    if origin.loaded is not None:
        row = origin.loaded
        yield printable(
            f"last load by kmend: {moment(row.time)} UTC by {row.user}, from {row.detail.get('file', '?')}"
        )
    if origin.report is None:
        if origin.note:
            yield "its build report is neither installed nor beside that file"
        return
    yield printable(f"build report: {origin.report_file}")
    yield from (printable(f"  {line}") for line in rows_text(origin.report))
    if origin.report.verified.functions:
        yield printable(f"  {verified_line(origin.report.verified)}")
    for warning in origin.report.warnings:
        yield printable(f"  warning ({warning.rule}): {warning.what}: {warning.why}")
