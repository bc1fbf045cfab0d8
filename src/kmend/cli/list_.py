"""``kmend list``: the livepatches of the running kernel, one line each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kmend.cli.context import Context


def configure(parser: argparse.ArgumentParser) -> None:
    """``list`` has no arguments of its own."""


def run(_args: argparse.Namespace, context: Context) -> int:
    """Exit status 0; 3 where the kernel has no livepatch support."""
    from kmend.cli.status import origins_of, patch_document
    from kmend.core.live import printable
    from kmend.report import live
    from kmend.runtime.observe import observe
    from kmend.runtime.place import Place

    seen = observe(Place(), context.config.state, limit=0)
    origins = origins_of(seen, context)
    context.emit(
        {
            "schema": 1,
            "verb": "list",
            "kernel": {"release": seen.kernel.release, "build_id": seen.kernel.build_id},
            "patches": [patch_document(row, origins) for row in seen.patches],
            "left": [patch_document(row, origins) for row in seen.left],
        }
    )
    rows = [
        (
            str(row.order or "-"),
            row.name,
            row.phase.value + (" (pinned)" if row.pinned_by else " (forced)" if row.forced else ""),
            "-" if row.replace is None else "yes" if row.replace else "no",
            str(row.functions) if row.order else "-",
            ",".join(obj.name for obj in row.objects) or "-",
            several(origins[row.name].cves),
            printable(str((row.module.note if row.module else {}).get("title") or "-")),
        )
        for row in (*reversed(seen.patches), *seen.left)
    ]
    if rows:
        head = ("ORDER", "NAME", "PHASE", "REPLACE", "FUNCTIONS", "OBJECTS", "CVES", "TITLE")
        context.say("\n".join(live.table([head, *rows])))
    else:
        context.say("no livepatch is loaded")
    return 0


def several(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" +{len(names) - 1}" if len(names) > 1 else ""
    return f"{names[0]}{more}" if names else "-"
