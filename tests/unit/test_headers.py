"""The include graph: never a unit too few."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmend.kernel.headers import FORCED, HeaderMap

FILES = {
    "include/linux/list.h": "",
    "include/linux/fs.h": "linux/list.h",
    "fs/ext4/ext4.h": "linux/fs.h",
    "fs/ext4/inode.c": '"ext4.h',
    "fs/ext4/sub/deep.c": '"../ext4.h',
    "drivers/a/core.h": "",
    "drivers/b/core.h": "",
    "drivers/a/main.c": '"core.h',
    "drivers/c/far.c": '"core.h',
    "kernel/x.c": "asm/page.h",
    "arch/x86/include/asm/page.h": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> HeaderMap:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return HeaderMap(tmp_path, "".join(f"{file}\t{name}\n" for file, name in FILES.items() if name))


@pytest.mark.parametrize(
    ("header", "reached"),
    [
        (
            "include/linux/list.h",
            {"include/linux/fs.h", "fs/ext4/ext4.h", "fs/ext4/inode.c", "fs/ext4/sub/deep.c"},
        ),
        ("fs/ext4/ext4.h", {"fs/ext4/inode.c", "fs/ext4/sub/deep.c"}),
        # beside the including file: certain; by some -I: both folders may be meant
        ("drivers/a/core.h", {"drivers/a/main.c", "drivers/c/far.c"}),
        ("drivers/b/core.h", {"drivers/c/far.c"}),
        ("arch/x86/include/asm/page.h", {"kernel/x.c"}),
        ("include/linux/unknown.h", set()),
    ],
)
def test_includers(tree: HeaderMap, header: str, reached: set[str]) -> None:
    assert tree.includers([header]) == reached | {header}


def test_what_every_unit_begins_with_reaches_everything(tree: HeaderMap) -> None:
    assert tree.includers([FORCED[0]]) >= {file for file, name in FILES.items() if name}
