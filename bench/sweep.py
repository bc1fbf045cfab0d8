"""The builder held against real fixes: the changed C files between two Debian kernels, each as a patch.

    make sweep                                    n=150, seed 1, with headers, 40 loaded
    .venv/bin/python bench/sweep.py -n 20 --load 5

Each changed file that the older kernel compiles becomes a patch by itself. Where it does not
compile alone, it gets the hunks of changed headers that bring the names which the compiler misses, as the
commit had them. Where that is not enough it needs other C files as well, and "does not compile"; a header
change that more than a few hundred units may see is left out as "too wide", for the time it takes. Every
patch is built for the older kernel; a sample of the modules is loaded in the lab, the patched modules after
it, and taken back. `failed` and `crashed` are defects of kmend.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kmend.core.config import Config, load
from kmend.core.errors import KmendError
from kmend.core.progress import Silent
from kmend.core.report import BuildReport, Outcome
from kmend.core.target import Linkage, Release, Target
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild, overlay, store
from kmend.lab.guest import Guest
from kmend.pairs import reached_by
from kmend.patch.apply import apply
from kmend.patch.intake import parse
from kmend.pipeline import BuildRequest, build

#: A patch whose headers more units may see than this is not built.
WIDE = 400


@dataclass
class Sample:
    """One changed file on its way through the sweep."""

    path: str
    files: list[str]
    outcome: str = ""
    rules: tuple[str, ...] = ()
    seconds: float = 0.0
    note: str = ""
    module: Path | None = None
    objects: list[str] = field(default_factory=list)


def changed_files(old: Target, new: Target) -> tuple[list[str], list[str]]:
    """Changed .c files that the older kernel compiles, and changed headers."""
    found = subprocess.run(
        ["diff", "-rq", "--no-dereference", old.source, new.source],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    names = [
        line.split(" and ")[0].removeprefix(f"Files {old.source}/")
        for line in found.splitlines()
        if line.startswith("Files ")
    ]
    units = kbuild.unit_map(old)
    sources = [
        n for n in names if n.endswith(".c") and any(u.linkage is not Linkage.LIBRARY for u in units.units(n))
    ]
    return sorted(sources), sorted(n for n in names if n.endswith(".h") and "/generated/" not in n)


def patch_of(old: Target, new: Target, paths: list[str]) -> bytes:
    out = b""
    for path in paths:
        before, after = old.source / path, new.source / path
        out += subprocess.run(
            [
                *("diff", "-u", "-N", "--label", f"a/{path}", "--label", f"b/{path}"),
                str(before if before.exists() else "/dev/null"),
                str(after),
            ],
            capture_output=True,
            check=False,
        ).stdout
    return out


def hunks_of(patch: bytes) -> list[tuple[bytes, bytes]]:
    """The hunks of a patch, each with its file's header."""
    out = []
    for text in re.split(rb"(?m)^(?=--- )", patch):
        header, *hunks = re.split(rb"(?m)^(?=@@ )", text)
        out += [(header, hunk) for hunk in hunks]
    return out


def with_hunks(hunks: list[tuple[bytes, bytes]]) -> bytes:
    """A patch of some hunks, in their order."""
    out, last = b"", None
    for header, hunk in hunks:
        out += hunk if header == last else header + hunk
        last = header
    return out


def brings(hunk: bytes, names: set[str]) -> bool:
    """Whether one of the lines that the hunk adds holds one of the names."""
    added = b"\n".join(line for line in hunk.splitlines() if line.startswith(b"+"))
    return any(re.search(rb"\b" + re.escape(name.encode()) + rb"\b", added) for name in names)


def try_build(
    config: Config, old: Target, sample: Sample, number: int, out: Path, patch: bytes
) -> BuildReport | None:
    name = f"sweep_{number}"
    request = BuildRequest(
        patches=((f"{name}.patch", patch),),
        release=Release(store.name_of(old)),
        output=out,
        name=name,
    )
    try:
        return build(request, config, Silent())
    except KmendError as error:
        sample.outcome, sample.rules, sample.note = "failed", (error.rule,), error.what
    except Exception as error:  # a traceback is what the sweep looks for
        sample.outcome, sample.note = "crashed", repr(error)
    return None


