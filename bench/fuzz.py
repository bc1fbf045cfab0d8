"""A fuzz run: damaged objects, modules, patches, types and small texts; none may end in a traceback.

    .venv/bin/python bench/fuzz.py --count 1000000 --seed 1 --state run.json
    .venv/bin/python bench/fuzz.py --seed 1 --replay 4711

Each input is made from its number and the seed alone, so that one can be made again. What is done with it is
what kmend does with a file of a user's:

  diff     two objects: read, compared, what a module would carry, the report (`kmend diff`)
  check    a module: described, held against every rule of its target (`kmend check`, `info`, `try`)
  patch    patches: read, applied to a tree, taken back, lines numbered, units reached (`kmend build`)
  types    the types of two objects: read and compared (`kmend build`)
  text     series, descriptor, Module.symvers, C text (`kmend build`, `kmend module`)

A defect is every exception but a KmendError, a text that cannot be shown, more than 5 s, more than 1 GB, and
a process that dies. They are told apart by where they come from; the status is 1 when there is one.
With ``--state`` a run that was stopped goes on where it was. ``--plain`` takes no kernel's objects.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from random import Random
from types import FrameType, TracebackType
from typing import NoReturn

from kmend.cli import document_of, text_of
from kmend.core.errors import KmendError
from kmend.core.files import write_atomically
from kmend.core.target import Linkage, Unit
from kmend.diff.compare import compare
from kmend.diff.select import select
from kmend.diff.unit import UnitObject
from kmend.elf.reader import read
from kmend.kernel import symvers
from kmend.kernel.overlay import tree_reader
from kmend.lab import modinfo
from kmend.module import descriptor
from kmend.module.describe import describe
from kmend.patch.apply import apply
from kmend.patch.definitions import edited_functions
from kmend.patch.extract import find_function, includes, needed_by
from kmend.patch.intake import parse, read_series
from kmend.patch.items import added_names, unseen
from kmend.patch.lines import origins_of, with_line_control
from kmend.patch.reach import reach
from kmend.report.objects import to_document, to_text
from kmend.verify.rules import check
from kmend.verify.types import Types, changed_layouts
from mutate import Seed, mutate_object, mutate_text, recount
from seeds import DESCRIPTOR, ONE, SERIES, SYMVERS, Seeds, full, plain

SECONDS, BYTES = 5.0, 1 << 30
#: Inputs that a worker takes at a time.
BLOCK = 500
#: Seconds after which a worker that says nothing is given up (Python could not even raise the alarm).
SILENT = 120.0
#: How many inputs of one defect are named.
NAMED = 5
#: Of 100 inputs so many are of each kind.
SHARES = {"diff": 45, "check": 25, "patch": 22, "types": 5, "text": 3}


class Hang(BaseException):
    """An input took too long. No Exception, so that nothing on the way takes it for its own."""


class Unshown(Exception):
    """An error or a report that cannot be put on a terminal or into JSON."""


# -- the inputs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Input:
    """``files`` are what a user would have given, by name; ``run`` returns a word for the outcome."""

    kind: str
    files: dict[str, bytes]
    run: Callable[[], str]


class Maker:
    """Makes inputs out of seeds. ``folder`` holds the tree that patches are applied to."""

    def __init__(self, seeds: Seeds, seed: int, folder: Path) -> None:
        self.seeds, self.seed, self.folder = seeds, seed, folder
        tree = folder / "tree"
        for name, data in seeds.tree.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(data)
        self.read_tree = tree_reader(tree)
        objects = [one for pair in seeds.pairs for one in pair]
        self.objects = objects
        self.modules = seeds.modules
        # Small files are mutated more often: more of them can be.
        self.weights = [1 / (4000 + len(pair[0].data)) for pair in seeds.pairs]
        self.module_weights = [1 / (4000 + len(module[0].data)) for module in seeds.modules]
        self.kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
        if not seeds.modules:
            self.kinds = [kind for kind in self.kinds if kind != "check"]

    def make(self, number: int) -> Input:
        rng = Random(self.seed << 40 | number)
        kind = rng.choice(self.kinds)
        return {
            "diff": self._diff,
            "check": self._check,
            "patch": self._patch,
            "types": self._types,
            "text": self._text,
        }[kind](rng)

    def _diff(self, rng: Random) -> Input:
        (pair,) = rng.choices(self.seeds.pairs, self.weights)
        old, new = pair if rng.random() < 0.5 else (pair[0], pair[0])
        before, after = old.data, new.data
        damage = rng.randrange(3)
        if damage != 1:
            after = mutate_object(new, rng.choice(self.objects), rng)
        if damage:
            before = mutate_object(old, rng.choice(self.objects), rng)
        sizes = rng.choice((None, self.seeds.sizes))
        return Input("diff", {"original.o": before, "patched.o": after}, lambda: diff(before, after, sizes))

    def _check(self, rng: Random) -> Input:
        (module,) = rng.choices(self.modules, self.module_weights)
        seed, facts = module
        data = mutate_object(seed, rng.choice(self.modules)[0], rng)
        place = self.folder / f"module-{os.getpid()}.ko"

        def run() -> str:
            if rng.random() < 0.1:
                place.write_bytes(data)
                modinfo.read_livepatch(place)
            elf = read(data, "module.ko")
            describe(elf, None, "module.ko")
            found = check(elf, facts, "module.ko")
            shown([[r.rule, r.what, r.why, r.next_step] for r in (*found.refusals, *found.warnings)])
            shown([found.description.name, found.description.note, found.checked])
            return "objections" if found.refusals else "passed"

        return Input("check", {"module.ko": data}, run)

    def _patch(self, rng: Random) -> Input:
        several = rng.randrange(1, 3)
        texts = []
        for number in range(several):
            base = rng.choice(self.seeds.patches)
            damaged = number == 0 or rng.random() < 0.5
            text = mutate_text(base, rng, more=rng.choice(self.seeds.patches)) if damaged else base
            if damaged and rng.random() < 0.7:
                text = recount(text)
            texts.append((f"{number}.patch", text))
        fuzz, strip = rng.choice((0, 0, 1, 2, 3)), rng.choice((None, None, 0, 1, 2))
        return Input("patch", dict(texts), lambda: patch(texts, self.read_tree, fuzz, strip))

    def _types(self, rng: Random) -> Input:
        pair = [seed.data for seed in self.seeds.types]
        at = rng.randrange(2)
        pair[at] = mutate_types(self.seeds.types[at], rng)

        def run() -> str:
            found = [Types.of(read(data), "object") for data in pair]
            if found[0] is None or found[1] is None:
                return "none"
            rows = changed_layouts(found[0], found[1])
            shown([[r.rule, r.what, r.why, r.next_step] for r in rows])
            return "changed" if rows else "same"

        return Input("types", {f"{i}.o": data for i, data in enumerate(pair)}, run)

    def _text(self, rng: Random) -> Input:
        words = (
            b"[[object]]\n",
            b"9" * 5000,
            b"[" * 2000,
            b'"',
            b"'''",
            b"\xff",
            b"=",
            b"{",
            b"}",
            b"(",
            b"\\\n",
            b"/*",
        )
        name, base, run = rng.choice(
            (
                ("series", SERIES, _series),
                ("kmend.toml", DESCRIPTOR, _descriptor),
                ("Module.symvers", SYMVERS, self._symvers),
                ("one.c", ONE, _c_text),
            )
        )
        data = mutate_text(base, rng, words)
        return Input("text", {name: data}, lambda: run(data))

    def _symvers(self, data: bytes) -> str:
        place = self.folder / f"symvers-{os.getpid()}"
        place.write_bytes(data)
        table = symvers.load(place)
        for name in table:
            table.get(name)
        table.of("vmlinux")
        return "symvers"


def mutate_types(seed: Seed, rng: Random) -> bytes:
    """Damage in the types alone, mostly; else anywhere."""
    if rng.random() < 0.2:
        return mutate_object(seed, seed, rng)
    names = seed.sections[int.from_bytes(seed.data[62:64], "little")]
    for row in seed.sections:
        start = names[4] + row[0]
        if seed.data[start : start + 5] == b".BTF\0":
            out = bytearray(seed.data)
            for _ in range(rng.randrange(1, 6)):
                # a type is three 32-bit words and more of them: whole words make the better damage
                at = row[4] + rng.randrange(row[5] // 4) * 4
                value = rng.choice(
                    (0, 1, rng.randrange(40), rng.getrandbits(32), rng.randrange(20) << 24 | 3)
                )
                out[at : at + 4] = value.to_bytes(4, "little")
            return bytes(out)
    return seed.data


# -- what is done with them ----------------------------------------------------------------------------


def shown(document: object) -> None:
    """What the command line would print must be printable."""
    try:
        json.dumps(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise Unshown(str(error)) from error


def diff(before: bytes, after: bytes, sizes: Mapping[str, int] | None) -> str:
    pair = [UnitObject.parse(data, name) for data, name in ((before, "original.o"), (after, "patched.o"))]
    found = compare(pair[0], pair[1], sizes)
    selection = select(found)
    shown(to_document(found, selection))
    to_text(found, selection).encode(errors="backslashreplace")
    if selection.refusals:
        return "refused"
    return "same" if found.nothing else "changed"


class AllUnits:
    """Every C file is a unit of its own, in every header there is."""

    def units(self, source: str, /) -> tuple[Unit, ...]:
        if not source.endswith(".c"):
            return ()
        return (Unit(source[:-1] + "o", source, "vmlinux", Linkage.BUILTIN),)

    def includers(self, source: str, /) -> tuple[str, ...]:
        return ("kernel/one.c",) if source == "fs/two.c" else ()

    def explain_absent(self, source: str, /) -> str:
        return f"{source} is no C file"

    def including(self, header: str, /) -> tuple[Unit, ...]:
        return self.units("kernel/one.c") if header.startswith("include/") else ()

    def mentioning(self, names: Iterable[str], /) -> frozenset[str]:
        return frozenset({"kernel/one.c"} if "three" in names else ())


def patch(
    texts: list[tuple[str, bytes]], read_tree: Callable[[str], bytes | None], fuzz: int, strip: int | None
) -> str:
    found = parse(texts, strip=strip)
    shown([found.title, found.origin])
    applied = apply(found, read_tree, fuzz=fuzz)
    shown([[r.rule, r.what, r.why, r.next_step] for r in applied.warnings])
    for file in applied.files:
        edited_functions(file)
        if file.new and file.old is not None:
            with_line_control(file.new, file.origins)
            with_line_control(file.new, origins_of(file.old, file.new))
    after = applied.contents
    outcome = "applies twice"
    try:
        apply(found, lambda path: after[path] if path in after else read_tree(path), fuzz=fuzz)
    except KmendError as error:
        outcome = f"applies, then {error.rule}"
    reached = reach(applied, AllUnits())
    shown([[r.rule, r.what, r.why, r.next_step] for r in reached.warnings])
    return outcome


def _series(data: bytes) -> str:
    read_series(data.decode(errors="replace"))
    return "series"


def _descriptor(data: bytes) -> str:
    descriptor.parse(data.decode(errors="replace"), "kmend.toml")
    return "descriptor"


def _c_text(data: bytes) -> str:
    text = data.decode(errors="replace")
    includes(text)
    functions = [f for name in ("one", "two", "add") if (f := find_function(text, name)) is not None]
    if functions:
        "".join(needed_by(text, tuple(functions), lambda name: name == "count").parts())
    with_line_control(data, origins_of(ONE, data))
    unseen(ONE, data)
    added_names(ONE, data)
    return "C text"


# -- running them --------------------------------------------------------------------------------------


@dataclass
class Defect:
    """A defect: what and where, a traceback, how often, some inputs."""

    what: str
    text: str
    count: int = 0
    numbers: list[int] = field(default_factory=list)


@dataclass
class Tally:
    """What came of the inputs: numbers by kind and outcome; defects by place; the slowest."""

    outcomes: Counter[str] = field(default_factory=Counter)
    defects: dict[str, Defect] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, -1)

    def add(self, other: Tally) -> None:
        self.outcomes.update(other.outcomes)
        self.seconds += other.seconds
        self.slowest = max(self.slowest, other.slowest)
        for key, defect in other.defects.items():
            mine = self.defects.setdefault(key, Defect(defect.what, defect.text))
            mine.count += defect.count
            mine.numbers = (mine.numbers + defect.numbers)[:NAMED]

    def blame(self, number: int, what: str, text: str, key: str) -> None:
        self.add(Tally(defects={key: Defect(what, text, 1, [number])}))


def place_of(trace: TracebackType | None) -> str:
    """The last line of kmend's own on the way to the exception."""
    own = [frame for frame in traceback.extract_tb(trace) if f"{os.sep}kmend{os.sep}" in frame.filename]
    if not own:
        return "outside of kmend"
    return f"{own[-1].filename.rpartition(f'{os.sep}kmend{os.sep}')[2]}:{own[-1].lineno} {own[-1].name}"


