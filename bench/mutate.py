"""Mutations for the fuzz run: damaged object files and damaged patches, made from sound ones.

All of them take a :class:`random.Random` and nothing else that changes: the same generator in the same state
gives the same bytes. They know the ELF format by themselves; kmend's own reader, which is what is being
tested, has no part in them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

_SHDR = struct.Struct("<IIQQQQIIQQ")
#: The fields of a section header: offset in it, and struct's letter.
_SECTION_FIELDS = (
    *((0, "I"), (4, "I"), (8, "Q"), (16, "Q"), (24, "Q")),
    *((32, "Q"), (40, "I"), (44, "I"), (48, "Q"), (56, "Q")),
)
_SYMBOL_FIELDS = ((0, "I"), (4, "B"), (5, "B"), (6, "H"), (8, "Q"), (16, "Q"))
#: Offset, type, symbol, addend (as ``r_info`` lies in memory: the type first).
_RELA_FIELDS = ((0, "Q"), (8, "I"), (12, "I"), (16, "Q"))
#: The fields of the file header behind its identification.
_HEADER_FIELDS = (
    *((16, "H"), (18, "H"), (20, "I"), (24, "Q"), (32, "Q"), (40, "Q")),
    *((48, "I"), (52, "H"), (54, "H"), (56, "H"), (58, "H"), (60, "H"), (62, "H")),
)
_SIZES = {"B": 1, "H": 2, "I": 4, "Q": 8}
#: Numbers at which programs go wrong: small ones, section types and flags, the reserved indices, the ends.
NUMBERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14, 16, 17, 18, 24, 32, 48, 64, 127, 128, 255, 256),
    *(0x7FFF, 0x8000, 0xFEFF, 0xFF00, 0xFF20, 0xFFF1, 0xFFF2, 0xFFFF, 0x10000, 0x100000),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 1),
)
#: Names that mean something to kmend.
WORDS = (
    *(b".altinstructions", b".altinstr_replacement", b".altinstr_aux", b"__jump_table", b"__bug_table"),
    *(b"__ex_table", b"__mcount_loc", b".orc_unwind", b".orc_unwind_ip", b".static_call_sites", b".bss.x"),
    *(b".parainstructions", b".smp_locks", b".return_sites", b".call_sites", b".retpoline_sites", b".data.x"),
    *(
        b".discard.x",
        b".init.text",
        b".init.data",
        b".exit.text",
        b"__dyndbg",
        b".modinfo",
        b".rodata.str1.1",
    ),
    *(b".rodata.cst8", b"__ksymtab_strings", b".kmend.states", b".kmend.callbacks.pre_patch", b".BTF"),
    *(
        b".kmend.ignore.functions",
        b".kmend.ignore.sections",
        b".kpatch.force",
        b".text.unlikely",
        b".data..ro",
    ),
    *(b"x.cold", b"x.part.0", b"x.isra.0", b"x.constprop.0.cold", b"__func__.1", b"CSWTCH.7", b"count.3"),
    *(
        b"a#2",
        b"a#b.1",
        b"x.99999999999999999999",
        b"__UNIQUE_ID_x1",
        b"__pfx_x",
        b"__already_done.5",
        b"\xff\xfe",
    ),
    *(b".klp.sym.vmlinux.x,0", b".klp.sym.ext4.x,1", b".klp.rela.vmlinux..text", b".klp.rela.ext4..data"),
    *(
        b"livepatch=Y",
        b"vermagic=6.1.0-56-amd64 SMP",
        b"name=",
        b"license=GPL",
        b"kmend_patch",
        b"__this_module",
    ),
    *(b"", b".", b"#2", b".1", b".cold", b".klp.sym.", b"x\xcc\x80", "x.\u0661".encode(), b"a" * 60),
)


@dataclass(frozen=True, slots=True)
class Seed:
    """A sound object file and the places of its rows: offsets in the file."""

    name: str
    data: bytes
    headers: int
    count: int
    sections: tuple[tuple[int, ...], ...]
    symbols: tuple[int, ...]
    relocs: tuple[int, ...]
    texts: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, name: str, data: bytes) -> Seed:
        """Look at a sound file once."""
        (headers,) = struct.unpack_from("<Q", data, 40)
        (count,) = struct.unpack_from("<H", data, 60)
        rows = [_SHDR.unpack_from(data, headers + 64 * i) for i in range(count)]
        symbols: list[int] = []
        relocs: list[int] = []
        texts: list[tuple[int, int]] = []
        for row in rows:
            kind, offset, size = row[1], row[4], row[5]
            if kind == 2:
                symbols += range(offset, offset + size, 24)
            elif kind == 4:
                relocs += range(offset, offset + size, 24)
            elif kind == 3 and size > 1:
                texts.append((offset, size))
        return cls(name, data, headers, count, tuple(rows), tuple(symbols), tuple(relocs), tuple(texts))


def number(rng: Random, letter: str, before: int) -> int:
    """A number for a field of that width: a telling one, a neighbour of what is there, or any."""
    size = _SIZES[letter]
    match rng.randrange(5):
        case 0 | 1:
            value = rng.choice(NUMBERS)
        case 2:
            value = before + rng.choice((-8, -4, -1, 1, 4, 8, 16, 24))
        case 3:
            value = rng.randrange(0, 64)
        case _:
            value = rng.getrandbits(8 * size)
    return value & ((1 << 8 * size) - 1)


def _put(out: bytearray, at: int, letter: str, rng: Random) -> None:
    form = "<" + letter
    if at + _SIZES[letter] <= len(out):
        (before,) = struct.unpack_from(form, out, at)
        struct.pack_into(form, out, at, number(rng, letter, before))


def _row(out: bytearray, rng: Random, rows: Sequence[int], fields: Sequence[tuple[int, str]]) -> None:
    if rows:
        at, letter = rng.choice(fields)
        _put(out, rng.choice(rows) + at, letter, rng)


def section_field(out: bytearray, seed: Seed, rng: Random) -> None:
    """Another value in a field of a section header; now and then one that another header has there."""
    rows = [seed.headers + 64 * i for i in range(seed.count)]
    if rng.random() < 0.4:
        at, letter = rng.choice(_SECTION_FIELDS)
        here, there = rng.choice(rows) + at, rng.choice(rows) + at
        size = _SIZES[letter]
        if max(here, there) + size <= len(out):
            out[here : here + size] = out[there : there + size]
        return
    _row(out, rng, rows, _SECTION_FIELDS)


def symbol_field(out: bytearray, seed: Seed, rng: Random) -> None:
    """Another value in a symbol, or the same as in another symbol."""
    if seed.symbols and rng.random() < 0.4:
        at, letter = rng.choice(_SYMBOL_FIELDS)
        here, there = rng.choice(seed.symbols) + at, rng.choice(seed.symbols) + at
        size = _SIZES[letter]
        if max(here, there) + size <= len(out):
            out[here : here + size] = out[there : there + size]
        return
    _row(out, rng, seed.symbols, _SYMBOL_FIELDS)


def reloc_field(out: bytearray, seed: Seed, rng: Random) -> None:
    """Another offset, type, symbol or addend in a relocation."""
    _row(out, rng, seed.relocs, _RELA_FIELDS)


def header_field(out: bytearray, seed: Seed, rng: Random) -> None:  # noqa: ARG001 - one signature for all
    """Another value in the file's header."""
    at, letter = rng.choice(_HEADER_FIELDS)
    _put(out, at, letter, rng)


