"""The code that runs against the image's: of a kernel that is a few bytes long."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from kmend.kernel.vmlinux import Image
from kmend.running import RunningCode
from kmend.runtime.place import Place
from kmend.runtime.preflight import Wanted

#: Where the image is linked, and where KASLR has put it.
LINKED, RUNS = 0xFFFFFFFF81000000, 0xFFFFFFFF9A000000
#: Of one function, which begins at the image's beginning.
CODE = bytes(range(0x40, 0x80))


class Tiny:
    """As much of an image as has one section and nothing that the kernel rewrites."""

    sections = ()
    text = SimpleNamespace(name=".text", address=LINKED, size=len(CODE), executable=True)

    def section(self, name: str) -> SimpleNamespace | None:
        return self.text if name == ".text" else None

    def section_at(self, _address: int) -> SimpleNamespace:
        return self.text

    def contents(self, _name: str) -> bytes:
        return b""

    def trailer(self) -> bytes:
        return b""

    def read(self, address: int, size: int) -> bytes:
        return CODE[address - LINKED :][:size]


def differences(tmp_path: Path, memory: bytes, kprobes: str) -> list[int]:
    """Offsets at which the function differs, as it runs with these probes."""
    place = Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")
    for path, contents in (
        (place.sys / "kernel/debug/kprobes/list", kprobes.encode()),
        (
            place.proc / "kallsyms",
            b"%x T _text\n%x T __x64_sys_getppid\n%x t __do_sys_getppid\n%x t after\n"
            % (RUNS, RUNS, RUNS, RUNS + len(CODE)),
        ),
        (
            place.proc / "kcore",
            struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
            + struct.pack("<IIQQQQQQ", 1, 7, 120, RUNS, 0, len(memory), len(memory), 4096)
            + memory,
        ),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    code = RunningCode(place, cast(Image, Tiny()), lambda _name: None)
    try:
        found = code.compare([Wanted("vmlinux", "__x64_sys_getppid", 0)])
    finally:
        code.close()
    assert (found.functions, found.skipped) == (1, {})
    return [row.offset for row in found.differences]


@pytest.mark.parametrize(
    ("changed", "line", "expected"),
    [
        ({}, "", []),
        ({0x10: 0xCC}, "", [0x10]),
        # the kernel prints whatever name it finds first: the function's other one
        ({0x10: 0xCC}, f"{RUNS + 0x10:x}  k  __do_sys_getppid+0x10    ", []),
        ({0x10: 0xCC, 0x11: 0}, f"{RUNS + 0x10:x}  k  __do_sys_getppid+0x10    ", [0x11]),
        (
            dict.fromkeys(range(0x10, 0x15), 0xE9),
            f"{RUNS + 0x10:x}  k  __do_sys_getppid+0x10    [OPTIMIZED]",
            [],
        ),
        ({0x10: 0xCC}, f"{RUNS + 0x10:x}  k  __do_sys_getppid+0x10    [DISABLED]", [0x10]),
        # of that name, but elsewhere
        ({0x10: 0xCC}, f"{RUNS + 0x1010:x}  k  __x64_sys_getppid+0x10    ", [0x10]),
    ],
)
def test_a_probe_is_told_from_other_changes(
    tmp_path: Path, changed: dict[int, int], line: str, expected: list[int]
) -> None:
    memory = bytearray(CODE)
    for at, byte in changed.items():
        memory[at] = byte
    assert differences(tmp_path, bytes(memory), f"{line}\n") == expected
