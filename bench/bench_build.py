"""How long `kmend build` takes with the target prepared, against the two compiler runs that it cannot avoid.

A one-file patch needs its unit compiled twice, before and after. The very commands that kmend runs are
run here by themselves, both at once (as on two processors) and one after the other. `kmend build` is
timed from outside, in a fresh process, Python's start included. Limit: 1.5 times the compiler runs.

Rows of kmend:
  first    nothing is known of the unit: kbuild is asked for its command
  cold     no compiled original in the cache: both compiler runs are needed
  warm     the original comes from the cache, one compiler run is needed
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from kmend.core.config import Config
from kmend.core.run import environment
from kmend.core.target import Target
from kmend.kernel import overlay, store
from kmend.patch.apply import apply
from kmend.patch.intake import parse
from kmend.patch.lines import with_line_control
from measure import (
    CMDLINE,
    ENVIRONMENT,
    EXT4,
    RUNS,
    Example,
    Run,
    cache_beside,
    command,
    forget,
    kmend,
    middle,
    settings,
    show,
    spread,
)

LIMIT = 1.5


@dataclass(frozen=True, slots=True)
class Compiler:
    """The two commands: working directory and arguments, the output left open."""

    runs: tuple[tuple[Path, tuple[str, ...]], ...]

    def at_once(self, out: Path) -> float:
        start = perf_counter()
        children = [self._start(index, out) for index in range(len(self.runs))]
        for child in children:
            _finish(child)
        return perf_counter() - start

    def in_turn(self, out: Path) -> float:
        start = perf_counter()
        for index in range(len(self.runs)):
            _finish(self._start(index, out))
        return perf_counter() - start

    def _start(self, index: int, out: Path) -> subprocess.Popen[bytes]:
        tree, argv = self.runs[index]
        made = out / f"{index}.o"
        return subprocess.Popen([*argv, "-MF", f"{made}.d", "-o", made], cwd=tree, env=environment())


def _finish(child: subprocess.Popen[bytes]) -> None:
    if child.wait() != 0:
        sys.exit(f"the compiler ended with status {child.returncode}")


def compiler_runs(target: Target, example: Example, cache: Path, scratch: Path) -> Compiler:
    """The two commands, as kmend itself says them with ``--debug``, with another output.

    The overlay that the patched one ran in is gone: one like it takes its place.
    """
    words = command(
        "build", example.patch, "--kernel", example.release, "-o", scratch, "--debug", cache=cache
    )
    said = subprocess.run(words, capture_output=True, text=True, check=True, env=ENVIRONMENT).stderr
    patchset = parse([(example.patch.name, example.patch.read_bytes())])
    applied = apply(patchset, overlay.tree_reader(target.source))
    files = {
        file.path: with_line_control(file.new, file.origins) for file in applied.files if file.new is not None
    }
    tree = overlay.make_overlay(target.source, files, scratch / "tree", also=files)
    runs = []
    for line in said.splitlines():
        place, mark, rest = line.partition(" && ")
        argv = shlex.split(rest)
        if mark and "-c" in argv and "-o" in argv:
            for flag in ("-o", "-MF"):
                at = argv.index(flag)
                del argv[at : at + 2]
            patched = Path(shlex.split(place.partition(" cd ")[2])[0]).name == "tree"
            runs.append((tree if patched else target.source, tuple(argv)))
    if len(runs) != 2 or len({place for place, _ in runs}) != 2:
        sys.exit(f"{len(runs)} compiler runs were seen in place of two")
    return Compiler(tuple(runs))


def measure(config: Config, example: Example) -> tuple[list[list[str]], list[str]]:
    rows: list[list[str]] = []
    with cache_beside(config, example.release) as cache, TemporaryDirectory(prefix="kmend-bench-") as name:
        scratch = Path(name)
        words = ("build", example.patch, "--kernel", example.release, "-o", name)
        first = kmend(*words, cache=cache)
        forget(cache / "objects")
        own = store.open_target(replace(config, cache=cache), example.release)
        compiler = compiler_runs(own, example, cache, scratch)
        together, apart, cold, warm = [], [], [], []
        for _ in range(RUNS):  # in turns, so that other work on the machine meets all of them alike
            together.append(compiler.at_once(scratch))
            forget(cache / "objects")
            cold.append(kmend(*words, cache=cache))
            apart.append(compiler.in_turn(scratch))
            warm.append(kmend(*words, cache=cache))
    base = middle(together), middle(apart)
    rows.append([f"{example.name}: both compilers at once", spread(together), "", ""])
    rows.append(["  one after the other", spread(apart), "", ""])
    for label, runs in (("first", [first]), ("cold", cold), ("warm", warm)):
        seconds = [run.seconds for run in runs]
        rows.append(
            [
                f"  kmend build, {label}",
                spread(seconds) if len(runs) > 1 else f"{seconds[0]:.2f}",
                *(f"{middle(seconds) / b:.2f}" for b in base),
            ]
        )
    return rows, [f"{example.name}, cold: {_stages(cold)}", f"{example.name}, warm: {_stages(warm)}"]


def _stages(runs: Sequence[Run]) -> str:
    """Where the time went: medians in milliseconds."""
    stages = ("fetch", "prepare", "compile", "diff", "verify", "link")
    parts = {name: middle([run.document["timings"].get(name, 0.0) for run in runs]) for name in stages}
    total = middle([run.document["timings"]["total"] for run in runs])
    outside = middle([run.seconds - run.document["timings"]["total"] for run in runs])
    parts["other"] = max(0.0, total - sum(parts.values()))
    shown = ", ".join(f"{name} {1000 * value:.0f}" for name, value in parts.items() if value >= 0.0005)
    return f"start and end of the process {1000 * outside:.0f} ms, {shown}"


def main() -> int:
    config = settings()
    rows: list[list[str]] = []
    notes: list[str] = []
    for example in (CMDLINE, EXT4):
        some, said = measure(config, example)
        rows += some
        notes += said
    show(
        f"kmend build with the target prepared (median of {RUNS}, least-most)",
        ("", "seconds", "x at once", "x in turn"),
        rows,
        [
            f"limit: {LIMIT} times the wall time of the two compiler runs",
            f"kmend runs up to {config.jobs} compilers at once on the {os.cpu_count()} processors here; "
            "`compile` includes objtool on both objects",
            *notes,
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