def needed_headers(new: Target, path: str, changed: list[str]) -> list[str]:
    """The changed headers that the new version of the file reads, by the compiler's own list."""
    wanted = set(changed)
    found: set[str] = set()
    for unit in kbuild.unit_map(new).units(path):
        command = kbuild.commands(new, [unit])[unit]
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KmendError):
            deps = compiling.preprocessed(unit, command, tree=new.source, scratch=Path(folder)).deps
            found |= wanted & {d.removeprefix("./") for d in deps}
    return sorted(found)


def seen_by(target: Target, patch: bytes) -> int:
    """How many units may see a difference in the headers of the patch."""
    try:
        applied = apply(parse((("x.patch", patch),)), overlay.tree_reader(target.source))
        return len(reached_by(applied, target, Silent()).candidates)
    except KmendError:
        return 0  # the build will say why


def does_not_compile(report: BuildReport | None) -> bool:
    return report is not None and {r.rule for r in report.refused} == {"compile-error"}


def with_needed_hunks(
    config: Config,
    old: Target,
    new: Target,
    sample: Sample,
    number: int,
    out: Path,
    own: bytes,
    extra: list[str],
    report: BuildReport | None,
) -> BuildReport | None:
    """Add the headers' hunks that bring what the compiler misses, until it compiles or nothing is left."""
    hunks = hunks_of(patch_of(old, new, extra))
    chosen: set[int] = set()
    while does_not_compile(report) and report is not None:
        said = "\n".join(row.why for row in report.refused)
        # 'name', 'struct name', or 'pointer->name'
        names = set(re.findall(r"[\u2018'](?:[\w\s]+|[\w>.-]+(?:->|\.))??(\w+)[\u2019']", said))
        absent = re.findall(r"fatal error: (\S+): No such file", said)
        more = {
            i
            for i, (header, hunk) in enumerate(hunks)
            if i not in chosen and (brings(hunk, names) or any(f.encode() in header for f in absent))
        }
        if not more:
            break
        chosen |= more
        picked = [hunks[i] for i in sorted(chosen)]  # what was added may need others itself
        patch = with_hunks(picked) + own
        units = seen_by(old, patch)
        if units > WIDE:
            sample.outcome, sample.note = "too wide", f"{units} units may see the header's change"
            return None
        report = try_build(config, old, sample, number, out, patch)
        sample.files = [*{header.split()[1].decode()[2:]: 0 for header, _ in picked}, sample.path]
    return report


def run_one(
    config: Config, old: Target, new: Target, sample: Sample, number: int, out: Path, changed: list[str]
) -> None:
    start = time.perf_counter()
    own = patch_of(old, new, [sample.path])
    report = try_build(config, old, sample, number, out, own)
    if does_not_compile(report):
        extra = needed_headers(new, sample.path, changed)
        report = with_needed_hunks(config, old, new, sample, number, out, own, extra, report)
    sample.seconds = time.perf_counter() - start
    if report is None:
        return
    sample.rules = tuple(sorted({r.rule for r in report.refused}))
    sample.outcome = report.result.value
    if sample.rules == ("compile-error",):
        sample.outcome = "does not compile"
    elif report.refused:
        sample.note = report.refused[0].what
    if report.result is Outcome.BUILT and report.module:
        sample.module = Path(report.module)
        sample.objects = [o.name for o in report.objects]


BAD = ("BUG:", "WARNING:", "Oops", "invalid relocation", "overflow", "refusing to load", "general protection")


