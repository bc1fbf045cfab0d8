"""What the fuzz run begins with: sound objects, modules, patches, types and descriptors, all of them small.

The objects are real units of two kernels, the modules what `kmend build` makes of the examples. Without a
kernel (``plain``) only those are there that gcc makes of the C text below.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from kmend.core.config import Config
from kmend.core.target import Release, Target
from kmend.elf.reader import read
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild
from kmend.module.layout import modinfo
from kmend.verify.rules import TargetFacts, check
from kmend.view import TargetView
from measure import CMDLINE, EXAMPLES, EXT4, kmend, target_of
from mutate import Seed

#: Units whose objects are small (3 to 25 kB) and which have, together, nearly every table that kmend knows.
UNITS = (
    "fs/proc/cmdline.c",
    "fs/proc/uptime.c",
    "fs/stack.c",
    "fs/proc/consoles.c",
    "mm/mmzone.c",
    "net/core/netevent.c",
    "net/ipv4/protocol.c",
    "fs/ext4/acl.c",
    "kernel/utsname.c",
    "kernel/irq_work.c",
    "mm/maccess.c",
    "arch/x86/kernel/hw_breakpoint.c",
    "kernel/ucount.c",
)
LINE_612 = Release("6.12.117+deb12-amd64")

FLAGS = (
    *("-O2", "-std=gnu11", "-mcmodel=kernel", "-fno-pie", "-mno-red-zone", "-mno-sse", "-fno-common"),
    *("-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-fno-stack-protector", "-fno-jump-tables"),
    *("-fno-strict-aliasing", "-ffreestanding", "-pg", "-mfentry", "-mrecord-mcount"),
    *("-ffunction-sections", "-fdata-sections", "-fshort-wchar"),
)
#: Static locals, copies of a function, strings, constants, tables, declarations: twice, with differences.
TEXT = r"""
#define NOINLINE __attribute__((__noinline__))
#define SECTION(name) __attribute__((section(name), used))
typedef unsigned short wide;
typedef unsigned long u64;
extern int outside(const void *text, ...);
extern void never(void) __attribute__((noreturn, cold));
extern double ratio;
struct pair {
    int first; struct { u64 a : 3, b : 5; } in; const struct pair *next; enum { ONE = FIRST, TWO } kind;
};
static struct pair pairs[3] SECTION(".data..read_mostly");
static int limit SECTION(".data..read_mostly") = 5;
static const struct pair chain[2] = { { 1, { 1, 2 }, &chain[1], ONE }, { 2, { 3, 4 }, &chain[0], TWO } };
static NOINLINE int part(int x) { static int count;
    if (x > limit) { outside("cold", __func__); never(); } return count += x; }
static NOINLINE const char *named(int x) { switch (x) { case 0: return "zero"; case 1: return "one";
    case 2: return "two"; case 3: return "three"; case 4: return WORD; } return __func__; }
int once(int x) { static unsigned char __already_done SECTION(".data.once"); static u64 seen[4];
    if (!__already_done) { __already_done = 1; outside(L"wide", seen); } return part(x + sizeof(pairs)); }
int twice(int x) { static int count; static const int table[] = { 1, 2, MORE }; count++;
    asm volatile("1: ud2\n.pushsection __bug_table,\"aw\"\n2: .long 1b - .\n.long %c0 - .\n.word %c1\n"
        ".word 0\n.popsection" :: "i" (__FILE__), "i" (__LINE__));
    return table[x & 3] + (chain[x & 1].next == &chain[0]) + part(x) + outside(named(x)) + (x == limit); }
asm(".pushsection .init.text,\"ax\"\n.globl begin\n.type begin,@function\nbegin: nop\nret\n"
    ".size begin,.-begin\n.popsection");
static void before(void *object) { outside("callback", object); }
static void *hook SECTION(".kmend.callbacks.pre_patch") = before;
static u64 state[2] SECTION(".kmend.states") = { 7, 1 };
static void *ignored SECTION(".kpatch.ignore.functions") = once;
const char *tail(int x) { return named(x + ADDED); }
"""
PAIR = (
    ('-DWORD="four"', "-DMORE=3,4", "-DADDED=0", "-DFIRST=1"),
    ('-DWORD="vier"', "-DMORE=3,5,6", "-DADDED=1", "-DFIRST=2"),
)

ONE = b"""// SPDX-License-Identifier: GPL-2.0
#include <linux/kernel.h>

static int count;

/* Adds. */
static int add(int x)
{
\tif (x > 3 &&
\t    count)
\t\treturn 1;
\treturn x + 1;
}

#ifdef CONFIG_NET
int one(int x)
{
\tWARN_ON(x);
\treturn add(x);
}
#else
int one(int x)
{
\treturn add(x) - 1;
}
#endif