def _alarm(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Hang


def run_one(one: Input, number: int, tally: Tally) -> None:
    """Run one input to its end and note what came of it."""
    start = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome = one.run()
        except KmendError as error:
            outcome = f"{error.rule}"
            text_of(error).encode(errors="backslashreplace")
            shown(document_of(error, one.kind))
            if not error.what or error.rule in ("failed", "internal"):
                raise Unshown(f"an error without a rule of its own: {error.what}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (Exception, Hang) as error:
        where = place_of(error.__traceback__)
        what = f"{type(error).__name__} at {where}"
        text = "".join(traceback.format_exception(error)[-12:])
        tally.blame(number, what, text, what)
        outcome = "DEFECT"
    seconds = time.perf_counter() - start
    tally.seconds += seconds
    tally.slowest = max(tally.slowest, (seconds, number))
    tally.outcomes[f"{one.kind}: {outcome}"] += 1


def _size() -> int:
    """This process's address space in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def work(maker: Maker, pipe: Connection) -> None:
    """A worker: takes ranges of numbers, says each number before it begins with it, answers with tallies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _alarm)
    limit = _size() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    progress = maker.folder / f"worker-{os.getpid()}"
    descriptor_ = os.open(progress, os.O_RDWR | os.O_CREAT)
    while (numbers := pipe.recv()) is not None:
        tally = Tally()
        for number in range(*numbers):
            os.pwrite(descriptor_, number.to_bytes(8, "little"), 0)
            run_one(maker.make(number), number, tally)
        pipe.send(tally)


@dataclass
class Worker:
    process: ForkProcess
    pipe: Connection
    block: tuple[int, int] = (0, 0)
    since: float = 0.0

    def begins(self, block: tuple[int, int]) -> None:
        self.block, self.since = block, time.monotonic()
        self.pipe.send(block)

    def reached(self, folder: Path) -> int:
        """The number at which it was seen last."""
        data = (folder / f"worker-{self.process.pid}").read_bytes()
        return int.from_bytes(data, "little")


class Run:
    """The whole run: hands blocks to workers, survives their deaths, keeps the state."""

    def __init__(self, maker: Maker, state: Path | None, jobs: int) -> None:
        self.maker, self.state, self.jobs = maker, state, jobs
        self.tally = Tally()
        self.done: set[int] = set()
        self.context = multiprocessing.get_context("fork")
        if state is not None and state.exists():
            self._load(json.loads(state.read_text()))

    def _load(self, document: dict[str, object]) -> None:
        if document["seed"] != self.maker.seed or document["block"] != BLOCK:
            sys.exit(f"{self.state} is of another run (seed {document['seed']})")
        done, outcomes, defects = document["done"], document["outcomes"], document["defects"]
        assert isinstance(done, list)
        assert isinstance(outcomes, dict)
        assert isinstance(defects, dict)
        self.done = set(done)
        self.tally = Tally(Counter(outcomes), {key: Defect(**row) for key, row in defects.items()})

    def _save(self) -> None:
        if self.state is not None:
            document = {
                "seed": self.maker.seed,
                "block": BLOCK,
                "done": sorted(self.done),
                "outcomes": dict(self.tally.outcomes),
                "defects": {
                    key: {"what": d.what, "text": d.text, "count": d.count, "numbers": d.numbers}
                    for key, d in self.tally.defects.items()
                },
            }
            write_atomically(self.state, json.dumps(document).encode())

    def _start(self) -> Worker:
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(self.maker, theirs), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, mine)

    def run(self, count: int, told: Callable[[int], None]) -> None:
        waiting = [(at, min(at + BLOCK, count)) for at in range(0, count, BLOCK) if at not in self.done]
        waiting.reverse()
        total = count - sum(b - a for a, b in waiting)
        workers = []
        saved = time.monotonic()
        for _ in range(min(self.jobs, len(waiting))):
            worker = self._start()
            worker.begins(waiting.pop())
            workers.append(worker)
        while workers:
            ready = wait([w.pipe for w in workers] + [w.process.sentinel for w in workers], timeout=5)
            for worker in list(workers):
                stuck = time.monotonic() - worker.since > SILENT + BLOCK * SECONDS / 10
                if worker.pipe not in ready and worker.process.sentinel not in ready and not stuck:
                    continue
                workers.remove(worker)
                try:
                    if stuck:
                        worker.process.kill()
                        raise EOFError
                    tally = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    at = worker.reached(self.maker.folder)
                    what = f"the process died (status {worker.process.exitcode})"
                    self.tally.blame(at, what, what, what)
                    waiting.append((at + 1, worker.block[1]))
                    fresh = self._start()
                else:
                    fresh = worker
                    self.tally.add(tally)
                    total += worker.block[1] - worker.block[0]
                    self.done.add(worker.block[0] - worker.block[0] % BLOCK)
                    told(total)
                if waiting:
                    fresh.begins(waiting.pop())
                    workers.append(fresh)
                else:
                    fresh.pipe.send(None)
                    fresh.process.join()
            if time.monotonic() - saved > 10:
                self._save()
                saved = time.monotonic()
        self._save()


