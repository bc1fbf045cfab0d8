"""``kmend info``: what a built module holds, or a livepatch of the running kernel."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from kmend.cli.context import Context
from kmend.cli.files import read_file
from kmend.core.errors import KmendError
from kmend.core.target import Release


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
    from kmend.view import TargetView

    data = read_file(args.module, "a livepatch module (.ko)")
    elf = read(data, args.module)
    found = describe(elf, None, args.module)
    try:
        target = open_target(context.config, Release(found.release))
        found = describe(elf, TargetView(context.config, target).layout, args.module)
    except KmendError:
        pass  # without the kernel's layout the rest can still be told
    document = {
        "schema": 1,
        "name": found.name,
        "kernel": found.release,
        "vermagic": found.vermagic,
        "sha256": hashlib.sha256(data).hexdigest(),
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
    }
    context.emit(document)
    lines = [f"{found.name} for {found.release}"]
    if found.note:
        lines += [f"  {key}: {value}" for key, value in found.note.items() if value]
    if found.objects is None:
        lines.append("  its functions can be shown once its kernel is in the cache (kmend kernel fetch)")
    else:
        lines.append("  replaces all older livepatches" if found.replace else "  stacks on older livepatches")
        for obj in found.objects:
            names = [f"{f.old_name},{f.sympos}" if f.sympos else f.old_name for f in obj.funcs]
            lines.append(f"  {obj.name}: {', '.join(names) or 'no functions'}")
            lines += [f"    {kind.words} callback: {name}" for kind, name in obj.callbacks]
    context.say("\n".join(lines))
    return 0


def is_name(word: str) -> bool:
    """Whether it can only be the name of a loaded patch: no file of that name, and none that is missing."""
    return "/" not in word and not word.endswith(".ko") and not Path(word).exists()


def loaded(name: str, context: Context) -> int:
    """Describe a livepatch of the running kernel."""
    from kmend.cli.status import chosen, document
    from kmend.report import live
    from kmend.runtime.observe import observe
    from kmend.runtime.place import Place

    seen = observe(Place(), context.config.state, limit=0)
    chosen(seen, name)
    context.emit({**document(seen, name), "verb": "info"})
    for patch in (*seen.patches, *seen.left):
        if patch.name == name:
            for line in live.patch_text(patch, every=True):
                context.say(line)
            for key, value in (patch.module.note if patch.module else {}).items():
                context.say(f"     {key}: {value}")
    return 0