#define EACH(x) \\
\tdo { (x)++; } \\
\twhile (0)

int two(const char *text)
{
\tEACH(count);
\tpr_info("two: %s\\n",
\t\ttext);
\treturn count;
}
"""
TREE = {
    "kernel/one.c": ONE,
    "fs/two.c": b"int a;\r\nint b;\r\n\r\nint c(void)\r\n{\r\n\treturn a;\r\n}\r\n",
    "include/linux/three.h": b"#define THREE 3\nstatic inline int three(void)\n{\n\treturn THREE;\n}",
    "Makefile": b"obj-y := one.o\n",
    "arch/x86/entry/entry.S": b"\tret\n",
    "drivers/a b.c": b"int blank;\n",
}
_PATCHES = (
    b"""From 0123456789012345678901234567890123456789 Mon Sep 17 00:00:00 2001
From: =?utf-8?q?J=C3=B6rg?= <joerg@example.org>
Date: Mon, 1 Jan 2024 00:00:00 +0000
Subject: [PATCH v2 1/2] one: =?utf-8?b?w6RuZGVybg==?=
 and more

[ Upstream commit 0123456789abcdef0123456789abcdef01234567 ]

Text.
---
 kernel/one.c | 5 ++++-
 1 file changed, 4 insertions(+), 1 deletion(-)

diff --git a/kernel/one.c b/kernel/one.c
index 0123456..789abcd 100644
--- a/kernel/one.c
+++ b/kernel/one.c
@@ -1,6 +1,7 @@
 // SPDX-License-Identifier: GPL-2.0
 #include <linux/kernel.h>
~
+static int more;
 static int count;
~
 /* Adds. */
@@ -9,7 +10,9 @@ static int add(int x)
 \tif (x > 3 &&
 \t    count)
 \t\treturn 1;
-\treturn x + 1;
+\tif (!more)
+\t\treturn 2;
+\treturn x + 2;
 }
~
 #ifdef CONFIG_NET
@@ -31,7 +34,6 @@ int one(int x)
~
 int two(const char *text)
 {
-\tEACH(count);
 \tpr_info("two: %s\\n",
 \t\ttext);
 \treturn count;
--~
2.39.5
""",
    b"""--- linux.orig/fs/two.c\t2024-01-01 00:00:00.000000000 +0000
+++ linux/fs/two.c\t2024-01-02 00:00:00.000000000 +0000
@@ -1,4 +1,4 @@
 int a;\r
-int b;\r
+long b;\r
 \r
 int c(void)\r
--- linux.orig/include/linux/three.h\t2024-01-01 00:00:00.000000000 +0000
+++ linux/include/linux/three.h\t2024-01-02 00:00:00.000000000 +0000
@@ -2,4 +2,5 @@
 static inline int three(void)
 {
-\treturn THREE;
-}
\\ No newline at end of file
+\tint x = THREE;
+\treturn x;
+}
""",
    b"""diff --git a/kernel/one.c b/kernel/new.c
similarity index 97%
rename from kernel/one.c
rename to kernel/new.c
index 0123456..789abcd 100644
--- a/kernel/one.c
+++ b/kernel/new.c
@@ -4,3 +4,3 @@
-static int count;
+static int number;
~
 /* Adds. */
diff --git a/drivers/a b.c b/drivers/a b.c
old mode 100644
new mode 100755
diff --git "a/drivers/\\303\\244.c" "b/drivers/\\303\\244.c"
new file mode 100644
index 0000000..789abcd
--- /dev/null
+++ "b/drivers/\\303\\244.c"
@@ -0,0 +1,2 @@
+int added;
+int last;
\\ No newline at end of file
diff --git a/fs/two.c b/fs/two.c
deleted file mode 100644
index 0123456..0000000
--- a/fs/two.c
+++ /dev/null
@@ -1,7 +0,0 @@
-int a;\r
-int b;\r
-\r
-int c(void)\r
-{\r
-\treturn a;\r
-}\r
diff --git a/include/linux/three.h b/include/linux/four.h
similarity index 100%
copy from include/linux/three.h
copy to include/linux/four.h
""",
    b"""From: somebody
Subject: mail
Content-Transfer-Encoding: quoted-printable

--- a/kernel/one.c
+++ b/kernel/one.c
@@ -3,3 +3,3 @@
=20
-static int count;
+static int count =3D 1;
=20
""",
    b"""Index: linux/kernel/one.c
