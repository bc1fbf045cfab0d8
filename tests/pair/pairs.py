"""Pairs of objects from C text, compiled with the flags that matter to the differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kmend.core.run import run
from kmend.diff.compare import ObjectDiff
from kmend.diff.select import Selection
from kmend.diff.unit import UnitObject

FLAGS = [
    *("-O2", "-std=gnu11", "-mcmodel=kernel", "-fno-pie", "-mno-red-zone", "-mno-sse"),
    *("-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-fno-stack-protector"),
    *("-fno-jump-tables", "-fno-common", "-fno-strict-aliasing", "-ffreestanding"),
    *("-pg", "-mfentry", "-mrecord-mcount", "-ffunction-sections", "-fdata-sections"),
]

#: What kernel code has at hand: a WARN() whose bug table entry holds the line, as asm/bug.h makes it.
PRELUDE = """
#define noinline __attribute__((__noinline__))
#define __init __attribute__((section(".init.text"), __noinline__, no_instrument_function))
#define notrace __attribute__((no_instrument_function))
extern int printk(const char *format, ...);
extern int outside(int x);
#define BUG_AT(line) asm volatile("1: ud2\\n.pushsection __bug_table,\\"aw\\"\\n2: .long 1b - .\\n" \\
    ".long %c0 - .\\n.word %c1\\n.word 0\\n.popsection" :: "i" (__FILE__), "i" (line))
#line 1 "unit.c"
"""


def compiled(folder: Path, name: str, text: str, *, flags: list[str] | None = None) -> UnitObject:
    """One object of the C text, parsed."""
    source, out = folder / f"{name}.c", folder / f"{name}.o"
    source.write_text(PRELUDE + text)
    run(["gcc", *(FLAGS if flags is None else flags), "-c", source, "-o", out])
    return UnitObject.parse(out.read_bytes(), name)


Pair = Callable[[str, str], tuple[ObjectDiff, Selection]]
