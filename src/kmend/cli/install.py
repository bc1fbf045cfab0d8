"""``kmend install``, ``uninstall``, ``healthy``: which patches are loaded when the machine boots."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial

from kmend.action import Following
from kmend.boot import Boot, tripped_words
from kmend.cli.acting import Part, Recorder, manager, perform, tell
from kmend.cli.context import Context
from kmend.core.errors import UsageError
from kmend.core.live import ActionReport, printable
from kmend.installer import Installer
from kmend.runtime.persistence import Absent, Guard, Persistence, Store

EPILOG = """\
At boot the unit kmend-load.service runs `kmend load --all --boot`: it loads what is installed for the kernel
that runs, in the order of installation. Before, it leaves a mark on the disk; kmend-healthy.timer takes it
away five minutes later (`kmend healthy`). A boot that finds the mark of a former one leaves the patches off
until somebody decides (`kmend load --all --retry`). The word kmend=off on the kernel's command line or the
file /etc/kmend/off turn loading at boot off.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the three verbs."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    match parser.prog.split()[-1]:
        case "install":
            parser.add_argument(
                "module", nargs="*", metavar="KO", help="livepatch module, with its build report beside it"
            )
            parser.add_argument(
                "--list", action="store_true", help="show what is installed, for every kernel"
            )
        case "uninstall":
            parser.add_argument("name", nargs="*", metavar="NAME", help="patch, as `install --list` shows it")
            parser.add_argument(
                "--kernel", metavar="RELEASE", help="the kernel that it is installed for (default: running)"
            )
            parser.add_argument("--all", action="store_true", help="all patches of that kernel")
            parser.add_argument(
                "--unload",
                action="store_true",
                help="take them back first, as `kmend unload` does; if one cannot be, all stay installed",
            )
        case _:
            pass


def run(args: argparse.Namespace, context: Context) -> int:
    """Exit status 0: it is as asked for, and on the disk; 1: refused or failed, the reports say of each patch
    what has become of it; 2: one is not installed; 3: not root."""
    match args.verb:
        case "install":
            return install(args, Installer(context.config, context.progress), context)
        case "uninstall":
            return uninstall(args, Installer(context.config, context.progress), context)
        case _:
            return tell("healthy", [Boot(context.config, context.progress).healthy()], context)


def install(args: argparse.Namespace, installer: Installer, context: Context) -> int:
    """Install, or list."""
    if args.list == bool(args.module):
        raise UsageError(
            "--list and modules exclude each other" if args.list else "no module is named",
            why="one of the two is needed",
            next_step="kmend install --help",
            rule="usage",
        )
    if not args.list:
        return tell("install", installer.install(args.module), context)
    stores = installer.stores()
    context.emit(
        {"schema": 1, "verb": "install", "result": "done", "stores": [store_document(row) for row in stores]}
    )
    context.say("\n".join(line for store in stores for line in store_text(store)) or "nothing is installed")
    return 0


def uninstall(args: argparse.Namespace, installer: Installer, context: Context) -> int:
    """Take out of the store, and with ``--unload`` out of the kernel before. If one cannot be taken back, all
    that are named stay installed: the same command goes on."""
    from kmend.report.action import succeeded

    if args.all == bool(args.name):
        raise UsageError(
            "--all and names exclude each other" if args.all else "no patch is named",
            why="one of the two is needed",
            next_step="kmend install --list",
            rule="usage",
        )
    if args.unload and args.kernel is not None:
        raise UsageError(
            "--unload and --kernel exclude each other",
            why="only the running kernel's patches are loaded",
            next_step="leave --kernel out",
            rule="usage",
        )
    names = [name.removesuffix(".ko") for name in args.name]
    parts: list[Part] = []
    gone: Sequence[str] = ()
    if args.unload:
        # Taken back first: killed in between, the patch is still installed, and the same command goes on.
        machine = manager(context)
        gone = installer.chosen(names)

        def unload(name: str) -> Sequence[ActionReport]:
            return [machine.unload(name, Following())]

        parts = [(name, partial(unload, name)) for name in machine.loaded() if name in gone]
    parts.append((" ".join(names) or "--all", partial(installer.uninstall, names, args.kernel)))
    reports, status = perform("uninstall", parts, context, Recorder("uninstall", None, context))
    if status is not None:
        return status
    if reports and reports[-1].verb == "unload" and not succeeded(reports[-1]):
        reports += installer.kept(gone, reports[-1])
    return tell("uninstall", reports, context)