def replay(maker: Maker, number: int, keep: Path | None) -> int:
    """One input once more, with its traceback."""
    signal.signal(signal.SIGALRM, _alarm)
    one = maker.make(number)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for name, data in one.files.items():
            (keep / name).write_bytes(data)
    tally = Tally()
    run_one(one, number, tally)
    print(*tally.outcomes, f"({tally.seconds:.3f} s)", sep="\n")
    for defect in tally.defects.values():
        print(defect.text)
    return 1 if tally.defects else 0


def report(run: Run, count: int, seconds: float) -> None:
    """The figures, as a table by kind and outcome, and every defect."""
    tally = run.tally
    ran = sum(tally.outcomes.values())
    print(f"\nFuzz run: {ran} of {count} inputs, seed {run.maker.seed}, in {seconds:.0f} s of this start")
    print(f"{ran / tally.seconds:.0f} a second and process; the slowest took {tally.slowest[0]:.2f} s "
          f"(number {tally.slowest[1]})" if tally.seconds else "")  # fmt: skip
    for kind in SHARES:
        rows = {k.partition(": ")[2]: n for k, n in tally.outcomes.items() if k.startswith(f"{kind}: ")}
        some = ", ".join(f"{name} {n}" for name, n in sorted(rows.items(), key=lambda row: -row[1]))
        print(f"  {kind:6} {sum(rows.values()):8}  {some}")
    print(f"defects: {sum(d.count for d in tally.defects.values())} inputs, {len(tally.defects)} places")
    for defect in sorted(tally.defects.values(), key=lambda d: -d.count):
        print(f"\n{defect.what}: {defect.count} inputs, e.g. {defect.numbers}\n{defect.text}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="how many inputs (default: 100000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--state", type=Path, help="file to keep the run's state in, and to go on from")
    parser.add_argument("--plain", action="store_true", help="only seeds that gcc makes: no kernel is needed")
    parser.add_argument("--replay", type=int, metavar="NUMBER", help="run one input, show its traceback")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="with --replay: write the input's files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kmend-fuzz-") as name:
        folder = Path(name)
        if args.plain:
            seeds = plain(folder)
        else:
            from measure import settings  # noqa: PLC0415 - reads the settings of a machine with kernels

            seeds = full(settings(), folder)
        maker = Maker(seeds, args.seed, folder)
        gc.collect()
        gc.freeze()
        if args.replay is not None:
            return replay(maker, args.replay, args.keep)
        run = Run(maker, args.state, max(1, args.jobs))
        start = last = time.monotonic()

        def told(total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 30:
                last = now
                print(f"{total} inputs, {len(run.tally.defects)} defects, {now - start:.0f} s", flush=True)

        run.run(args.count, told)
        report(run, args.count, time.monotonic() - start)
    return 1 if run.tally.defects else 0


if __name__ == "__main__":
    sys.exit(main())
