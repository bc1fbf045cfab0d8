"""Moving an unpacked kernel: an image of a few words, every relocation checked."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from kmend.core.errors import Failed
from kmend.lab import direct

LOW = 0x1000000
MAP = 0xFFFFFFFF80000000
STEP = 0x200000


def image(*, table: list[int] | None = None, note: bool = True) -> bytes:
    """One segment at 16 MB: a 32-bit word, one to decrease, a 64-bit word, and the PVH note."""
    words = struct.pack("<IIQ", 0x81000010, 0x00001000, MAP + LOW + 0x20)
    notes = struct.pack("<III", 4, 8, 18 if note else 1) + b"Xen\0" + struct.pack("<Q", LOW + 0x100)
    body = words + notes
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01" + bytes(9), 2, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0
    )
    place = 64 + 2 * 56
    head += struct.pack("<IIQQQQQQ", 1, 7, place, MAP + LOW, LOW, len(body), len(body) + 4096, STEP)
    head += struct.pack("<IIQQQQQQ", 4, 4, place + 16, MAP + LOW + 16, LOW + 16, len(notes), len(notes), 4)
    at = 0x80000000 + LOW
    rows = [0, at + 8, at + 16 + 16, 0, at + 4, 0, at] if table is None else table
    return head + body + struct.pack(f"<{len(rows)}I", *rows)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "vmlinux"
    path.write_bytes(data)
    return path


def test_every_kind_of_place_is_moved(tmp_path: Path) -> None:
    path = write(tmp_path, image())
    assert direct.possible(path)
    data = direct.moved(path, 512 << 20, distance=STEP)
    kind, _, offset, virtual, physical, size, memory, _ = struct.unpack_from("<IIQQQQQQ", data, 64)
    assert (kind, virtual, physical) == (1, MAP + LOW + STEP, LOW + STEP)
    assert size == memory == len(data) - offset
    up, down, wide = struct.unpack_from("<IIQ", data, offset)
    assert up == 0x81000010 + STEP
    assert down == 0x00001000 - STEP & 0xFFFFFFFF
    assert wide == MAP + LOW + 0x20 + STEP
    # the note was in the table; the new file's own note names the moved entry
    assert data[176:4096].rstrip(b"\0").endswith(struct.pack("<Q", LOW + 0x100 + STEP).rstrip(b"\0"))


def test_a_note_that_the_table_leaves_out_is_moved_too(tmp_path: Path) -> None:
    at = 0x80000000 + LOW
    data = direct.moved(write(tmp_path, image(table=[0, 0, 0, at])), 512 << 20, distance=STEP)
    assert struct.pack("<Q", LOW + 0x100 + STEP) in data[:4096]


def test_the_distance_is_random_aligned_never_zero_and_leaves_room(tmp_path: Path) -> None:
    path = write(tmp_path, image())
    found = set()
    for _ in range(40):
        physical = struct.unpack_from("<IIQQQQ", direct.moved(path, 256 << 20), 64)[4]
        distance = physical - LOW
        assert distance > 0
        assert distance % STEP == 0
        assert physical + 8192 <= 128 << 20
        found.add(distance)
    assert len(found) > 5
    with pytest.raises(Failed, match="cannot be started"):
        direct.moved(path, 32 << 20)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MZ no ELF at all" * 10,
        image(note=False),
        image(table=[]),
        image()[:100],
    ],
)
def test_what_cannot_be_started_so(tmp_path: Path, data: bytes) -> None:
    assert not direct.possible(write(tmp_path, data))


@pytest.mark.parametrize("table", [[1, 2, 3], [0, 0, 0, 0x80000000 + LOW + 0x100000], [0, 0, 0, 5]])
def test_a_damaged_table_is_an_error_of_ours(tmp_path: Path, table: list[int]) -> None:
    with pytest.raises(Failed, match="cannot be started"):
        direct.moved(write(tmp_path, image(table=table)), 512 << 20)


def test_absent_files(tmp_path: Path) -> None:
    assert not direct.possible(tmp_path / "absent")
    with pytest.raises(Failed):
        direct.moved(tmp_path / "absent", 512 << 20)


def test_the_stub_is_of_the_same_kind(tmp_path: Path) -> None:
    assert direct.stub().startswith(b"\x7fELF")
    assert len(direct.stub()) < 8192
