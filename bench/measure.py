"""What the benchmarks share: running kmend as a user does, watching its processes, printing a table.

Figures only: nothing here passes or fails (bench_sleepers.py does). A machine that does other work gives
other figures, so every table names the load that it was measured under.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import IO, Any

from kmend.core.config import Config, load
from kmend.core.progress import Silent
from kmend.core.target import Release, Target
from kmend.kernel import store

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUNS = 5
#: How often the processes are looked at, in seconds. Peaks are the kernel's own (VmHWM), so that nothing is
#: missed between two looks but the end of a process.
EVERY = 0.01
#: As a user has it: Python keeps its byte code, so that only the first start compiles kmend's modules.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True, slots=True)
class Example:
    """One of the two examples: patch, kernel, module's name, script for `kmend try`."""

    name: str
    patch: Path
    release: Release
    module: str
    script: Path


CMDLINE = Example(
    "cmdline",
    EXAMPLES / "cmdline.patch",
    Release("6.1.0-56-amd64"),
    "kmend_cmdline",
    EXAMPLES / "cmdline-check.sh",
)
EXT4 = Example(
    "ext4",
    EXAMPLES / "ext4-null-folio.patch",
    Release("6.1.0-55-amd64"),
    "kmend_ext4_null_folio",
    EXAMPLES / "ext4-recipe.sh",
)


@dataclass(frozen=True, slots=True)
class Run:
    """A finished command: wall ``seconds`` seen from outside, the JSON ``document`` that it printed."""

    seconds: float
    document: dict[str, Any]


def kmend(*words: str | os.PathLike[str], cache: Path) -> Run:
    """Run a verb in a fresh process, with ``--json``; a failure ends the benchmark."""
    argv = command(*words, "--json", "--quiet", cache=cache)
    start = perf_counter()
    done = subprocess.run(argv, capture_output=True, check=False, env=ENVIRONMENT)
    seconds = perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"{' '.join(argv)} ended with status {done.returncode}:\n{done.stderr.decode()}")
    return Run(seconds, json.loads(done.stdout))


def command(*words: str | os.PathLike[str], cache: Path) -> list[str]:
    """The installed command, as a user types it (``.venv/bin/kmend`` beside this Python)."""
    program = Path(sys.executable).with_name("kmend")
    return [str(program), *(os.fspath(word) for word in words), "--cache", str(cache)]


def target_of(config: Config, release: Release) -> Target:
    """The prepared target; downloaded and prepared first when it is not there."""
    return store.fetch(config, release, Silent())


@contextmanager
def cache_beside(config: Config, *releases: Release) -> Iterator[Path]:
    """A cache with the prepared kernels of ``config`` (linked) and nothing that builds or trials left."""
    with TemporaryDirectory(prefix="kmend-bench-") as name:
        cache = Path(name) / "cache"
        for release in releases:
            target = target_of(config, release)
            folder = cache / "targets" / release
            folder.mkdir(parents=True)
            for entry in target.folder.iterdir():
                if entry.name != "commands":
                    (folder / entry.name).symlink_to(entry)
        yield cache


def forget(folder: Path) -> None:
    """Remove a part of the cache."""
    shutil.rmtree(folder, ignore_errors=True)


# -- watching ----------------------------------------------------------------------------------------


@dataclass
class Step:
    """A step of kmend's progress: its wall ``seconds`` and kmend's own peak in it, in MB."""

    text: str
    seconds: float = 0.0
    peak: float = 0.0


@dataclass
class Watched:
    """A run that was watched: its wall ``seconds``, the ``lines`` that it said and when (seconds from its
    start), its ``steps`` in order, and the largest process (MB) of each program among its ``children``."""

    seconds: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    children: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """kmend's own peak in MB."""
        return max((step.peak for step in self.steps), default=0.0)

    def said(self, words: str) -> tuple[float, str]:
        """The first line with ``words`` in it, and when it came; ends the benchmark when there is none."""
        for when, line in self.lines:
            if words in line:
                return when, line
        sys.exit(f"kmend did not say {words!r}")


def watch(*words: str | os.PathLike[str], cache: Path, statuses: Sequence[int] = (0,)) -> Watched:
    """Run a verb and note kmend's own peak memory in every step, and its children's.

    At each line of progress the kernel's high-water mark is read and set back (``clear_refs``, proc(5)).
    """
    argv = command(*words, cache=cache)
    seen = Watched(steps=[Step("start")])
    start = began = perf_counter()
    with subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as child:
        assert child.stderr is not None
        over = threading.Event()
        reader = threading.Thread(target=_follow, args=(child.stderr, start, seen.lines))
        looker = threading.Thread(target=_look, args=(child.pid, seen.children, over))
        reader.start()
        looker.start()
        heard = 0
        while child.poll() is None:
            while heard < len(seen.lines):
                (when, line), heard = seen.lines[heard], heard + 1
                if line.startswith("kmend: ") and line.endswith("…"):
                    when += start
                    seen.steps[-1].seconds += when - began
                    began = when
                    seen.steps.append(Step(line.removeprefix("kmend: ").removesuffix("…")))
                    _reset(child.pid)
            seen.steps[-1].peak = max(seen.steps[-1].peak, peak(child.pid))
            sleep(EVERY / 2)
        over.set()
        reader.join()
        looker.join()
    end = perf_counter()
    seen.seconds = end - start
    seen.steps[-1].seconds += end - began
    if child.returncode not in statuses:
        sys.exit(
            f"{' '.join(argv)} ended with status {child.returncode}:\n"
            + "\n".join(text for _, text in seen.lines[-8:])
        )
    return seen


def _follow(stream: IO[str], start: float, into: list[tuple[float, str]]) -> None:
    for line in stream:
        into.append((perf_counter() - start, line.rstrip("\n")))


def _look(pid: int, into: dict[str, float], over: threading.Event) -> None:
    while not over.wait(EVERY):
        for child in descendants(pid):
            name = _name(child)
            if name:
                into[name] = max(into.get(name, 0.0), peak(child))


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``, as far as they can still be seen."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for child in map(int, (task / "children").read_text().split()):
                    found += [child, *descendants(child)]
    return found


def peak(pid: int) -> float:
    """The high-water mark of a process's resident memory (VmHWM) in MB; 0: it is gone."""
    with contextlib.suppress(OSError, IndexError):
        text = Path(f"/proc/{pid}/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    return 0.0


def _name(pid: int) -> str:
    """The program that a process runs; '' for one that is gone, or is still a copy of its parent."""
    with contextlib.suppress(OSError):
        name = Path(f"/proc/{pid}/exe").readlink().name
        return "" if name.startswith("python") else name
    return ""


def _reset(pid: int) -> None:
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


# -- showing -----------------------------------------------------------------------------------------


def middle(values: Sequence[float]) -> float:
    return median(values)


def spread(values: Sequence[float]) -> str:
    """``0.52 (0.50-0.61)``: median, least, most."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def disk(folder: Path) -> int:
    """Bytes that a folder takes on the disk."""
    return store.size_on_disk(folder) or 0


def settings() -> Config:
    return load()


def show(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> None:
    """Print one table: first column left, the others right; then notes, the machine, and how to repeat it."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    print(f"\n{title}")
    print(f"{'-' * len(title)}")
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())
    for note in notes:
        print(f"* {note}")
    script = Path(sys.argv[0]).name
    print(
        f"({os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f}; "
        f"repeat: .venv/bin/python bench/{script})",
        flush=True,
    )


def over(value: float, limit: float) -> str:
    """A mark for a figure that misses its limit."""
    return "" if value <= limit else "OVER"