def flip_bits(out: bytearray, seed: Seed, rng: Random) -> None:  # noqa: ARG001
    """One to eight bits, anywhere."""
    for _ in range(rng.randrange(1, 9)):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)


def set_bytes(out: bytearray, seed: Seed, rng: Random) -> None:  # noqa: ARG001
    """A few neighbouring bytes become zeros, ones or anything."""
    if out:
        at = rng.randrange(len(out))
        size = min(rng.choice((1, 2, 4, 8, 16, 64)), len(out) - at)
        fill = rng.choice((b"\0" * size, b"\xff" * size, rng.randbytes(size)))
        out[at : at + size] = fill


def swap_bytes(out: bytearray, seed: Seed, rng: Random) -> None:  # noqa: ARG001
    """Two stretches change places."""
    size = rng.choice((1, 2, 4, 8, 24, 64))
    if len(out) > 2 * size:
        a, b = sorted((rng.randrange(len(out) - 2 * size), rng.randrange(len(out) - 2 * size)))
        b += size
        out[a : a + size], out[b : b + size] = out[b : b + size], out[a : a + size]


def truncate(out: bytearray, seed: Seed, rng: Random) -> None:  # noqa: ARG001
    """The file ends early."""
    del out[rng.randrange(len(out) + 1) :]


