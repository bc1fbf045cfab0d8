"""Files that are complete or absent, and scratch folders that outlive nobody."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kmend.core import files
from kmend.core.errors import Failed
from kmend.core.files import read_regular, remove, scratch_folder, sweep, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, nameless: bool) -> None:
    """With and without O_TMPFILE."""
    if not nameless:
        monkeypatch.setattr(files, "_nameless", lambda folder: None)
    path = tmp_path / "below" / "file"
    write_atomically(path, b"one")
    before = path.open("rb")
    write_atomically(path, b"two", mode=0o600)
    with before:
        assert before.read() == b"one"
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("nameless", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, nameless: bool
) -> None:
    if not nameless:
        monkeypatch.setattr(files, "_nameless", lambda folder: None)
    path = tmp_path / "file"
    write_atomically(path, b"one")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Failed) as caught:
        write_atomically(path, b"two")
    assert (caught.value.rule, caught.value.why) == ("unwritable", "No space left on device")
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["file/x", "folder"])
def test_a_place_that_cannot_be_a_file(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "x").mkdir(parents=True)
    with pytest.raises(Failed):
        write_atomically(tmp_path / place, b"data")
    assert names(tmp_path) == ["file", "folder"]


WRITER = """
import os, sys, time
from pathlib import Path
from kmend.core import files
os.fsync = lambda fd: (print("writing", flush=True), time.sleep(60))
files.write_atomically(Path(sys.argv[1]), b"data" * 1000)
"""


def test_a_writer_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "file"], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        child.kill()
    assert names(tmp_path) == []


HOLDER = """
import sys, time
from pathlib import Path
from kmend.core.files import scratch_folder
with scratch_folder(Path(sys.argv[1]), "build") as folder:
    (folder / "left").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_goes_with_the_next_one_and_a_living_run_keeps_its_own(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    dead, alive = [Path((child.stdout or sys.stdin).readline().strip()) for child in children]
    children[0].kill()
    children[0].communicate()
    assert (dead / "left").exists()
    with scratch_folder(tmp_path, "other"):
        assert dead.exists()
    with scratch_folder(tmp_path, "build") as mine:
        assert not dead.exists()
        assert (alive / "left").exists()
        assert names(tmp_path) == sorted([alive.name, f"{alive.name}.lock", mine.name, f"{mine.name}.lock"])
    children[1].send_signal(signal.SIGTERM)
    children[1].communicate()
    sweep(tmp_path, "build")
    assert names(tmp_path) == []


def test_a_scratch_folder_goes_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path / "new", "x") as folder:
        (folder / "deep" / "er").mkdir(parents=True)
        raise ZeroDivisionError
    assert names(tmp_path / "new") == []


def test_a_place_that_is_no_folder_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed) as caught, scratch_folder(tmp_path / "file", "x"):
        pass
    assert caught.value.rule == "unwritable"
    assert caught.value.next_step


def test_removing_beside_a_writer_ends(tmp_path: Path) -> None:
    """A child that outlived its parent goes on making files; the folder goes all the same, and at once."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    script = 'i=0; while : > "$1/$i"; do i=$((i+1)); done'
    with subprocess.Popen(["sh", "-c", script, "sh", folder], stderr=subprocess.DEVNULL) as writer:
        time.sleep(0.05)
        assert remove(folder)
        assert writer.wait(timeout=10) != 0
    assert names(tmp_path) == []


def test_a_removal_that_was_killed_is_finished(tmp_path: Path) -> None:
    (tmp_path / "build-x.gone" / "deep").mkdir(parents=True)
    (tmp_path / "build-x.lock").touch()
    sweep(tmp_path, "build")
    assert names(tmp_path) == []
    assert remove(tmp_path / "never")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "file", 5) == read_regular(tmp_path / "link", 5) == b"12345"
    for name, number in (("fifo", errno.EINVAL), (".", errno.EISDIR), ("none", errno.ENOENT)):
        with pytest.raises(OSError) as caught:
            read_regular(tmp_path / name, 5)
        assert caught.value.errno == number
    with pytest.raises(OSError) as caught:
        read_regular("/dev/zero", 5)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError) as caught:
        read_regular(tmp_path / "file", 4)
    assert caught.value.errno == errno.EFBIG
