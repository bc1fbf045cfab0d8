"""Snapshots on disk: complete or absent, verified, shared by processes that race."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from kmend.core.errors import Failed
from kmend.lab import snapshot
from kmend.lab.machine import Accel, MachineSettings
from kmend.lab.snapshot import KEPT, Snapshots, key_of

ROOM = 4 << 20


def fill(memory: int, state: int) -> None:
    os.ftruncate(memory, ROOM)
    os.pwrite(memory, b"guest", 3 << 20)
    os.write(state, b"machine")


def contents(store: Snapshots, key: str = "k") -> tuple[bytes, bytes] | None:
    found = store.find(key)
    if found is None:
        return None
    try:
        return os.pread(found.memory_fd, 5, 3 << 20), os.pread(found.state_fd, 100, 0)
    finally:
        found.close()


def made(folder: Path, key: str = "k") -> Snapshots:
    store = Snapshots(folder)
    store.make(key, ROOM, fill).close()
    return store


def test_made_once_and_found(tmp_path: Path) -> None:
    store = made(tmp_path)
    assert contents(store) == (b"guest", b"machine")

    def never(memory: int, state: int) -> None:
        raise AssertionError("built twice")

    store.make("k", ROOM, never).close()
    assert contents(store, "other") is None


@pytest.mark.parametrize("file", ["mem", "state", "manifest.json"])
def test_damage_is_seen_and_removed(tmp_path: Path, file: str) -> None:
    store = made(tmp_path)
    assert contents(store) is not None  # the check is now on record
    path = tmp_path / "snapshots/k" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if file == "manifest.json":
        path.write_bytes(data[:-20])
    assert contents(store) is None
    assert not (tmp_path / "snapshots/k").exists()
    store.make("k", ROOM, fill).close()
    assert contents(store) == (b"guest", b"machine")


@pytest.mark.parametrize("file", ["mem", "state", "manifest.json"])
def test_a_missing_or_short_file_is_no_snapshot(tmp_path: Path, file: str) -> None:
    store = made(tmp_path)
    os.truncate(tmp_path / "snapshots/k" / file, 1)
    assert contents(store) is None
    store.make("k", ROOM, fill).close()
    (tmp_path / "snapshots/k" / file).unlink()
    assert contents(store) is None
    store.make("k", ROOM, fill).close()
    assert contents(store) == (b"guest", b"machine")


def test_it_is_verified_again_after_a_boot_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path)
    checked: list[tuple[int, ...]] = []
    real = snapshot._digest

    def digest(*fds: int) -> str:
        checked.append(fds)
        return real(*fds)

    monkeypatch.setattr(snapshot, "_digest", digest)
    assert contents(store) is not None
    before = len(checked)
    assert contents(store) is not None
    assert len(checked) == before  # on record
    monkeypatch.setattr(snapshot, "boot_id", lambda: "another boot")
    assert contents(store) is not None
    assert len(checked) == before + 1


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Snapshots(tmp_path)

    def build(memory: int, state: int) -> None:
        os.write(state, b"half")
        raise Failed("the guest was lost")

    with pytest.raises(Failed, match="lost"):
        store.make("k", ROOM, build)
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_what_a_killed_build_left_is_swept(tmp_path: Path) -> None:
    for name in ("k.new", "other.new"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
        (tmp_path / "snapshots" / name / "mem").write_bytes(b"half")
    made(tmp_path)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["k"]


def test_two_that_race_build_once(tmp_path: Path) -> None:
    built = []
    together = threading.Barrier(2)

    def build(memory: int, state: int) -> None:
        built.append(1)
        fill(memory, state)

    def make() -> None:
        together.wait()
        Snapshots(tmp_path).make("k", ROOM, build).close()

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


def test_only_the_snapshot_that_failed_is_removed(tmp_path: Path) -> None:
    store = made(tmp_path)
    stale = store.find("k")
    assert stale is not None
    (tmp_path / "snapshots/k").rename(tmp_path / "old")
    made(tmp_path)
    store.remove(stale)
    assert contents(store) == (b"guest", b"machine")
    stale.close()
    fresh = store.find("k")
    assert fresh is not None
    store.remove(fresh)
    fresh.close()
    assert contents(store) is None


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    for number in range(KEPT + 2):
        made(tmp_path, f"k{number}")
        os.utime(tmp_path / f"snapshots/k{number}", (number, number))
    assert len(list((tmp_path / "snapshots").iterdir())) == KEPT
    assert not (tmp_path / "snapshots/k0").exists()


def test_no_room(tmp_path: Path) -> None:
    with pytest.raises(Failed) as error:
        Snapshots(tmp_path).make("k", 1 << 60, fill)
    assert error.value.rule == "disk-full"
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "lab").write_text("")
    with pytest.raises(Failed) as error:
        Snapshots(tmp_path / "lab").make("k", ROOM, fill)
    assert error.value.rule == "unwritable"


def test_the_key_depends_on_everything_that_makes_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, program = tmp_path / "vmlinuz", tmp_path / "qemu"
    kernel.write_bytes(b"kernel")
    program.write_bytes(b"qemu")
    monkeypatch.setattr(snapshot, "qemu", lambda: program)
    base = MachineSettings()
    keys = [
        key_of(kernel, b"initrd", base),
        key_of(kernel, b"initrd2", base),
        key_of(kernel, b"initrd", base, direct=True),
        key_of(kernel, b"initrd", MachineSettings(Accel.KVM)),
        key_of(kernel, b"initrd", MachineSettings(cpus=2)),
        key_of(kernel, b"initrd", MachineSettings(memory=256)),
        key_of(kernel, b"initrd", MachineSettings(parameters=("quiet",))),
    ]
    kernel.write_bytes(b"kernel2")
    keys.append(key_of(kernel, b"initrd", base))
    program.write_bytes(b"qemu2")
    keys.append(key_of(kernel, b"initrd", base))
    assert len(set(keys)) == len(keys)
    assert key_of(kernel, b"initrd", base) == keys[-1]
