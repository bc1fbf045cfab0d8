"""Reader and writer held to real files: read, written anew, read and written again.

    .venv/bin/python bench/check_round_trip.py --count 500 --seed 1

Takes modules of the prepared kernels and compiled units out of kmend's cache, at random. For each of them

- the second writing must equal the first to the byte;
- what was written must hold the same sections, symbols and relocations as the file itself;
- readelf -a must say of it what it says of the file: no warning and no error;
- objdump -dr must show the same instructions and relocations (a tenth of the files, the slowest step).

The status is 1 when one of them differs.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from kmend.core.config import Config
from kmend.elf.model import (
    SHF_ALLOC,
    SHT_RELA,
    SHT_STRTAB,
    SHT_SYMTAB,
    SHT_SYMTAB_SHNDX,
    ElfFile,
    Section,
    Symbol,
)
from kmend.elf.reader import read
from kmend.elf.writer import rewrite
from measure import CMDLINE, settings, show, target_of
from seeds import LINE_612, UNITS, unit_object

#: Of the files so many are modules, the others units, as far as the cache has them.
MODULES = 0.6
OBJDUMP = 0.1


def files(config: Config, count: int, rng: random.Random) -> list[tuple[str, Path]]:
    """Kind and path of ``count`` files."""
    targets = [target_of(config, release) for release in (CMDLINE.release, LINE_612)]
    for target in targets:  # so that there are units in an empty cache too
        for source in UNITS:
            unit_object(config, target, source)
    modules = sorted(p for t in targets if t.modules for p in t.modules.rglob("*.ko"))
    units = sorted(config.objects.glob("*/*.o"))
    few = rng.sample(units, min(len(units), count - int(MODULES * count)))
    many = rng.sample(modules, min(len(modules), count - len(few)))
    return [("module", path) for path in many] + [("unit", path) for path in few]


def content(elf: ElfFile) -> list[Section]:
    """The sections that are not about the file itself."""
    own = {SHT_SYMTAB, SHT_SYMTAB_SHNDX}
    return [
        s
        for s in elf.sections[1:]
        if s.type not in own
        and not (s.type == SHT_STRTAB and not s.flags & SHF_ALLOC)
        and not (s.type == SHT_RELA and s.info)
    ]


def differences(before: ElfFile, after: ElfFile) -> list[str]:
    """In what the second file differs from the first, as far as a linker or the kernel could see it."""
    out = []
    mine, theirs = content(before), content(after)
    if len(mine) != len(theirs) or len(before.symbols) != len(after.symbols):
        return ["the number of sections or symbols"]
    place = {a.index: b.index for a, b in zip(mine, theirs, strict=True)}

    def moved(symbol: Symbol) -> Symbol:
        section = place.get(symbol.section, -1) if symbol.defined else symbol.section
        return replace(symbol, section=section)

    for a, b in zip(mine, theirs, strict=True):
        same = replace(a, index=b.index, link=b.link, rela_index=b.rela_index, rela_flags=b.rela_flags)
        if same != b or a.relocs != b.relocs or place.get(a.link, a.link) != b.link:
            out.append(f"the section {a.name}")
    names = [moved(s) for s in before.symbols]
    out += [f"the symbol {a.name}" for a, b in zip(names, after.symbols, strict=True) if a != b]
    relas = [
        sorted((s.name, s.flags, s.size) for s in elf.sections if s.type == SHT_RELA and s.info)
        for elf in (before, after)
    ]
    return out if relas[0] == relas[1] else [*out, "the relocation sections"]


def said(program: str, *words: str | Path) -> tuple[str, str]:
    """What a program of binutils says, on stdout and stderr; file names left out."""
    done = subprocess.run([program, *words], capture_output=True, text=True, errors="replace", check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip() and "file format" not in line]
    return "\n".join(lines), done.stderr.replace(str(words[-1]), "FILE") + ("!" if done.returncode else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    size, reading, writing = 0, 0.0, 0.0
    with TemporaryDirectory(prefix="kmend-round-") as name:
        place = Path(name) / "again.o"
        for kind, path in files(settings(), args.count, rng):
            data = path.read_bytes()
            start = perf_counter()
            elf = read(data, path.name)
            between = perf_counter()
            first = rewrite(elf)
            end = perf_counter()
            reading, writing, size = reading + between - start, writing + end - between, size + len(data)
            counts[kind] += 1
            again = read(first, path.name)
            found = differences(elf, again)
            if rewrite(again) != first:
                found.append("the second writing")
            place.write_bytes(first)
            complaint = said("readelf", "-aW", place)[1]
            counts["readelf -a"] += 1
            if complaint and complaint != said("readelf", "-aW", path)[1]:
                found.append(f"readelf: {complaint[:200]}")
            if rng.random() < OBJDUMP:
                counts["objdump -dr"] += 1
                if said("objdump", "-drw", place) != said("objdump", "-drw", path):
                    found.append("objdump -dr")
            wrong += [f"{path}: {what}" for what in found]
    total = counts["module"] + counts["unit"]
    show(
        f"Read, written, read, written: {total} files, seed {args.seed}",
        ("", "number"),
        [
            ["modules", str(counts["module"])],
            ["units", str(counts["unit"])],
            ["held to readelf -a", str(counts["readelf -a"])],
            ["held to objdump -dr", str(counts["objdump -dr"])],
            ["differences", str(len(wrong))],
        ],
        [
            f"{size / 1e6:.1f} MB; {size / 1e6 / reading:.0f} MB/s read, {size / 1e6 / writing:.0f} written",
            *wrong[:20],
        ],
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