def load_all(args: argparse.Namespace, how: Following, context: Context) -> int:
    """``kmend load --all``."""
    machine = Boot(context.config, context.progress, manager=manager(context))
    recorder = Recorder("load", args.report, context)
    with recorder.watching("--all"):
        reports: Sequence[ActionReport] = machine.load_all(how, boot=args.boot, retry=args.retry)
    status = tell("load", recorder.write(reports), context)
    if not reports:
        context.say("nothing is installed for the running kernel")
    return status


# -- how it is shown ---------------------------------------------------------------------------------


def store_document(store: Store) -> dict[str, object]:
    """A store."""
    return {
        "release": store.release,
        "patches": [
            {
                "name": row.name,
                "file": str(store.folder / row.file),
                "sha256": row.sha256,
                "report": str(store.folder / row.report) if row.report else None,
                "build_id": row.build_id or None,
                "replace": row.replace,
                "superseded": row not in store.wanted,
                "time": row.time,
                "user": row.user,
            }
            for row in store.patches
        ],
    }


def store_text(store: Store) -> Iterator[str]:
    """A store in lines."""
    yield f"installed for {store.release}:"
    for at, row in enumerate(store.patches, 1):
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(row.time))
        facts = ["cumulative"] if row.replace else []
        if row not in store.wanted:
            facts.append(f"not loaded: {store.wanted[0].name} replaces it")
        yield f"  {at}. {row.name}, by {row.user} at {when}" + "".join(f", {fact}" for fact in facts)


def boot_document(found: Persistence | None) -> dict[str, object] | None:
    """How loading at boot stands, for ``status --json``; None for a kernel that no store can be for."""
    if found is None:
        return None
    attempt = found.attempt
    return {
        **store_document(found.store),
        "off": found.off or None,
        "guard": found.guard.value,
        "attempt": None
        if attempt is None
        else {"boot": attempt.boot, "time": attempt.time, "patches": list(attempt.patches)},
        "trouble": None if found.trouble is None else found.trouble.what,
        "not_loaded": [
            {
                "name": row.name,
                "why": row.why,
                "rules": list(row.rules),
                "time": row.time,
                "tried": row.tried,
            }
            for row in found.absent
        ],
    }


def boot_text(found: Persistence | None) -> Iterator[str]:
    """The same in lines; nothing where nothing is installed and nothing is amiss."""
    if found is None:
        return
    if found.trouble is not None:
        yield f"loaded at boot: nothing: {found.trouble.what} ({found.trouble.why})"
    if found.store.patches:
        yield f"loaded at boot: {', '.join(row.name for row in found.store.wanted)}"
        if found.off:
            yield f"  switched off by {found.off}"
        match found.guard:
            case Guard.TRIPPED:
                yield f"  LEFT OFF: {tripped_words(found)}"
                yield "  next: kmend log; kmend uninstall what is to blame; then kmend load --all --retry"
            case Guard.WATCHING:
                yield "  this boot is not known to be healthy yet (kmend healthy, by timer or by hand)"
            case Guard.CLEAR:
                pass
    yield from map(absent_line, found.absent)


def absent_line(row: Absent) -> str:
    """An installed patch that is not in force, and what kmend's journal says about why."""
    rules = f" ({', '.join(row.rules)})" if row.rules else ""
    return printable(f"  {row.name}: {'NOT LOADED' if row.tried else 'not loaded yet'}: {row.why}{rules}")
