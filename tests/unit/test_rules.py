"""Rules whose cases no real module at hand has: what hand-made ones may do."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from kmend.core.target import VMLINUX
from kmend.elf.model import SHN_UNDEF
from kmend.verify.rules import _Checker


@dataclass(frozen=True)
class Export:
    name: str
    crc: int
    owner: str
    namespace: str = ""


EXPORTS = {
    row.name: row
    for row in (
        Export("module_layout", 1, VMLINUX),
        Export("printk", 2, VMLINUX),
        Export("crc32c", 3, "libcrc32c"),
    )
}


def objections(depends: str, **versions: int) -> list[tuple[str, str]]:
    """Of a module that needs the symbols of ``versions``, with these CRCs."""
    rows = {"module_layout": 1, **versions}
    table = b"".join(struct.pack("<Q56s", crc, name.encode()) for name, crc in rows.items())
    symbols = [SimpleNamespace(name=name, section=SHN_UNDEF) for name in versions]
    elf: Any = SimpleNamespace(section=lambda _name: SimpleNamespace(data=table), symbols=symbols)
    layout = SimpleNamespace(version_size=64, version_name=8)
    facts: Any = SimpleNamespace(layout=layout, exports=EXPORTS)
    description: Any = SimpleNamespace(info=(("depends", depends),))
    return [(row.rule, row.what) for row in _Checker(elf, facts, description)._versions()]


@pytest.mark.parametrize(
    ("depends", "versions", "refused"),
    [
        ("", {"printk": 2}, []),
        ("", {"printk": 9}, [("symbol-version", "printk")]),
        ("", {"crc32c": 3}, [("not-exported", "crc32c")]),
        ("libcrc32c", {"crc32c": 3}, []),
        ("ext4,libcrc32c", {"crc32c": 3, "printk": 2}, []),
        ("libcrc32c", {"crc32c": 4}, [("symbol-version", "crc32c")]),
        ("ext4", {"crc32c": 3}, [("not-exported", "crc32c")]),
        ("libcrc32c", {"absent": 3}, [("not-exported", "absent")]),
    ],
)
def test_a_module_may_use_what_the_modules_export_that_it_depends_on(
    depends: str, versions: dict[str, int], refused: list[tuple[str, str]]
) -> None:
    """The kernel resolves ordinary symbols among all that is loaded; `depends` is loaded before."""
    assert objections(depends, **versions) == refused