def load_one(config: Config, old: Target, sample: Sample) -> str:
    """Load the module in a fresh guest, then what it patches; take it back. Returns '' or what went wrong.

    A module that the stock kernel cannot load in a guest either (for want of hardware or of a parameter) is
    not asked for.
    """
    assert sample.module is not None
    name = json.loads(sample.module.with_suffix(".json").read_text())["name"]
    with Guest.of(old, config.lab) as guest:
        guest.put("/root/p.ko", sample.module.read_bytes())
        late = [
            o for o in sample.objects if o != "vmlinux" and guest.run(f"modprobe {o}", timeout=90).status == 0
        ]
        for obj in late:
            guest.run(
                f"modprobe -r {obj}", timeout=90
            )  # it may not be able to go: then it is patched at once
        steps = ["insmod /root/p.ko"]
        steps += [f"modprobe {o} && [ $(cat /sys/kernel/livepatch/{name}/{o}/patched) = 1 ]" for o in late]
        wait = (
            f"i=0; while [ -e /sys/kernel/livepatch/{name} ] && [ $i -lt 60 ]; do sleep .5; i=$((i+1)); done"
        )
        steps += [
            f"while [ $(cat /sys/kernel/livepatch/{name}/transition) = 1 ]; do sleep .2; done",
            f"echo 0 > /sys/kernel/livepatch/{name}/enabled; {wait}; rmmod {name}",
        ]
        for step in steps:
            done = guest.run(step, timeout=90)
            if done.status != 0:
                return f"{step}: {done.errors.strip() or done.text.strip()}"
        log = [m.text for m in guest.dmesg()]
        bad = [line for line in log if any(word in line for word in BAD)]
        if bad:
            return bad[0]
        if not any(f"'{name}': unpatching complete" in line for line in log):
            return "no 'unpatching complete' in the log"
    return ""


def rows(samples: list[Sample]) -> Iterator[str]:
    counts = Counter((s.outcome, s.rules if s.outcome == "refused" else ()) for s in samples)
    for (outcome, rules), count in counts.most_common():
        yield f"{count:5}  {outcome:16} {', '.join(rules)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", default="6.1.0-53-amd64")
    parser.add_argument("--new", default="6.1.0-54-amd64")
    parser.add_argument("-n", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--load", type=int, default=40, help="how many built modules to load in the lab")
    args = parser.parse_args()
    config = load()
    print(f"preparing {args.old} and {args.new}", flush=True)
    old, new = (store.fetch(config, Release(r), Silent()) for r in (args.old, args.new))
    sources, changed = changed_files(old, new)
    chance = random.Random(args.seed)
    picked = chance.sample(sources, min(args.n, len(sources)))
    print(
        f"{len(sources)} changed files that {args.old} compiles, {len(changed)} changed headers; "
        f"{len(picked)} drawn with seed {args.seed}",
        flush=True,
    )
    samples = []
    with tempfile.TemporaryDirectory(prefix="kmend-sweep-") as folder:
        for number, path in enumerate(picked):
            sample = Sample(path, [path])
            run_one(config, old, new, sample, number, Path(folder), changed)
            samples.append(sample)
            more = f" +{len(sample.files) - 1} headers" if len(sample.files) > 1 else ""
            print(
                f"{sample.seconds:6.1f} s  {sample.outcome:16} {path}{more}",
                *sample.rules,
                sample.note,
                flush=True,
            )
        built = [s for s in samples if s.module]
        loaded = chance.sample(built, min(args.load, len(built)))
        wrong = []
        for sample in loaded:
            try:
                why = load_one(config, old, sample)
            except KmendError as error:
                why = f"{error.what}: {error.why}"
            print(f"loaded  {sample.path}  {why or 'well'}", flush=True)
            if why:
                wrong.append(sample)
    compiling_ones = [s for s in samples if s.outcome not in ("does not compile", "too wide")]
    good = [s for s in compiling_ones if s.outcome in ("built", "nothing-changed")]
    print("\n" + "\n".join(rows(samples)))
    share = 100 * len(good) / max(len(compiling_ones), 1)
    times = sorted(s.seconds for s in compiling_ones) or [0.0]
    print(
        f"\n{len(good)} of {len(compiling_ones)} that compile were built or need nothing ({share:.1f} %); "
        f"seconds each: median {times[len(times) // 2]:.1f}, worst {times[-1]:.1f}"
    )
    print(f"loaded and taken back: {len(loaded) - len(wrong)} of {len(loaded)}")
    defects = [s for s in samples if s.outcome in ("failed", "crashed")]
    return 1 if defects or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
