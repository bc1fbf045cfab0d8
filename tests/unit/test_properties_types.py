"""Types of damaged objects: what a type leads to is there, ends, and is of the kind that it must be."""

from __future__ import annotations

import struct
import time

import pytest

from kmend.core.errors import Failed
from kmend.verify.types import Types, changed_layouts

INT, PTR, ARRAY, STRUCT, TYPEDEF, CONST, FUNC, PROTO = 1, 2, 3, 4, 8, 10, 12, 13
TEXT = b"\0name\0field\0"


def row(kind: int, size: int, *tail: int, name: int = 0, vlen: int = 0) -> bytes:
    return struct.pack(f"<{3 + len(tail)}I", name, kind << 24 | vlen, size, *tail)


def types(*rows: bytes) -> Types:
    data = b"".join(rows)
    head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(data), len(data), len(TEXT))
    return Types(head + data + TEXT, "x.o")


DAMAGED = {
    "a typedef of itself": [row(TYPEDEF, 1, name=1)],
    "two that are each other": [row(CONST, 2), row(TYPEDEF, 1, name=1)],
    "an array of itself": [row(ARRAY, 0, 1, 1, 4)],
    "a structure inside of itself": [row(STRUCT, 8, 6, 1, 0, vlen=1)],
    "a pointer to nowhere": [row(PTR, 9)],
    "a member of no type": [row(STRUCT, 8, 6, 77, 0, name=1, vlen=1)],
    "a structure cut short": [row(STRUCT, 8, 6, 1, name=1, vlen=1)],
    "a function of no prototype": [row(INT, 4, 0), row(FUNC, 1, name=1)],
    "a name outside": [row(INT, 4, 0, name=1000)],
    "an unknown kind": [row(30, 4, name=1)],
    "arrays of arrays without end": [row(ARRAY, 0, i, i, 4) for i in range(2, 2000)] + [row(INT, 4, 0)],
}


@pytest.mark.parametrize("rows", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_types_are_refused(rows: list[bytes]) -> None:
    with pytest.raises(Failed) as caught:
        types(*rows)
    assert caught.value.rule == "bad-btf"


def test_a_structure_used_again_and_again_takes_no_time() -> None:
    # each holds the next one twice, by its typedef, so that its text would double each time
    rows = [row(INT, 4, 0)]
    for index in range(1, 39):
        rows.append(row(STRUCT, 8, 6, index, 0, 6, index, 32, vlen=2))
    top = len(rows)
    old = types(*rows, row(STRUCT, 8, 6, top, 0, name=1, vlen=1))
    rows[1] = row(STRUCT, 8, 6, 1, 0, 6, 1, 33, vlen=2)
    new = types(*rows, row(STRUCT, 8, 6, top, 0, name=1, vlen=1))
    start = time.process_time()
    assert changed_layouts(old, old) == ()
    (refusal,) = changed_layouts(old, new)
    assert refusal.rule == "layout-changed"
    assert time.process_time() - start < 1.0