def shift(out: bytearray, seed: Seed, rng: Random) -> None:  # noqa: ARG001
    """Bytes are lost or come in: everything behind them stands elsewhere."""
    if not out:
        return
    at, size = rng.randrange(len(out)), rng.choice((1, 2, 4, 8, 24, 64))
    if rng.random() < 0.5:
        del out[at : at + size]
    else:
        out[at:at] = rng.randbytes(size)


def word(out: bytearray, seed: Seed, rng: Random) -> None:
    """A name in a string table becomes one that means something."""
    if seed.texts:
        start, size = rng.choice(seed.texts)
        at = start + rng.randrange(size)
        at = max(seed.data.rfind(b"\0", start, at) + 1, start)
        text = rng.choice(WORDS) + b"\0"
        if start <= at and at + len(text) <= start + size <= len(out):
            out[at : at + len(text)] = text


def contents(out: bytearray, seed: Seed, rng: Random) -> None:
    """Something in the contents of a section, so that the file stays sound as a file."""
    row = seed.sections[rng.randrange(seed.count)]
    offset, size = row[4], row[5]
    if size and row[1] != 8 and offset + size <= len(out):
        for _ in range(rng.randrange(1, 5)):
            out[offset + rng.randrange(size)] = rng.randrange(256)


OBJECT_MUTATIONS: tuple[tuple[Callable[[bytearray, Seed, Random], None], int], ...] = (
    (section_field, 8),
    (symbol_field, 16),
    (reloc_field, 18),
    (header_field, 1),
    (flip_bits, 3),
    (set_bytes, 3),
    (swap_bytes, 3),
    (truncate, 1),
    (shift, 1),
    (word, 9),
    (contents, 9),
)
_OBJECT_PLAN = tuple(mutation for mutation, weight in OBJECT_MUTATIONS for _ in range(weight))


def splice(seed: Seed, other: Seed, rng: Random) -> bytearray:
    """A file of two: some sections of ``other`` in the places of ``seed``'s, or one's begin and one's end."""
    out = bytearray(seed.data)
    if rng.random() < 0.1:
        at = rng.randrange(len(out))
        return out[:at] + other.data[at:]
    for _ in range(rng.randrange(1, 4)):
        here, there = rng.choice(seed.sections), rng.choice(other.sections)
        if here[1] == 8 or there[1] == 8:
            continue
        size = min(here[5], there[5])
        out[here[4] : here[4] + size] = other.data[there[4] : there[4] + size]
    return out


