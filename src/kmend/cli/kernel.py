"""``kmend kernel fetch|list|show``: the target kernels in the cache."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from kmend.cli.context import Context
from kmend.core.errors import UsageError
from kmend.core.target import Release, Target

#: Flags that make ``fetch`` a custom target: name, kind of path, whether it is needed, help.
CUSTOM_FLAGS = (
    ("source", "DIR", True, "the tree that the kernel was built from (copied, never changed)"),
    ("config", "FILE", True, "its configuration"),
    ("vmlinux", "FILE", True, "its vmlinux, or its bzImage"),
    ("modules", "DIR", False, "its modules: the folder lib/modules/RELEASE"),
    ("symvers", "FILE", False, "its Module.symvers, when it is not in the source"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``kmend kernel``."""
    from kmend.cli import Parser, common_flags

    common = common_flags()
    actions: Any = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    fetch = actions.add_parser(
        "fetch",
        parents=[common],
        help="download, verify and prepare a kernel",
        description="Make a kernel ready to be built for and tried. A release name is looked up in Debian's "
        "archive (then in the snapshot archive); with --source, --config and --vmlinux "
        "a kernel of your own is prepared, whose name is then RELEASE@custom.",
    )
    fetch.add_argument(
        "release", metavar="RELEASE", nargs="?", help="as `uname -r` prints it (default: the running kernel)"
    )
    group = fetch.add_argument_group("a kernel of your own")
    for name, kind, _needed, text in CUSTOM_FLAGS:
        group.add_argument(f"--{name}", metavar=kind, type=Path, help=text)
    actions.add_parser(
        "list", parents=[common], help="the prepared kernels", description="The prepared kernels."
    )
    show = actions.add_parser(
        "show",
        parents=[common],
        help="all about one prepared kernel",
        description="All about one prepared kernel: its identity, its files, its size, and whether this "
        "machine's compiler is the one that built it.",
    )
    show.add_argument("release", metavar="RELEASE", nargs="?", help="default: the running kernel")


def run(args: argparse.Namespace, context: Context) -> int:
    """Do what ``args.action`` says; 0, or the error's status."""
    from kmend.kernel import store
    from kmend.kernel.store import size_on_disk

    match args.action:
        case "fetch":
            from kmend.view import TargetView

            target = fetch(args, context)
            TargetView(context.config, target).glue()  # else the first build would have to compile it
            document = describe(target)
            context.emit({"schema": 1, "result": "ready", "target": document})
            if not context.json:
                context.say(f"{store.name_of(target)} is ready: {target.version}\n  {target.folder}")
        case "list":
            rows = [describe(target) for target in store.list_targets(context.config)]
            context.emit({"schema": 1, "cache": str(context.config.cache), "targets": rows})
            if not context.json:
                context.say(table(rows, context.config.targets))
        case "show":
            target = store.open_target(
                context.config, Release(os.uname().release if args.release is None else args.release)
            )
            document = {**describe(target), "size": size_on_disk(target.folder)}
            context.emit({"schema": 1, "target": document})
            if not context.json:
                context.say(sheet(document))
        case other:
            raise UsageError(f"no action {other!r}", next_step="see `kmend kernel --help`", rule="usage")
    return 0


def fetch(args: argparse.Namespace, context: Context) -> Target:
    """A packaged kernel, or one of the user's own parts when any of :data:`CUSTOM_FLAGS` is given."""
    from kmend.kernel import store

    given = {name: getattr(args, name) for name, *_ in CUSTOM_FLAGS if getattr(args, name) is not None}
    if not given:
        release = Release(os.uname().release if args.release is None else args.release)
        return store.fetch_packaged(context.config, release, context.progress)
    lacking = [f"--{name}" for name, _kind, needed, _text in CUSTOM_FLAGS if needed and name not in given]
    if lacking:
        raise UsageError(
            f"a kernel of your own needs {' and '.join(lacking)} too",
            why="source, configuration and vmlinux of one build make a target",
            next_step="see `kmend kernel fetch --help`",
            rule="usage",
        )
    paths = {name: path.absolute() for name, path in given.items()}
    target = store.custom(
        context.config,
        source=paths["source"],
        config_file=paths["config"],
        vmlinux=paths["vmlinux"],
        modules=paths.get("modules"),
        symvers=paths.get("symvers"),
        progress=context.progress,
    )
    if args.release and args.release not in (target.release, store.name_of(target)):
        context.say(
            f"note: the vmlinux is that of {target.release}, not of {args.release}; "
            f"its name is {store.name_of(target)}"
        )
    return target


def describe(target: Target) -> dict[str, object]:
    """The JSON form of a target."""
    from kmend.kernel import prepare, store

    record = store.record_of(target)
    refusal = prepare.compiler_matches(target)
    return {
        "name": store.name_of(target),
        "release": target.release,
        "source_version": target.source_version,
        "version": target.version,
        "build_id": target.build_id,
        "banner": target.banner,
        "compiler": {
            "command": target.compiler,
            "matches": refusal is None,
            "why": refusal.why if refusal else "",
            "next_step": refusal.next_step if refusal else "",
        },
        "paths": {
            name: str(path) if path else None
            for name, path in (
                ("folder", target.folder),
                ("source", target.source),
                ("config", target.config),
                ("symvers", target.symvers),
                ("vmlinux", target.vmlinux),
                ("vmlinuz", target.vmlinuz),
                ("modules", target.modules),
            )
        },
        "size": record.get("size"),
        "origin": record.get("origin", ""),
        "packages": record.get("packages", []),
        "inputs": record.get("inputs", {}),
        "prepared_in": record.get("seconds"),
    }


def human(size: object) -> str:
    """Bytes as gigabytes for people."""
    return f"{size / 1e9:.2f} GB" if isinstance(size, int) else "?"


def table(rows: list[dict[str, object]], folder: Path) -> str:
    """The prepared kernels for people."""
    if not rows:
        return f"no kernel is prepared in {folder}; `kmend kernel fetch RELEASE` prepares one"
    lines = [("RELEASE", "VERSION", "BUILD ID", "SIZE", "COMPILER")]
    for row in rows:
        compiler = row["compiler"]
        state = "?"
        if isinstance(compiler, dict):
            state = f"{compiler['command']}{'' if compiler['matches'] else ' (not the one that built it)'}"
        lines.append(
            (
                str(row["name"]),
                str(row["source_version"]),
                str(row["build_id"])[:12],
                human(row["size"]),
                state,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def sheet(document: dict[str, object]) -> str:
    """All about one kernel for people."""
    compiler, paths = document["compiler"], document["paths"]
    assert isinstance(compiler, dict)
    assert isinstance(paths, dict)
    lines = [
        ("release", document["release"]),
        ("name", document["name"]),
        ("source version", document["source_version"]),
        ("version", document["version"]),
        ("build id", document["build_id"]),
        ("banner", document["banner"]),
        (
            "compiler",
            f"{compiler['command']}: the one that built it"
            if compiler["matches"]
            else f"{compiler['command']}: {compiler['why']} - {compiler['next_step']}",
        ),
        ("origin", document["origin"]),
        ("size on disk", human(document["size"])),
        *((name, path or "-") for name, path in paths.items()),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)
