"""The initramfs writer; the oracle is the system's own cpio."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kmend.core.run import run
from kmend.lab import cpio

ENTRIES = [
    cpio.folder("a"),
    cpio.file("a/odd", b"12345", 0o755),
    cpio.file("a/empty", b""),
    cpio.link("l", "a/odd"),
    cpio.character("null", 1, 3, 0o666),
]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="the program cpio is not there")
def test_the_system_unpacks_it(tmp_path: Path) -> None:
    run(["cpio", "-idu", "--no-preserve-owner", "a", "a/*", "l"], stdin=cpio.archive(ENTRIES), cwd=tmp_path)
    assert (tmp_path / "a/odd").read_bytes() == b"12345"
    assert (tmp_path / "a/odd").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a/empty").read_bytes() == b""
    assert str((tmp_path / "l").readlink()) == "a/odd"


@pytest.mark.skipif(shutil.which("cpio") is None, reason="the program cpio is not there")
def test_the_system_lists_it() -> None:
    listing = run(["cpio", "-tv"], stdin=cpio.archive(ENTRIES)).text
    assert "crw-rw-rw-" in listing
    assert "1,   3" in listing
    assert "l -> a/odd" in listing


def test_equal_entries_are_equal_bytes_aligned_to_four() -> None:
    data = cpio.archive(ENTRIES)
    assert data == cpio.archive(list(ENTRIES))
    assert len(data) % 4 == 0
    assert data.startswith(b"070701")