def mutate_object(seed: Seed, other: Seed, rng: Random) -> bytes:
    """One to four mutations of a file, one in eight times of a splice of two."""
    out = splice(seed, other, rng) if rng.random() < 0.125 else bytearray(seed.data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        rng.choice(_OBJECT_PLAN)(out, seed, rng)
    return bytes(out)


# -- texts ---------------------------------------------------------------------------------------------

#: What patches are made of.
PATCH_WORDS = (
    *(
        b"@@ -1,3 +1,4 @@\n",
        b"@@ -0,0 +1 @@\n",
        b"@@ -1 +0,0 @@\n",
        b"@@ -1,0 +2,2 @@ int f(void)\n",
        b"@@ -5,7",
    ),
    *(
        b"--- a/kernel/one.c\n",
        b"+++ b/kernel/one.c\n",
        b"--- /dev/null\n",
        b"+++ /dev/null\n",
        b"+++ b/fs/new.c\n",
    ),
    *(b"--- a/kernel/one.c\t1970-01-01 00:00:00\n", b"+++ kernel/one.c 1970-01-01 00:00:00.0 +0000\n"),
    *(
        b"diff --git a/kernel/one.c b/kernel/one.c\n",
        b"diff --git a/x y b/x y\n",
        b'diff --git "a/\\303" "b/\\303"\n',
    ),
    *(b"new file mode 100644\n", b"deleted file mode 100644\n", b"old mode 100644\n", b"new mode 100755\n"),
    *(
        b"rename from kernel/one.c\n",
        b"rename to kernel/two.c\n",
        b"copy from kernel/one.c\n",
        b"copy to fs/c.c\n",
    ),
    *(b"index 123..456 100644\n", b"index 1..2 120000\n", b"similarity index 90%\n", b"GIT binary patch\n"),
    *(b"Binary files a/x and b/x differ\n", b"\\ No newline at end of file\n", b"diff --cc kernel/one.c\n"),
    *(
        b"***************\n",
        b"-- \n",
        b"--\n",
        b"\n",
        b"\r\n",
        b" \n",
        b"+\n",
        b"-\n",
        b"+x\n",
        b"-x\n",
        b" x\n",
        b"\0",
    ),
    *(b"Subject: [PATCH] =?utf-8?q?=C3=A4?=\n", b"Subject: =?x?b?!!!?=\n", b"From: =?idna?q?=ff?= <a@b>\n"),
    *(
        b"Content-Transfer-Encoding: base64\n\n",
        b"Content-Transfer-Encoding: quoted-printable\n\n",
        b"=3D=\n",
    ),
    *(
        b"[ Upstream commit 0123456789ab ]\n",
        b"From 0000000000000000000000000000000000000000 Mon\n",
        b"../../x\n",
    ),
    *(
        b"9" * 20,
        b"-1",
        b"0",
        b"1",
        b"4294967296",
        b"99999999999999999999",
        b"/",
        b"//",
        b"\t",
        b" " * 40,
        b"\xff",
    ),
    *(
        b"#line 5\n",
        b"#if 0\n",
        b"#else\n",
        b"#endif\n",
        b"/*\n",
        b"*/\n",
        b'"\n',
        b"(\n",
        b")\n",
        b"}\n",
        b"\\\n",
        b"//\\\n",
    ),
)


_HUNK = re.compile(rb"@@ -(\d{1,9})(?:,\d+)? \+(\d{1,9})(?:,\d+)? @@")


def recount(data: bytes) -> bytes:
    """The patch with the counts in its hunk headers made right, so that more than the counts is looked at."""
    lines = data.splitlines(keepends=True)
    for at, line in enumerate(lines):
        header = _HUNK.match(line)
        if header is None:
            continue
        old = new = 0
        for text in lines[at + 1 :]:
            if text[:1] not in b" +-\\\n" or text[:4] in (b"--- ", b"+++ ", b"-- \n"):
                break
            old += text[:1] in b" -\n"
            new += text[:1] in b" +\n"
        places = [int(header[1]) if old else 0, int(header[2]) if new else 0]
        rest = line[header.end() :]
        lines[at] = b"@@ -%d,%d +%d,%d @@%s" % (places[0], old, places[1], new, rest)
    return b"".join(lines)


def mutate_text(
    data: bytes, rng: Random, words: Sequence[bytes] = PATCH_WORDS, *, more: bytes = b""
) -> bytes:
    """One to four mutations of a text: of its lines, of its bytes, of its numbers."""
    out = data
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        out = _mutate_text(out, rng, words, more)
    return out


def _mutate_text(data: bytes, rng: Random, words: Sequence[bytes], more: bytes) -> bytes:
    choice = rng.randrange(12)
    if choice < 7:
        lines = data.splitlines(keepends=True) or [b""]
        at = rng.randrange(len(lines))
        match choice:
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[rng.randrange(len(lines))])
            case 2:
                lines.insert(at, rng.choice(words))
            case 3:
                other = rng.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            case 4:
                end = min(len(lines), at + rng.randrange(1, 8))
                lines[at:end] = []
            case 5:
                lines[at] = rng.choice((b" ", b"+", b"-", b"\\", b"@", b"")) + lines[at][1:]
            case _:
                lines[at] = _other_number(lines[at], rng)
        return b"".join(lines)
    out = bytearray(data)
    at = rng.randrange(len(out) + 1)
    match choice:
        case 7:
            if out:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        case 8:
            out[at:at] = rng.choice(words)
        case 9:
            del out[at : at + rng.randrange(1, 20)]
        case 10:
            del out[at:]
        case _:
            if more:
                cut = rng.randrange(len(more) + 1)
                out[at:] = more[cut:]
    return bytes(out)


def _other_number(line: bytes, rng: Random) -> bytes:
    """Another number in place of one of the line's."""
    spots = [i for i, char in enumerate(line) if 48 <= char <= 57]
    if not spots:
        return line
    start = end = rng.choice(spots)
    while start and 48 <= line[start - 1] <= 57:
        start -= 1
    while end < len(line) and 48 <= line[end] <= 57:
        end += 1
    value = int(line[start:end][:18])
    fresh = rng.choice((value + 1, max(value - 1, 0), 0, 1, 2, value * 10, 2**31, 2**63, 10**25))
    return line[:start] + str(fresh).encode() + line[end:]
