"""``kmend status``: kernel, patches, transition, and what killed runs have left; once or as a live view."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kmend.cli.context import Context
from kmend.core.errors import UsageError
from kmend.core.live import LivePatch, Phase
from kmend.runtime import persistence, refusals
from kmend.runtime.journal import Record
from kmend.runtime.observe import Seen, observe
from kmend.runtime.place import Place

if TYPE_CHECKING:
    from kmend.origin import Origin


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``status``."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="show this patch only")
    parser.add_argument("--watch", action="store_true", help="stay, and show changes as they happen")
    parser.add_argument(
        "--interval",
        type=_interval,
        default=0.5,
        metavar="SECONDS",
        help="how often --watch looks (default: 0.5)",
    )


def _interval(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of seconds from 0.05 to 3600")
    return value


def run(args: argparse.Namespace, context: Context) -> int:
    """Exit status 0, also when something is amiss: what is amiss is the answer."""
    if args.watch and context.json:
        raise UsageError(
            "--watch and --json exclude each other",
            why="--json prints one document",
            next_step="ask repeatedly without --watch",
            rule="usage",
        )
    place = Place()
    if args.watch:
        from kmend.cli.watching import Looker, blocks, fancy, screens

        if args.name is not None:
            refusals.known(observe(place, context.config.state, limit=0), args.name)
        looker = Looker(place, context, args.name)
        return screens(looker, args.interval) if fancy() else blocks(looker, args.interval, context)
    seen = observe(place, context.config.state)
    if args.name is not None:
        refusals.known(seen, args.name)
    from kmend.cli.install import boot_document, boot_text

    boot = persistence.look(place, context.config.state, seen.kernel.release, seen.kernel.boot_id)
    origins = origins_of(seen, context)
    context.emit({**document(seen, origins, args.name), "boot": boot_document(boot)})
    context.say("\n".join((*lines(seen, args.name), *boot_text(boot))))
    return 0


def origins_of(seen: Seen, context: Context) -> dict[str, Origin]:
    """Where each patch comes from, by its name."""
    from kmend.origin import Origins

    origins = Origins(context.config.state, seen.kernel.release, seen.kernel.boot_id)
    return origins.all_of((*seen.patches, *seen.left))


def document(seen: Seen, origins: Mapping[str, Origin], name: str | None = None) -> dict[str, object]:
    """The JSON document."""
    from kmend.report import live

    wanted = [row for row in seen.patches if name in (None, row.name)]
    return {
        "schema": 1,
        "verb": "status",
        "kernel": live.kernel_document(seen.kernel),
        "patches": [patch_document(row, origins) for row in wanted],
        "left": [patch_document(row, origins) for row in seen.left if name in (None, row.name)],
        "transition": live.transition_document(seen.transition),
        "unfinished": [unfinished_document(row) for row in seen.unfinished],
        "acting": seen.acting,
        "notes": list(seen.notes),
    }


def patch_document(patch: LivePatch, origins: Mapping[str, Origin]) -> dict[str, object]:
    """A patch, with where it comes from."""
    from kmend.report import live

    origin = origins.get(patch.name)
    return {
        **live.patch_document(patch),
        "cves": [] if origin is None else list(origin.cves),
        "report": None if origin is None else origin.report_file or None,
    }


def unfinished_document(row: Record) -> dict[str, object]:
    """An action that a killed kmend began."""
    return {
        "id": row.id,
        "time": row.time,
        "verb": row.verb,
        "patch": row.patch,
        "user": row.user,
        "pid": row.pid,
    }


def lines(seen: Seen, name: str | None = None) -> Iterator[str]:
    """The text for people."""
    from kmend.report import live

    yield from live.kernel_text(seen.kernel)
    if seen.kernel.ftrace_dead and any(row.phase is Phase.ENABLED for row in seen.patches):
        yield "  THE PATCHES BELOW MAY NOT BE IN FORCE, whatever they say: ftrace has shut itself down after"
        yield "  a fault in the kernel, and functions may run their old code (see dmesg). Reboot."
    if seen.transition is not None:
        yield ""
        yield from live.transition_text(seen.transition)
    patches = [row for row in seen.patches if name in (None, row.name)]
    left = [row for row in seen.left if name in (None, row.name)]
    yield ""
    if not patches and not left:
        yield "no livepatch is loaded"
    for patch in reversed(patches):  # the top of the stack on top
        yield from live.patch_text(patch)
    for patch in left:
        yield live.patch_line(patch)
        yield f"     {leftover(patch)}"
    for row in seen.unfinished:
        yield ""
        yield unfinished_text(row, seen)
    if seen.acting:
        yield ""
        yield "a kmend acts on this kernel now"
    yield from (f"note: {note}" for note in seen.notes)


def leftover(patch: LivePatch) -> str:
    """What to do about a module without a patch."""
    if patch.pinned_by:
        return "tasks may still run its code: nothing removes it before the next boot"
    if patch.module is not None and patch.module.references:
        return "it stays until its references are gone"
    return f"remove it with: kmend unload {patch.name}"


def unfinished_text(row: Record, seen: Seen) -> str:
    """What a killed kmend was about to do, and what has become of it."""
    release = row.detail.get("release", seen.kernel.release)
    stored = f"`kmend install --list` shows whether {row.patch} is installed for {release}"
    again = "Run it again to finish it"
    match row.verb:
        case "install":  # the journal has the patch's name, not its file's
            command, now = "install", stored
        case "uninstall":
            other = "" if release == seen.kernel.release else f" --kernel {release}"
            command, now = f"uninstall {row.patch}{other}", stored
        case "healthy":
            command, now = "healthy", f"the next boot may leave {row.patch} off"
        case "load" if row.patch == persistence.ALL:  # after the last patch: a former boot's mark goes
            command, now = "load --all --retry", "the next boot may leave the installed patches off"
        case _:
            patch = seen.named(row.patch)
            state = "it is not loaded" if patch is None else f"it is {patch.phase.value}"
            what = shlex.quote(str(row.detail.get("file", row.patch))) if row.verb == "load" else row.patch
            command, now = f"{row.verb} {what}", f"{row.patch}: {state} now"
            again += f", or `kmend unload {row.patch}`"
    who = f"{row.user} (process {row.pid})"
    return f"an action did not end: `kmend {command}` of {who} was killed; {now}. {again}"


def waiting(seen: Seen, began: dict[int, float]) -> Iterator[str]:
    """For how long each blocker has been seen to hold the transition up."""
    now = time.monotonic()
    rows = seen.transition.blockers if seen.transition is not None else ()
    here = {row.task.tid for row in rows}
    for gone in began.keys() - here:
        del began[gone]
    for row in rows:
        began.setdefault(row.task.tid, now)
    if rows:
        from kmend.report import live

        yield ""
        yield "seen for"
        for row in rows[: live.SHOWN_BLOCKERS]:
            yield f"  {now - began[row.task.tid]:5.0f} s  {live.task_name(row)}: {row.remedy}"