===================================================================
--- linux.orig/kernel/one.c
+++ linux/kernel/one.c
@@ -15,4 +15,5 @@ static int add(int x)
 int one(int x)
 {
+\tcount++;
 \tWARN_ON(x);
 \treturn add(x);
""",
)
#: ``~`` at the end of a line stands for the blank that editors take away there.
PATCHES = tuple(patch.replace(b"~\n", b" \n") for patch in _PATCHES)
SERIES = b"one.patch\ntwo.patch -p0 # why\n\n# nothing\nthree.patch -p1\n"
DESCRIPTOR = b"""name = "count"
license = "GPL"
replace = false
description = "counts"

[[object]]
name = "vmlinux"
funcs = [{ old_name = "vfs_read", new_func = "my_read", sympos = 1 }]
pre_patch = "before"

[[state]]
id = 1
version = 2
"""
SYMVERS = (
    b"0x00000000\tone\tvmlinux\tEXPORT_SYMBOL\t\n0x0123abcd\ttwo\tfs/ext4/ext4\tEXPORT_SYMBOL_GPL\tNAMES\n"
    b"0xffffffff\tthree\tdrivers/md/dm-mod\tEXPORT_SYMBOL\t\n"
)


@dataclass(frozen=True, slots=True)
class Seeds:
    """``pairs`` are an original and a patched object; ``modules`` come with the target that they are for."""

    pairs: list[tuple[Seed, Seed]]
    types: list[Seed]
    modules: list[tuple[Seed, TargetFacts]]
    sizes: dict[str, int] | None = None
    tree: dict[str, bytes] = field(default_factory=lambda: TREE)
    patches: tuple[bytes, ...] = PATCHES


def gcc(folder: Path, name: str, *flags: str) -> bytes:
    """The object that gcc makes of the text above."""
    # in the folder, so that __FILE__ is the same text in every run
    (folder / "seed.c").write_text(TEXT)
    subprocess.run(["gcc", *FLAGS, *flags, "-c", "seed.c", "-o", f"{name}.o"], cwd=folder, check=True)
    return (folder / f"{name}.o").read_bytes()


def plain(folder: Path) -> Seeds:
    """Seeds that need a compiler and no kernel."""
    pair = [Seed.of(f"text-{i}", gcc(folder, f"text-{i}", *flags)) for i, flags in enumerate(PAIR)]
    types = [
        Seed.of(f"types-{i}", gcc(folder, f"types-{i}", "-gbtf", *flags)) for i, flags in enumerate(PAIR)
    ]
    return Seeds([(pair[0], pair[1])], types, [])


def unit_object(config: Config, target: Target, source: str) -> Seed | None:
    """The object of a unit as the kernel's own source has it; None: this kernel does not compile it."""
    units = kbuild.unit_map(target).units(source)
    if not units:
        return None
    command = kbuild.commands(target, units[:1])[units[0]]
    made = compiling.original(config, target, units[0], command)
    return Seed.of(f"{source} of {target.release}", made.path.read_bytes())


def full(config: Config, folder: Path) -> Seeds:
    """All seeds: units of two kernels in pairs, and the examples' modules."""
    seeds = plain(folder)
    old, new = target_of(config, CMDLINE.release), target_of(config, LINE_612)
    for source in UNITS:
        found = [seed for target in (old, new) if (seed := unit_object(config, target, source)) is not None]
        if len(found) == 2:
            seeds.pairs.append((found[0], found[1]))
    facts: dict[str, TargetFacts] = {}
    for number, (patch, release) in enumerate(
        ((CMDLINE.patch, CMDLINE.release), (CMDLINE.patch, LINE_612), (EXT4.patch, EXT4.release))
    ):
        facts[release] = facts_of(config, target_of(config, release))
        name = f"seed_{number}"
        kmend("build", patch, "--kernel", release, "-o", folder, "-n", name, cache=config.cache)
        seeds.modules.append((Seed.of(name, (folder / f"{name}.ko").read_bytes()), facts[release]))
    by_hand = EXAMPLES / "vfs-read-count"
    kmend("module", by_hand, "--kernel", old.release, "-o", folder, "-n", "seed_hand", cache=config.cache)
    data = (folder / "seed_hand.ko").read_bytes()
    seeds.modules.append((Seed.of("seed_hand", data), facts[old.release]))
    for seed, known in seeds.modules:
        # What this asks of the target is known from now on, and no input pays for it.
        if refused := check(read(seed.data), known, seed.name).refusals:
            sys.exit(f"{seed.name} does not pass as it is: {refused}")
    return Seeds(seeds.pairs, seeds.types, seeds.modules, facts[old.release].layout.special_sizes())


def facts_of(config: Config, target: Target) -> TargetFacts:
    """What the rules ask of a target, as ``kmend check`` has it, made once."""
    view = TargetView(config, target)
    vermagic = dict(modinfo(view.glue())).get("vermagic", "")
    return TargetFacts(
        target.release,
        vermagic,
        view.layout,
        view.exports,
        view.symbols,
        view.optional_module,
        view.traceable,
    )
