"""The store of installed patches: whatever a power cut leaves is the old one or the new one, and whole."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from kmend.core.errors import Failed, Refused, UsageError
from kmend.core.files import write_atomically
from kmend.core.target import Release
from kmend.runtime import persistence
from kmend.runtime.persistence import Guard, Installed, Store
from kmend.runtime.place import Place

RELEASE = Release("6.1.0-55-amd64")


def module(name: str, text: str = "", *, replaces: bool | None = False) -> tuple[Installed, bytes, bytes]:
    """What is added to a store: a row, a module's bytes, its report's."""
    data = f"{name} {text}".encode() * 500
    digest = hashlib.sha256(data).hexdigest()
    stem = f"{name}.{digest[:16]}"
    row = Installed(name, f"{stem}.ko", digest, f"{stem}.json", "b1d", replaces, 1.0, "root")
    return row, data, json.dumps({"sha256": digest}).encode()


def names(store: Store) -> list[str]:
    return [row.name for row in store.patches]


def opened(state: Path) -> Store:
    """The store as a boot finds it; everything that it names is there and whole."""
    store = persistence.read(state, RELEASE)
    for row in store.patches:
        persistence.contents(store, row)
        if row.report:
            assert json.loads((store.folder / row.report).read_bytes())["sha256"] == row.sha256
    return store


def files(store: Store) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


@pytest.fixture
def empty(tmp_path: Path) -> Store:
    return persistence.read(tmp_path / "state", RELEASE)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cmdline").write_text("root=/dev/sda1 quiet\n")
    return Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")


# -- what it holds ---------------------------------------------------------------------------------


def test_patches_keep_their_order_and_what_is_gone_leaves_no_file(empty: Store) -> None:
    state = empty.folder.parent
    store = persistence.add(empty, [module("b"), module("a")])
    store = persistence.add(store, [module("c")])
    assert opened(state) == store
    assert names(store) == ["b", "a", "c"]
    store = persistence.add(store, [module("a", "rebuilt")])
    assert names(opened(state)) == ["b", "a", "c"]
    store = persistence.drop(store, ["b"])
    assert names(opened(state)) == ["a", "c"]
    assert files(store) == {"index.json"} | {f for row in store.patches for f in (row.file, row.report)}
    assert persistence.releases(state) == (RELEASE,)
    store = persistence.drop(store, ["a", "c"])
    assert files(store) == {"index.json"}


def test_nothing_before_the_last_cumulative_patch_is_wanted(empty: Store) -> None:
    rows = [module("a"), module("b", replaces=True), module("c", replaces=None), module("d")]
    assert [row.name for row in persistence.add(empty, rows).wanted] == ["b", "c", "d"]
    assert [row.name for row in persistence.add(empty, rows[:1]).wanted] == ["a"]
    assert persistence.drop(persistence.read(empty.folder.parent, RELEASE), ["a"]).wanted == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"schema": 2, "release": "6.1.0-55-amd64", "patches": []}',
        '{"schema": 1, "release": "6.1.0-54-amd64", "patches": []}',
        '{"schema": 1, "release": "6.1.0-55-amd64", "patches": [{"name": "a"}]}',
    ],
)
def test_a_damaged_index_is_refused_and_never_taken_for_an_empty_one(
    empty: Store, place: Place, text: str
) -> None:
    empty.folder.mkdir(parents=True)
    (empty.folder / "index.json").write_text(text)
    with pytest.raises(Refused) as error:
        persistence.read(empty.folder.parent, RELEASE)
    assert error.value.rule == "store-damaged"
    found = persistence.look(place, empty.folder.parent, RELEASE, "boot")
    assert found is not None
    assert found.trouble is not None
    assert found.trouble.rule == "store-damaged"


def test_an_index_cannot_lead_out_of_its_folder(empty: Store) -> None:
    store = persistence.add(empty, [module("a")])
    path = store.folder / "index.json"
    document = json.loads(path.read_text())
    for bad in ("../../etc/passwd", "a.ko", "/root/a.0123456789abcdef.ko"):
        document["patches"][0]["file"] = bad
        path.write_text(json.dumps(document))
        with pytest.raises(Refused):
            persistence.read(store.folder.parent, RELEASE)


def test_a_module_that_is_other_or_gone_is_refused(empty: Store) -> None:
    store = persistence.add(empty, [module("a")])
    path = store.folder / store.patches[0].file
    path.write_bytes(b"other")
    for _ in range(2):
        with pytest.raises(Refused) as error:
            persistence.contents(store, store.patches[0])
        assert error.value.rule == "store-damaged"
        path.unlink(missing_ok=True)


def test_what_others_may_write_is_not_loaded(empty: Store) -> None:
    store = persistence.add(empty, [module("a")])
    persistence.require_safe(store)
    for path in (store.folder.parent, store.folder, store.folder / store.patches[0].file):
        mode = path.stat().st_mode
        path.chmod(0o777)
        with pytest.raises(Refused) as error:
            persistence.require_safe(store)
        assert error.value.rule == "unsafe-store"
        path.chmod(mode)


@pytest.mark.parametrize("release", ["", "..", "log", "6.1/../x", "6.1\n", "/etc", "6" * 99, "6.1 SMP"])
def test_what_is_no_release_has_no_store(release: str, tmp_path: Path, place: Place) -> None:
    with pytest.raises(UsageError, match="no kernel release"):
        persistence.release_of(release)
    assert persistence.look(place, tmp_path, release, "boot") is None


def test_a_disk_that_cannot_be_written_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    with pytest.raises(Failed) as error:
        persistence.add(Store(RELEASE, tmp_path / "state" / RELEASE, ()), [module("a")])
    assert error.value.rule == "unwritable"


def test_what_is_put_beside_is_not_in_the_store_before_its_index_is(empty: Store) -> None:
    store = persistence.add(empty, [module("a")])
    new = persistence.put(store, [module("b"), module("a", "rebuilt")])
    assert names(new) == ["a", "b"]
    assert opened(empty.folder.parent) == store
    assert persistence.commit(new) == opened(empty.folder.parent) == new
    assert files(new) == {"index.json"} | {f for row in new.patches for f in (row.file, row.report)}


def test_what_could_not_be_put_leaves_nothing(empty: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store = persistence.add(empty, [module("a")])
    before = files(store)

    def full(path: Path, data: bytes) -> None:
        if path.name.startswith("c."):
            raise Failed("it cannot be written", why="No space left on device", rule="unwritable")
        write_atomically(path, data)

    monkeypatch.setattr(persistence, "write_atomically", full)
    with pytest.raises(Failed) as error:
        persistence.add(store, [module("b"), module("a", "rebuilt"), module("c")])
    assert (error.value.rule, error.value.why) == ("unwritable", "No space left on device")
    assert opened(empty.folder.parent) == store
    assert files(store) == before


# -- the guard and the switches --------------------------------------------------------------------


def test_the_mark_of_a_former_boot_trips_until_it_is_taken_away(empty: Store, place: Place) -> None:
    state = empty.folder.parent

    def guard(boot: str) -> Guard:
        found = persistence.look(place, state, RELEASE, boot)
        assert found is not None
        return found.guard

    store = persistence.add(empty, [module("a")])
    assert guard("one") is Guard.CLEAR
    attempt = persistence.arm(store, "one", 4096)
    assert persistence.read_attempt(state, RELEASE) == attempt
    assert (attempt.patches, attempt.taint) == (("a",), 4096)
    assert (guard("one"), guard("two"), guard("")) == (Guard.WATCHING, Guard.TRIPPED, Guard.TRIPPED)
    persistence.add(store, [module("b")])
    assert guard("two") is Guard.TRIPPED
    persistence.disarm(state, RELEASE)
    persistence.disarm(state, RELEASE)
    assert guard("two") is Guard.CLEAR


def test_a_damaged_mark_counts_as_one_of_a_former_boot(empty: Store, place: Place) -> None:
    store = persistence.add(empty, [module("a")])
    for text in ("", "{", "[]", '{"boot": "one"}', "\0" * 100):
        (store.folder / "attempt.json").write_text(text)
        found = persistence.look(place, empty.folder.parent, RELEASE, "one")
        assert found is not None
        assert found.guard is Guard.TRIPPED


def test_without_patches_no_mark_is_kept(empty: Store) -> None:
    store = persistence.add(empty, [module("a")])
    persistence.arm(store, "one", 0)
    persistence.drop(store, ["a"])
    assert persistence.read_attempt(empty.folder.parent, RELEASE) is None


def test_the_switches(place: Place, tmp_path: Path) -> None:
    off = tmp_path / "etc/off"
    assert persistence.switched_off(place, off) == ""
    off.parent.mkdir()
    off.symlink_to("/nowhere")
    assert persistence.switched_off(place, off) == f"the file {off}"
    off.unlink()
    for line, word in (
        ("quiet kmend=off", True),
        ("kmend=off\n", True),
        ("kmend=on xkmend=off kmend=offline", False),
    ):
        (place.proc / "cmdline").write_text(line)
        assert bool(persistence.switched_off(place, off)) is word
    (place.proc / "vmcore").write_text("")
    assert "crash kernel" in persistence.switched_off(place, off)


# -- power cuts ------------------------------------------------------------------------------------


@dataclass
class Disk:
    """What would be on a disk if the power went now.

    A file has the contents of its last fsync (or those of now); a folder the names of its last fsync, or any
    mixture of these and those of now: file systems give no order to what is not synced.
    """

    root: Path
    data: dict[int, bytes] = field(default_factory=dict)
    folders: dict[Path, dict[str, int]] = field(default_factory=dict)
    #: keeps each inode's number from being used again
    held: list[int] = field(default_factory=list)
    cuts: list[tuple[str, list[dict[str, bytes]]]] = field(default_factory=list)

    def synced(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path.is_dir():
            if path.is_relative_to(self.root):
                self.folders[path] = {one.name: self.number(one) for one in path.iterdir() if one.is_file()}
        else:
            info = os.fstat(fd)
            self.held.append(os.dup(fd))
            self.data[info.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()

    def number(self, path: Path) -> int:
        return path.stat().st_ino

    def cut(self, what: str) -> None:
        """Remember every state in which the release's folder could be found after a cut at this moment."""
        folder = self.root / RELEASE
        now = {one.name: self.number(one) for one in folder.iterdir()} if folder.is_dir() else {}
        contents = {one.name: one.read_bytes() for one in folder.iterdir()} if folder.is_dir() else {}
        before = self.folders.get(folder, {})
        loose = [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]
        states = []
        for chosen in itertools.product((False, True), repeat=len(loose)):
            view = dict(before)
            for name, new in zip(loose, chosen, strict=True):
                if new and name in now:
                    view[name] = now[name]
                elif new:
                    view.pop(name, None)
            states.append({name: self.data.get(inode, b"") for name, inode in view.items()})
            lazy = {name: contents.get(name, self.data.get(inode, b"")) for name, inode in view.items()}
            if all(now.get(name) == inode for name, inode in view.items()):
                states.append(lazy)
        self.cuts.append((what, states))

    def close(self) -> None:
        for fd in self.held:
            os.close(fd)


