"""What `kmend diff` takes in time and memory for five of Debian's large units, two of amdgpu among them.

The unit is compiled twice, the second time with one more statement in one of its functions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from kmend.core.target import Target
from kmend.diff.unit import UnitObject
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild, overlay
from measure import CMDLINE, RUNS, kmend, middle, settings, show, spread, target_of, watch


@dataclass(frozen=True, slots=True)
class Change:
    """A file, a line of it, and what is added to that line (so that no other one moves)."""

    source: str
    line: str
    more: str


CHANGES = (
    Change("fs/ext4/mballoc.c", 'mb_debug(sb, "load group %u\\n", group);', " cond_resched();"),
    Change("kernel/bpf/verifier.c", "mutex_lock(&bpf_verifier_lock);", " cond_resched();"),
    Change("net/core/dev.c", "napi_hash_add(napi);", ' pr_info("added\\n");'),
    Change(
        "drivers/gpu/drm/amd/display/amdgpu_dm/amdgpu_dm.c",
        "adev->dm.cached_state = drm_atomic_helper_suspend(adev_to_drm(adev));",
        " cond_resched();",
    ),
    Change("drivers/gpu/drm/amd/amdgpu/gfx_v10_0.c", "adev->gfx.rlc.funcs->stop(adev);", " cond_resched();"),
)


def pair(target: Target, change: Change, folder: Path) -> tuple[Path, Path, int]:
    """Original and patched object, and the number of the original's functions."""
    (unit,) = kbuild.unit_map(target).units(change.source)
    command = kbuild.commands(target, [unit])[unit]
    text = (target.source / change.source).read_text()
    if change.line not in text:
        sys.exit(f"{change.source} has no line {change.line!r}")
    patched = text.replace(change.line, change.line + change.more, 1).encode()
    # a unit that kbuild spells with `..` needs the folders on the way as folders of the overlay
    tree = overlay.make_overlay(
        target.source, {change.source: patched}, folder / "tree", also=[command.source]
    )
    made = [
        compiling.compile_unit(target, unit, command, tree=place, out=folder / name).path
        for name, place in (("old", target.source), ("new", tree))
    ]
    functions = len(list(UnitObject.parse(made[0].read_bytes(), "original").functions()))
    return made[0], made[1], functions


def main() -> int:
    config = settings()
    target = target_of(config, CMDLINE.release)
    rows = []
    for change in CHANGES:
        with TemporaryDirectory(prefix="kmend-bench-") as name:
            old, new, functions = pair(target, change, Path(name))
            runs = [kmend("diff", old, new, cache=config.cache) for _ in range(RUNS)]
            seen = watch("diff", old, new, cache=config.cache)
            rows.append(
                [
                    change.source,
                    f"{old.stat().st_size / 1e3:.0f}",
                    str(functions),
                    str(len(runs[0].document["changed"])),
                    spread([run.seconds for run in runs]),
                    f"{1000 * middle([run.seconds for run in runs]) / functions:.2f}",
                    f"{seen.peak:.0f}",
                ]
            )
    show(
        f"kmend diff of two objects (median of {RUNS}, least-most)",
        ("unit", "kB", "functions", "changed", "seconds", "ms/function", "peak MB"),
        rows,
        ["seconds are those of the whole command, Python's start included"],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