@pytest.fixture
def disk(empty: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Every call that makes something lasting is a moment for a power cut, before it and after it."""
    found = Disk(empty.folder.parent)

    def wrap(name: str) -> None:
        real: Callable[..., object] = getattr(os, name)

        def wrapped(*args: object, **more: object) -> object:
            found.cut(f"before {name}{args}")
            result = real(*args, **more)
            if name == "fsync":
                assert isinstance(args[0], int)
                found.synced(args[0])
            found.cut(f"after {name}{args}")
            return result

        monkeypatch.setattr(os, name, wrapped)

    for name in ("fsync", "replace", "rename", "link", "unlink", "mkdir"):
        wrap(name)
    yield found
    found.close()


def found_after(state: dict[str, bytes], folder: Path) -> list[str]:
    """What a boot finds on a disk in that state."""
    (folder / RELEASE).mkdir(parents=True)
    for name, data in state.items():
        (folder / RELEASE / name).write_bytes(data)
    return names(opened(folder))


def test_a_power_cut_at_any_call_leaves_the_old_store_or_the_new_one(
    empty: Store, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[tuple[list[str], Callable[[Store], Store]]] = [
        (["a", "b"], lambda store: persistence.add(store, [module("a"), module("b")])),
        (["a", "b"], lambda store: persistence.add(store, [module("a", "rebuilt")])),
        (["a", "b", "c"], lambda store: persistence.add(store, [module("c"), module("b", "rebuilt")])),
        (["a", "c"], lambda store: persistence.drop(store, ["b"])),
        ([], lambda store: persistence.drop(store, ["a", "c"])),
    ]
    store, steps = empty, []
    before: list[str] = []
    for after, change in changes:
        disk.cuts.clear()
        store = change(store)
        assert names(store) == after
        steps.append((before, after, list(disk.cuts)))
        before = after
    monkeypatch.undo()
    number = 0
    for before, after, cuts in steps:
        assert len(cuts) > 10
        seen = set()
        known: set[frozenset[tuple[str, bytes]]] = set()
        for what, states in cuts:
            for state in states:
                if frozenset(state.items()) in known:
                    continue
                known.add(frozenset(state.items()))
                number += 1
                got = found_after(state, tmp_path / f"cut{number}")
                assert got in (before, after), what
                seen.add(tuple(got))
        # what was reported as done is done: the last moment knows the new one alone
        assert all(found_after(s, tmp_path / f"end{number}-{n}") == after for n, s in enumerate(cuts[-1][1]))
        assert seen == {tuple(before), tuple(after)}
    assert number > 60


def test_the_simulated_disk_catches_a_store_that_does_not_sync(
    empty: Store, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above can fail: without the folder's sync before the index, it does."""
    real = persistence._sync
    calls: list[Path] = []

    def forgetful(folder: Path) -> None:
        calls.append(folder)
        if folder != empty.folder or sum(one == folder for one in calls) > 1:
            real(folder)

    monkeypatch.setattr(persistence, "_sync", forgetful)
    persistence.add(empty, [module("a")])
    cuts = list(disk.cuts)
    monkeypatch.undo()
    broken = 0
    for number, state in enumerate(state for _, states in cuts for state in states):
        try:
            found_after(state, tmp_path / f"cut{number}")
        except (Refused, FileNotFoundError):
            broken += 1
    assert broken > 0


def test_the_mark_is_on_the_disk_before_anything_is_loaded(
    empty: Store, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = persistence.add(empty, [module("a")])
    persistence.arm(store, "one", 0)
    armed = disk.cuts[-1][1]
    persistence.disarm(store.folder.parent, RELEASE)
    gone = disk.cuts[-1][1]
    monkeypatch.undo()
    assert all(json.loads(state["attempt.json"])["boot"] == "one" for state in armed)
    assert all("attempt.json" not in state for state in gone)


CHANGER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_persistence import RELEASE, module
from kmend.runtime import persistence
left = int(sys.argv[3])
def wrap(real):
    def wrapped(*args, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    return wrapped
for name in ("fsync", "replace", "link", "unlink"):
    setattr(os, name, wrap(getattr(os, name)))
state = Path(sys.argv[1])
while True:
    store = persistence.drop(persistence.add(persistence.read(state, RELEASE), [module("x")]), ["x"])
    store = persistence.add(store, [module("a"), module("b")])
    store = persistence.add(store, [module("a", "rebuilt")])
    persistence.arm(store, "one", 0)
    persistence.disarm(state, RELEASE)
    store = persistence.drop(store, ["a"])
    store = persistence.drop(store, ["b"])
"""


def test_a_killed_run_leaves_a_sound_store_and_the_next_one_clears_up(tmp_path: Path) -> None:
    chance = random.Random(7)
    state = tmp_path / "state"
    found = set()
    for call in chance.sample(range(1, 60), 14):
        words = [sys.executable, "-c", CHANGER, str(state), str(Path(__file__).parent), str(call)]
        done = subprocess.run(words, capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (-signal.SIGKILL, b"")
        store = opened(state)
        found.add(frozenset(names(store)))
        assert set(names(store)) <= {"x", "a", "b"}
    assert len(found) > 2
    store = persistence.add(persistence.read(state, RELEASE), [module("z")])
    store = persistence.drop(store, [name for name in names(store) if name != "z"])
    left = files(store) - {"index.json", "attempt.json"}
    assert left == {store.patches[0].file, store.patches[0].report}


def test_rows_of_the_index_are_what_was_given(empty: Store) -> None:
    row, data, report = module("a", replaces=None)
    row = replace(row, report="", build_id="", user="ädmin")
    persistence.add(empty, [(row, data, report)])
    assert opened(empty.folder.parent).patches == (row,)
    assert files(empty) == {"index.json", row.file}


@pytest.mark.parametrize(
    ("upper", "kind", "words"),
    [
        ("/proc", "tmpfs", "its upper layer, /proc, is on tmpfs"),
        ("/proc", "ext4", ""),
        ("/nowhere at all", "ext4", "its upper layer, /nowhere at all, cannot be seen from here"),
        ("", "", ""),
    ],
)
def test_a_mark_on_an_overlay_in_memory_is_forgotten(
    tmp_path: Path, upper: str, kind: str, words: str
) -> None:
    def row(path: Path | str, kind: str, options: str) -> str:
        number = Path(path).stat().st_dev
        where = f"{os.major(number)}:{os.minor(number)}"
        return f"22 1 {where} / /here rw,relatime shared:1 - {kind} source {options}\n"

    place = Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")
    (tmp_path / "proc/self").mkdir(parents=True)
    options = f"rw,lowerdir=/l,upperdir={upper}".replace(" ", "\\040")
    mounts = row(tmp_path, "overlay", options) if upper else row(tmp_path, "tmpfs", "rw")
    mounts += row("/proc", kind, "rw") if kind else ""
    (tmp_path / "proc/self/mountinfo").write_text(mounts)
    found = persistence.forgetful(place, tmp_path)
    assert (found is not None) is bool(words)
    if found is not None:
        assert found.rule == "forgetful-state"
        assert words in found.why


def test_a_disk_that_does_not_confirm_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is replaced by then: it would be wrong to say that the store is as it was."""
    store = persistence.add(persistence.read(tmp_path, RELEASE), [module("a")])

    def sync(_folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(persistence, "_sync", sync)
    with pytest.raises(Failed, match="is changed, but perhaps not on the disk") as caught:
        persistence.drop(store, ["a"])
    assert caught.value.rule == "unsynced"
    assert persistence.read(tmp_path, RELEASE).patches == ()
