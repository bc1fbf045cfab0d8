"""install, uninstall, healthy, load --all: what they say of the store, without a kernel to be patched."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_persistence import RELEASE, module

from kmend import boot as booting
from kmend import candidate as candidates
from kmend import examine, installer, storing
from kmend.action import Following
from kmend.boot import Boot
from kmend.candidate import LASTING, Candidate, look
from kmend.cli import install as cli_install
from kmend.cli import main
from kmend.cli.install import boot_document, boot_text
from kmend.cli.status import unfinished_text
from kmend.core.config import Config
from kmend.core.errors import Failed, Refusal, Refused, Unable, UsageError
from kmend.core.live import ActionReport, Check, Result
from kmend.core.progress import Silent
from kmend.installer import UNIT, Installer
from kmend.manager import Manager
from kmend.runtime import act, journal, persistence
from kmend.runtime.journal import Action, Journal, Record, acting, who
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.observe import Seen
from kmend.runtime.persistence import Store
from kmend.runtime.place import Place
from kmend.runtime.preflight import ModuleFile


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    """A machine with an empty state folder, on which nothing is loaded and systemd is not there."""
    for one in (installer, booting):
        monkeypatch.setattr(one, "require_root", lambda _verb: None)
    place = Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")
    for name, text in (
        ("proc/cmdline", "quiet"),
        ("proc/sys/kernel/osrelease", RELEASE),
        ("proc/sys/kernel/random/boot_id", "this-boot"),
        ("proc/sys/kernel/tainted", "4096"),
        ("proc/modules", ""),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    place.run.mkdir()
    place.livepatch.mkdir(parents=True)
    config = Config(tmp_path / "cache", tmp_path / "state", 1, "")
    boot = Boot(config, Silent(), place=place, off_file=tmp_path / "off")
    return Installer(config, Silent(), place=place, boot=boot, unit_folders=[tmp_path / "units"])


def stored(machine: Installer, *names: str) -> Store:
    empty = Store(RELEASE, machine.config.state / RELEASE, ())
    return persistence.add(empty, [module(name) for name in names])


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    status = main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "words",
    [
        ("install",),
        ("install", "x.ko", "--list"),
        ("uninstall",),
        ("uninstall", "x", "--all"),
        ("uninstall", "x", "--unload", "--kernel", RELEASE),
        ("load",),
        ("load", "x.ko", "--all"),
        ("load", "x.ko", "--boot"),
        ("load", "x.ko", "--retry"),
        ("load", "--all", "--param", "a=b"),
        ("load", "--all", "--no-wait"),
        ("healthy", "x"),
    ],
)
def test_words_that_do_not_go_together(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, found = answer(capsys, *words)
    assert (status, found["refused"][0]["rule"]) == (2, "usage")


def test_what_is_installed_is_listed(
    machine: Installer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMEND_STATE", str(machine.config.state))
    assert main(["install", "--list"]) == 0
    assert capsys.readouterr().out == "nothing is installed\n"
    stored(machine, "a", "b")
    status, found = answer(capsys, "install", "--list")
    assert status == 0
    assert [(s["release"], [p["name"] for p in s["patches"]]) for s in found["stores"]] == [
        (RELEASE, ["a", "b"])
    ]
    assert main(["install", "--list"]) == 0
    assert "2. b, by root at 1970" in capsys.readouterr().out


def test_what_is_no_module_is_not_installed(machine: Installer, tmp_path: Path) -> None:
    (tmp_path / "text.ko").write_text("no ELF file")
    with pytest.raises(UsageError):
        machine.install([str(tmp_path / "text.ko")])
    assert machine.stores() == ()
    assert not machine.config.state.exists()


def test_uninstall_takes_out_what_is_named_or_nothing(machine: Installer) -> None:
    stored(machine, "a", "b", "c")
    with pytest.raises(UsageError) as error:
        machine.uninstall(["a", "x"])
    assert error.value.rule == "not-installed"
    with pytest.raises(UsageError):
        machine.uninstall(["a"], "6.1.0-54-amd64")
    assert [row.name for row in machine.stores()[0].patches] == ["a", "b", "c"]
    assert [row.result for row in machine.uninstall(["c", "a"])] == [Result.DONE, Result.DONE]
    assert [row.name for row in machine.stores()[0].patches] == ["b"]
    machine.uninstall([])
    assert machine.stores() == ()
    verbs = [(row.verb, row.patch, row.result) for row in Journal(machine.config.state, "").records()]
    assert ("uninstall", "c", "done") in verbs


def test_healthy_takes_away_this_boots_mark_alone(machine: Installer) -> None:
    store = stored(machine, "a")
    assert machine.boot.healthy().result is Result.DONE  # nothing waits for it
    persistence.arm(store, "former-boot", 4096)
    assert "nothing changes" in machine.boot.healthy().why
    assert persistence.read_attempt(machine.config.state, RELEASE) is not None
    persistence.arm(store, "this-boot", 4096)
    (machine.place.proc / "sys/kernel/tainted").write_text(f"{4096 | 128}\n")  # an oops since
    report = machine.boot.healthy()
    assert (report.result, report.refused[0].rule) == (Result.REFUSED, "boot-unhealthy")
    assert persistence.read_attempt(machine.config.state, RELEASE) is not None
    (machine.place.proc / "sys/kernel/tainted").write_text(f"{4096 | 512}\n")  # a warning is no death
    assert machine.boot.healthy().result is Result.DONE
    assert persistence.read_attempt(machine.config.state, RELEASE) is None


def test_an_oops_from_before_the_patches_does_not_count(machine: Installer) -> None:
    persistence.arm(stored(machine, "a"), "this-boot", 128)
    (machine.place.proc / "sys/kernel/tainted").write_text("128\n")
    assert machine.boot.healthy().result is Result.DONE


def test_a_load_that_was_killed_or_goes_on_is_not_taken_for_done(machine: Installer) -> None:
    book = Journal(machine.config.state, "this-boot")
    by = who(machine.place, "kmend load")
    for name, transition, ended in (("moving", 1, True), ("killed", 0, False), ("settled", 0, True)):
        folder = machine.place.livepatch / name
        folder.mkdir()
        (folder / "enabled").write_text("1\n")
        (folder / "transition").write_text(f"{transition}\n")
        action = book.begin("load", name, by, "", {"sha256": f"of {name}"})
        if ended:
            action.end("done", "")
    for name, result in (("interrupted", "interrupted"), ("pending", "pending")):
        folder = machine.place.livepatch / name
        folder.mkdir()
        (folder / "enabled").write_text("1\n")
        (folder / "transition").write_text("0\n")
        book.begin("load", name, by, "", {}).end(result, "")
    here = machine.boot._here(read_kernel(machine.place))
    assert {name: row.settled for name, row in here.items()} == {
        "moving": False,
        "killed": False,
        "settled": True,
        "interrupted": False,
        "pending": False,
    }
    assert here["settled"].sha256 == "of settled"


def test_what_comes_after_it_already_keeps_an_installed_patch_from_being_loaded(
    machine: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`a` was unloaded, or a cumulative `b` has replaced it: loading it now would put it on top of `b`."""
    monkeypatch.setattr(act, "require_power", lambda *_: None)
    monkeypatch.setattr(persistence, "require_safe", lambda _store: None)
    stored(machine, "a", "b")
    folder = machine.place.livepatch / "b"
    folder.mkdir()
    (folder / "enabled").write_text("1\n")
    (folder / "transition").write_text("0\n")
    (report,) = machine.boot.load_all(Following())
    assert [row.rule for row in report.refused] == ["out-of-order"]
    assert "b" in report.next_step
    (folder / "replace").write_text("1\n")
    reports = machine.boot.load_all(Following())
    assert [(row.patch, row.result, row.why) for row in reports] == [
        ("a", Result.DONE, "a is not loaded: b, which comes later, is cumulative"),
        ("b", Result.DONE, "b is in force already"),
    ]


def test_status_says_how_loading_at_boot_stands(machine: Installer) -> None:
    assert list(boot_text(machine.boot.look())) == []
    store = stored(machine, "a", "b")
    for name in "ab":
        (machine.place.livepatch / name).mkdir()
    assert list(boot_text(machine.boot.look())) == ["loaded at boot: a, b"]
    persistence.arm(store, "former-boot", 0)
    machine.boot.off_file.write_text("")
    text = "\n".join(boot_text(machine.boot.look()))
    assert f"switched off by the file {machine.boot.off_file}" in text
    assert "LEFT OFF: the boot of " in text
    assert "began to load a, b and was never found to be healthy" in text
    document = boot_document(machine.boot.look())
    assert document is not None
    assert (document["guard"], document["trouble"]) == ("tripped", None)
    (store.folder / "index.json").write_text("{")
    assert "is damaged" in "\n".join(boot_text(machine.boot.look()))
    with pytest.raises(Refused):
        machine.stores()


def test_the_unit_is_looked_for_where_systemd_looks(machine: Installer) -> None:
    (row,) = machine._enable_unit()
    assert (row.rule, UNIT in row.why) == ("no-boot-unit", True)


# -- waiting for who acts --------------------------------------------------------------------------


class Told(Silent):
    """Keeps the steps."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)


@contextmanager
def another(place: Place, seconds: float, then: Path | None = None, text: str = "") -> Iterator[None]:
    """Another kmend acts for so long; at its end it writes ``text``."""
    begun = threading.Event()

    def work() -> None:
        with acting(place, "load x"):
            begun.set()
            time.sleep(seconds)
            if then is not None:
                then.write_text(text)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        thread.join()


def test_healthy_waits_for_who_acts_and_says_so(machine: Installer) -> None:
    """Its timer comes once in a boot: had it given up, the next boot would load nothing."""
    persistence.arm(stored(machine, "a"), "this-boot", 0)
    machine.boot.progress = told = Told()
    with another(machine.place, 1.0):
        assert machine.boot.healthy().result is Result.DONE
    assert told.steps == ["waiting for the kmend that acts on this kernel now"]
    assert persistence.read_attempt(machine.config.state, RELEASE) is None
    assert booting.HEALTHY_LIMIT == 600


def test_healthy_gives_up_in_the_end(machine: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    persistence.arm(stored(machine, "a"), "this-boot", 0)
    monkeypatch.setattr(booting, "HEALTHY_LIMIT", 0.1)
    with another(machine.place, 1.0), pytest.raises(Refused) as error:
        machine.boot.healthy()
    assert error.value.rule == "busy"
    assert [row.detail["rules"] for row in lines(machine, "--all")] == [["busy"]]


def test_an_oops_while_healthy_waits_counts(machine: Installer) -> None:
    persistence.arm(stored(machine, "a"), "this-boot", 0)
    tainted = machine.place.proc / "sys/kernel/tainted"
    tainted.write_text("0\n")
    with another(machine.place, 0.5, tainted, "128\n"):
        report = machine.boot.healthy()
    assert [row.rule for row in report.refused] == ["boot-unhealthy"]
    assert persistence.read_attempt(machine.config.state, RELEASE) is not None
    assert [row.detail["rules"] for row in lines(machine, "a")] == [["boot-unhealthy"]]


# -- who may -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("install", "x.ko"), ("uninstall", "x"), ("healthy",)])
def test_who_is_not_root_is_told_before_anything_is_done(
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[object] = []
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(installer, "run", lambda *what, **_: called.append(what))
    monkeypatch.setattr(journal, "acting", lambda *what, **_: called.append(what))
    monkeypatch.setenv("KMEND_STATE", str(tmp_path / "state"))
    status, found = answer(capsys, *words)
    assert (status, found["refused"][0]["rule"]) == (3, "not-root")
    assert found["refused"][0]["what"] == f"kmend {words[0]} needs root"
    assert called == []
    assert not (tmp_path / "state").exists()


def candidate(name: str, *refused: str, release: str = RELEASE) -> Candidate:
    """A module that has been looked at."""
    row, data, _ = module(name)
    checks = tuple(
        Check("x", False, rule, Refusal(rule, f"{name} is bad", "why", "next")) for rule in refused
    )
    file = ModuleFile(
        path=f"{name}.ko",
        name=name,
        vermagic=f"{release} SMP",
        build_id="",
        depends=(),
        signed=False,
        identity="",
        sha256=row.sha256,
        wanted=None,
        replace=False,
    )
    return Candidate(f"{name}.ko", data, file, b"", checks, ())


def looking(monkeypatch: pytest.MonkeyPatch, find: Callable[[str], Candidate]) -> None:
    """What is found when a module is looked at."""
    monkeypatch.setattr(candidates, "look", lambda _config, _place, path, _kernel: find(path))


@pytest.fixture
def enabling(machine: Installer, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The unit is there; what would enable it, and whether the lock was free then."""
    called: list[object] = []
    machine.unit_folders[0].mkdir()
    (machine.unit_folders[0] / UNIT).write_text("")

    class Done:
        status = 0

    def run(words: list[str], **_: object) -> Done:
        called.append((words[1], journal.is_free(machine.place)))
        return Done()

    monkeypatch.setattr(installer, "run", run)
    monkeypatch.setattr(installer.shutil, "which", lambda _name: "/bin/systemctl")
    looking(monkeypatch, candidate)
    return called


def test_the_unit_is_enabled_under_the_lock(machine: Installer, enabling: list[object]) -> None:
    with another(machine.place, 1.0), pytest.raises(Refused) as error:
        machine.install(["a"])
    assert (error.value.rule, enabling) == ("busy", [])
    assert [row.result for row in machine.install(["a"])] == [Result.DONE]
    assert enabling == [("enable", False)]


# -- what the boot will ask --------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o002, 0o000, 0o077])
def test_what_was_installed_under_any_umask_is_loaded_at_boot(
    machine: Installer, enabling: list[object], umask: int
) -> None:
    before = os.umask(umask)
    try:
        machine.install(["a"])
    finally:
        os.umask(before)
    (store,) = machine.stores()
    persistence.require_safe(store)
    assert [path.stat().st_mode & 0o777 for path in (store.folder.parent, store.folder)] == [0o755, 0o755]


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_the_journal_makes_a_folder_that_a_boot_accepts(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        Journal(tmp_path / "var/state", "b").refused("load", "x", who(Place(), ""), "no", ())
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "var", tmp_path / "var/state")] == [0o755] * 2
    assert (tmp_path / "var/state/log").stat().st_mode & 0o022 == 0


def test_install_refuses_a_store_that_the_boot_would_refuse(
    machine: Installer, enabling: list[object]
) -> None:
    machine.config.state.mkdir(0o700)
    machine.config.state.chmod(0o775)
    with pytest.raises(Refused) as error:
        machine.install(["a"])
    assert error.value.rule == "unsafe-store"
    assert (machine.stores(), enabling) == ((), [])
    machine.config.state.chmod(0o755)
    machine.install(["a"])
    (machine.config.state / RELEASE / "index.json").chmod(0o666)
    with pytest.raises(Refused):
        machine.install(["b"])


def test_install_says_what_would_keep_the_patch_from_being_loaded(
    machine: Installer, enabling: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the running kernel; how another one boots is not known here."""
    persistence.arm(stored(machine, "a"), "former-boot", 0)
    machine.boot.off_file.write_text("")
    looking(monkeypatch, lambda path: candidate(path, release=OTHER if path == "far" else RELEASE))
    near, far = machine.install(["near", "far"])
    assert [row.rule for row in near.warnings] == ["crash-guard", "switched-off"]
    assert far.warnings == ()


# -- what was refused leaves its trace ---------------------------------------------------------------


def lines(machine: Installer | Boot, name: str) -> list[Record]:
    """What the journal says of a patch."""
    return [row for row in Journal(machine.config.state, "").records() if row.patch == name]


@pytest.fixture
def boot(machine: Installer, monkeypatch: pytest.MonkeyPatch) -> Boot:
    """The machine boots: what is installed is about to be loaded; `a` of `a`, `b` is damaged."""
    monkeypatch.setattr(act, "require_power", lambda *_: None)
    store = stored(machine, "a", "b")
    (store.folder / store.patches[0].file).write_bytes(b"other")
    return machine.boot


def test_a_patch_that_the_boot_refuses_is_in_the_journal_and_in_the_status(boot: Boot) -> None:
    found = boot.load_all(Following(), boot=True)
    assert [row.result for row in found] == [Result.REFUSED]
    (row,) = lines(boot, "a")
    assert (row.event, row.result, row.detail["rules"]) == ("end", "refused", ["store-damaged"])
    text = list(boot_text(boot.look()))
    assert text[0] == "loaded at boot: a, b"
    assert any(
        line.startswith("  a: NOT LOADED: ")
        and "is damaged: nothing of this store is loaded: it is not the file that was installed" in line
        and line.endswith("(store-damaged)")
        for line in text
    )
    assert "  b: NOT LOADED: b was not loaded, as it comes after a" in text
    document = boot_document(boot.look())
    assert document is not None
    rows = document["not_loaded"]
    assert isinstance(rows, list)
    assert [(one["name"], one["rules"], one["tried"]) for one in rows] == [
        ("a", ["store-damaged"], True),
        ("b", [], True),
    ]
    assert rows[0]["time"] == row.time


def test_a_store_that_the_boot_refuses_tells_of_each_patch(boot: Boot) -> None:
    boot.config.state.chmod(0o777)
    with pytest.raises(Refused):
        boot.load_all(Following(), boot=True)
    text = list(boot_text(boot.look()))
    assert [line.partition(": ")[0] for line in text[1:]] == ["  a", "  b"]
    assert all(line.endswith("(unsafe-store)") for line in text[1:])
    # a later line about one of them has the word
    boot.config.state.chmod(0o755)
    boot.load_all(Following(), boot=True)
    (line,) = (line for line in boot_text(boot.look()) if line.startswith("  a: "))
    assert line.endswith("(store-damaged)")


def test_a_damaged_index_is_in_the_journal(machine: Installer, boot: Boot) -> None:
    (boot.config.state / RELEASE / "index.json").write_text("{")
    with pytest.raises(Refused):
        boot.load_all(Following(), boot=True)
    for refused in (boot.healthy, lambda: machine.uninstall(["a"])):
        with pytest.raises(Refused):
            refused()
    found = [(row.verb, row.event, row.detail["rules"]) for row in lines(boot, "--all")]
    assert found == [(verb, "end", ["store-damaged"]) for verb in ("load", "healthy")]
    assert [row.verb for row in lines(boot, "a")] == ["uninstall"]


def test_what_comes_too_late_is_in_the_journal(boot: Boot) -> None:
    folder = boot.place.livepatch / "b"
    folder.mkdir()
    (folder / "enabled").write_text("1\n")
    (folder / "transition").write_text("0\n")
    boot.load_all(Following())
    assert [row.detail["rules"] for row in lines(boot, "a")] == [["out-of-order"]]


def test_a_mark_that_cannot_be_made_is_in_the_journal(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise Failed("it cannot be written", why="the disk is full", rule="unwritable")

    monkeypatch.setattr(persistence, "arm", full)
    with pytest.raises(Failed):
        boot.load_all(Following(), boot=True)
    assert "  a: NOT LOADED: it cannot be written: the disk is full (unwritable)" in boot_text(boot.look())


def test_what_is_not_installed_is_in_the_journal(machine: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(machine, "a")
    with pytest.raises(UsageError):
        machine.uninstall(["x"])
    assert [(row.verb, row.detail["rules"]) for row in lines(machine, "x")] == [
        ("uninstall", ["not-installed"])
    ]
    rows = {"good": candidate("good"), "bad": candidate("bad", "one", "two")}
    looking(monkeypatch, rows.__getitem__)
    assert {row.result for row in machine.install(["good", "bad"])} == {Result.REFUSED}
    assert [row.detail["rules"] for row in lines(machine, "bad")] == [["one", "two"]]
    assert [row.text for row in lines(machine, "good")] == ["good was not installed, because bad was refused"]


def test_status_says_why_a_patch_is_not_in_force(machine: Installer) -> None:
    store = stored(machine, "a")

    def said() -> str:
        (line,) = list(boot_text(machine.boot.look()))[1:]
        return line.removeprefix("  a: ")

    book, by = Journal(machine.config.state, "this-boot"), who(machine.place, "")
    former = Journal(machine.config.state, "former-boot")
    reasons = [Refusal("r1", "f() is another", "its bytes differ", ""), Refusal("r2", "x", "y", "")]
    former.refused("load", "a", by, "of a former boot", ())
    assert said().startswith("NOT LOADED: nobody has tried to load it in this boot")
    book.begin("install", "a", by, "for it", {}).end("done", "for it")
    assert said() == "not loaded yet: it was installed in this boot; `kmend load --all` loads it"
    book.refused("install", "a", by, "a newer one was refused", reasons)
    assert "not loaded yet" in said()
    book.refused("load", "a", by, "a was not loaded", reasons)
    assert said() == "NOT LOADED: f() is another: its bytes differ, and 1 more (r1, r2)"
    action = book.begin("load", "a", by, "from", {})
    assert "`kmend load a`, process" in said()
    action.step("on its way")
    action.end("reversed", "a was taken back", rules=["stalled"], why="3 tasks left: they sleep")
    assert said() == "NOT LOADED: a was taken back: 3 tasks left: they sleep (stalled)"
    book.begin("load", "a", by, "from", {}).end("done", "a is in force")
    assert said().startswith("NOT LOADED: it was loaded in this boot, and has been replaced or taken")
    book.begin("unload", "a", by, "", {}).end("done", "a is taken back\x1b and unloaded")
    assert said() == "NOT LOADED: a is taken back\\x1b and unloaded"

    def absent() -> list[str]:
        found = machine.boot.look()
        assert found is not None
        return [row.name for row in found.absent]

    # switched off, it is not to be in force; what was tried all the same is told
    machine.boot.off_file.write_text("")
    assert len(list(boot_text(machine.boot.look()))) == 3
    stored(machine, "b")
    assert absent() == []
    machine.boot.off_file.unlink()
    assert absent() == ["b"]
    (machine.place.livepatch / "b").mkdir()
    assert absent() == []
    # another kernel's patches are not expected here
    assert persistence.absent(machine.place, machine.config.state, store, "") != ()
    (machine.place.proc / "sys/kernel/osrelease").write_text("6.1.0-1-amd64\n")
    assert persistence.absent(machine.place, machine.config.state, store, "") == ()


def test_what_a_cumulative_patch_has_replaced_is_not_missed(machine: Installer) -> None:
    """The index does not know that `b` is one; the kernel does (6.11), or kmend's journal."""
    empty = Store(RELEASE, machine.config.state / RELEASE, ())
    persistence.add(empty, [module("a"), module("b", replaces=None), module("c")])
    folder = machine.place.livepatch / "b"
    folder.mkdir()
    found = machine.boot.look()
    assert found is not None
    assert [row.name for row in found.absent] == ["a", "c"]
    (folder / "replace").write_text("1\n")
    for _ in range(2):
        found = machine.boot.look()
        assert found is not None
        assert [row.name for row in found.absent] == ["c"]
        (folder / "replace").unlink(missing_ok=True)
        book = Journal(machine.config.state, "this-boot")
        book.begin("load", "b", who(machine.place, ""), "", {"replace": True}).end("done", "")


def test_what_was_refused_is_not_told_as_loaded_before_a_crash(machine: Installer) -> None:
    persistence.arm(stored(machine, "a", "b"), "former-boot", 0)
    book, by = Journal(machine.config.state, "former-boot"), who(machine.place, "")
    book.begin("load", "a", by, "", {}).end("done", "")
    book.refused("load", "b", by, "no", ())
    found = machine.boot.look()
    assert found is not None
    assert machine.boot._last_words(found) == "it had loaded a"


# -- the question at a stall -------------------------------------------------------------------------


def test_load_all_can_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asks: list[object] = []

    def load_all(self: Boot, how: Following, **_: object) -> tuple[ActionReport, ...]:
        asks.append((how.on_stall.value, self.manager.ask is not None))
        return ()

    monkeypatch.setattr(Boot, "load_all", load_all)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setenv("KMEND_STATE", str(tmp_path / "state"))
    assert main(["load", "--all", "--on-stall", "ask"]) == 0
    assert asks == [("ask", True)]


def test_what_is_left_as_it_is_ends_the_loading(machine: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(act, "require_power", lambda *_: None)
    stored(machine, "a", "b")
    tried: list[str] = []

    def load(_self: Manager, path: str, _how: Following) -> ActionReport:
        tried.append(Path(path).name[0])
        return ActionReport("load", tried[-1], Result.PENDING, "its transition goes on")

    monkeypatch.setattr(Manager, "load", load)
    monkeypatch.setattr(booting, "read_module_file", lambda *_: candidate("x").module)
    machine.boot.load_all(Following())
    assert tried == ["a"]


# -- taken back first --------------------------------------------------------------------------------


class Kernel:
    """What takes patches back: all but ``stuck``."""

    def __init__(self, *there: str, stuck: str = "", result: Result = Result.REVERSED) -> None:
        self.there, self.stuck, self.result = list(there), stuck, result

    def loaded(self) -> tuple[str, ...]:
        return tuple(self.there)

    def unload(self, name: str, _how: Following) -> ActionReport:
        if name == self.stuck:
            refusal = Refusal("stalled", f"{name} does not end", "a task sleeps", "kmend blockers")
            return ActionReport("unload", name, self.result, f"{name} is in force", refused=(refusal,))
        self.there.remove(name)
        return ActionReport("unload", name, Result.DONE, f"{name} is taken back and unloaded")


@pytest.fixture
def uninstalling(machine: Installer, monkeypatch: pytest.MonkeyPatch) -> Installer:
    """`kmend uninstall` acts on that machine."""
    monkeypatch.setattr(cli_install, "Installer", lambda *_: machine)
    return machine


@pytest.mark.parametrize("result", [Result.REVERSED, Result.REFUSED, Result.STALLED])
@pytest.mark.parametrize("words", [("a", "b", "c"), ("--all",)])
def test_what_could_not_be_taken_back_stays_installed(
    uninstalling: Installer,
    words: tuple[str, ...],
    result: Result,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = stored(uninstalling, "a", "b", "c")
    kernel = Kernel("other", "c", "b", "a", stuck="b", result=result)
    monkeypatch.setattr(cli_install, "manager", lambda _context: kernel)
    for there in (["other", "b", "a"], ["other", "b", "a"]):  # the same command goes on
        status, found = answer(capsys, "uninstall", *words, "--unload")
        assert (status, found["result"], kernel.there) == (1, result.value, there)
        assert uninstalling.stores() == (before,)
    rows = [(row["patch"], row["result"]) for row in found["actions"]]
    assert rows == [("b", result.value), ("a", "refused"), ("b", "refused"), ("c", "refused")]
    assert found["actions"][1]["why"] == "a stays installed, as b could not be taken back"
    (_, last) = lines(uninstalling, "a")
    assert (last.event, last.verb, last.result, last.detail["rules"]) == (
        "end",
        "uninstall",
        "refused",
        ["stalled"],
    )
    kernel.stuck = ""
    status, found = answer(capsys, "uninstall", *words, "--unload")
    assert (status, kernel.there, uninstalling.stores()) == (0, ["other"], ())


def test_another_kmend_at_work_keeps_the_store(
    uninstalling: Installer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(uninstalling, "a")
    kernel = Kernel("a")
    monkeypatch.setattr(cli_install, "manager", lambda _context: kernel)
    with another(uninstalling.place, 1.5):
        status, found = answer(capsys, "uninstall", "a", "--unload")
    taken, refused = found["actions"]  # what is done is told
    assert (taken["patch"], taken["result"], refused["result"]) == ("a", "done", "refused")
    assert (status, refused["refused"][0]["rule"], uninstalling.stores()) == (1, "busy", (before,))


# -- before and after --------------------------------------------------------------------------------


def unfinished(machine: Installer) -> list[tuple[str, str]]:
    """What `kmend status` calls killed while nobody acts."""
    found = journal.unfinished(Journal(machine.config.state, "").records(), "this-boot")
    return [(row.verb, row.patch) for row in found]


def killed_before(machine: Installer, verb: str = "load", name: str = "k") -> None:
    """A run that was killed."""
    Journal(machine.config.state, "this-boot").begin(verb, name, who(machine.place, ""), "", {})
    assert unfinished(machine) == [(verb, name)]


def test_whoever_has_nothing_to_do_closes_what_was_killed(
    machine: Installer, enabling: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_before(machine, "healthy", "a")
    assert machine.boot.healthy().why == "no patch waits for this boot to be healthy"
    assert unfinished(machine) == []
    assert [row.result for row in lines(machine, "a")] == ["", "interrupted"]
    for ask in (machine.uninstall, machine.chosen):
        killed_before(machine, "uninstall", "a")
        with pytest.raises(UsageError, match="x is not installed"):
            ask(["x"])
        assert unfinished(machine) == []
    looking(monkeypatch, lambda path: candidate(path, "bad"))
    killed_before(machine, "install", "a")
    assert machine.install(["a"])[0].result is Result.REFUSED
    assert unfinished(machine) == []


def test_healthy_closes_what_was_killed_whatever_it_answers(machine: Installer) -> None:
    store = stored(machine, "a")
    for boot, result in (("former-boot", Result.DONE), ("this-boot", Result.REFUSED)):
        persistence.arm(store, boot, 0)
        (machine.place.proc / "sys/kernel/tainted").write_text("128\n")
        killed_before(machine)
        assert machine.boot.healthy().result is result
        assert unfinished(machine) == []
    killed_before(machine)
    (store.folder / "index.json").write_text("{")
    with pytest.raises(Refused):
        machine.boot.healthy()
    assert unfinished(machine) == []


def test_what_goes_on_is_not_taken_for_killed(machine: Installer) -> None:
    """Nor is it waited for where nothing is to be done."""
    killed_before(machine)
    with another(machine.place, 1.5):
        began = time.monotonic()
        machine.boot.healthy()
        assert time.monotonic() - began < 1
        with pytest.raises(Refused):
            machine.uninstall(["x"])
        assert unfinished(machine) == [("load", "k")]


def test_load_all_with_nothing_to_do_closes_its_own(
    machine: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(act, "require_power", lambda *_: None)
    stored(machine, "a")
    folder = machine.place.livepatch / "a"
    folder.mkdir()
    (folder / "enabled").write_text("1\n")
    (folder / "transition").write_text("0\n")
    killed_before(machine, "load", "--all")
    assert [row.result for row in machine.boot.load_all(Following())] == [Result.DONE]
    assert unfinished(machine) == []


class Cut(BaseException):
    """kill -9: nothing is written down any more."""


def killing(name: str, *, after: bool) -> pytest.MonkeyPatch:
    """A run of kmend is killed before or after that function; ``undo`` of the answer ends it."""
    patched = pytest.MonkeyPatch()
    real = getattr(persistence, name)

    def wrapped(*args: object) -> None:
        if after:
            real(*args)
        raise Cut

    patched.setattr(persistence, name, wrapped)
    patched.setattr(Action, "end", lambda *_args, **_more: None)
    return patched


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("verb", ["install", "uninstall", "healthy", "load"])
def test_who_changes_the_store_is_in_the_journal_before(
    machine: Installer, enabling: list[object], verb: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(act, "require_power", lambda *_: None)
    store = stored(machine, *(() if verb == "install" else ("a", "b")))
    names, boots = ("a", "b"), {"healthy": "this-boot", "load": "former-boot"}
    if verb in boots:
        persistence.arm(store, boots[verb], 4096)
    for name in names if verb == "load" else ():
        (machine.place.livepatch / name).mkdir()
        (machine.place.livepatch / name / "enabled").write_text("1\n")
        (machine.place.livepatch / name / "transition").write_text("0\n")
    what = {"install": "commit", "uninstall": "drop", "healthy": "disarm", "load": "disarm"}[verb]

    def work() -> object:
        match verb:
            case "install":
                return machine.install(["a", "b"])
            case "uninstall":
                return machine.uninstall(["a", "b"])
            case "load":
                return machine.boot.load_all(Following(), retry=True)
            case _:
                return machine.boot.healthy()

    killed = killing(what, after=after)
    with pytest.raises(Cut):
        work()
    killed.undo()
    about = ["--all"] if verb == "load" else ["a", "b"]
    assert unfinished(machine) == [(verb, name) for name in about]
    work()  # the same command again
    assert unfinished(machine) == []
    assert persistence.read_attempt(machine.config.state, RELEASE) is None
    there = () if verb == "uninstall" else (RELEASE,)
    assert tuple(row.release for row in machine.stores()) == there
    again = () if verb in boots and after else ("", "done")
    assert [row.result for row in lines(machine, about[0])] == ["", "interrupted", *again]


@pytest.mark.parametrize("names", [["a"], []])
def test_uninstall_goes_on_with_what_a_killed_one_has_taken_out(machine: Installer, names: list[str]) -> None:
    stored(machine, "a")
    killed = killing("drop", after=True)
    with pytest.raises(Cut):
        machine.uninstall(names)
    killed.undo()
    folder = machine.config.state / RELEASE
    (folder / "a.0123456789abcdef.ko").write_text("it was killed before it had swept")
    with pytest.raises(UsageError):
        machine.uninstall(["a"], "6.1.0-54-amd64")  # that is another store
    assert machine.chosen(names) == ["a"]
    (report,) = machine.uninstall(names)
    assert (report.patch, report.result) == ("a", Result.DONE)
    assert report.why.endswith("boots: what was interrupted had taken it out")
    assert [path.name for path in folder.iterdir()] == ["index.json"]
    assert machine.uninstall([]) == ()
    with pytest.raises(UsageError):  # from then on it is as unknown as any other
        machine.uninstall(["a"])


def test_uninstall_may_be_killed_between_two_ends(machine: Installer) -> None:
    stored(machine, "a", "b")
    real = Action.end

    def end(self: Action, *args: Any, **more: Any) -> None:
        if self.patch == "b":
            raise Cut
        real(self, *args, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Action, "end", end)
        patched.setattr(storing.Begun, "broken", lambda *_: None)
        with pytest.raises(Cut):
            machine.uninstall(["a", "b"])
    assert unfinished(machine) == [("uninstall", "b")]
    assert [row.result for row in machine.uninstall(["a", "b"])] == [Result.DONE, Result.DONE]
    assert unfinished(machine) == []
    with pytest.raises(UsageError):
        machine.uninstall(["a"])


def test_what_is_stopped_while_the_store_changes_has_its_end(
    machine: Installer, enabling: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(machine, "a")
    real = persistence.drop

    def stopped(*args: Any) -> None:
        real(*args)
        assert not journal.is_free(machine.place)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(persistence, "drop", stopped)
        machine.uninstall(["a"])
    assert [row.result for row in lines(machine, "a")] == ["", "interrupted"]
    assert [row.result for row in machine.uninstall(["a"])] == [Result.DONE]

    def full(*_: object) -> None:
        raise Failed("it cannot be written", why="the disk is full", rule="unwritable")

    monkeypatch.setattr(persistence, "commit", full)
    with pytest.raises(Failed):
        machine.install(["b"])
    (begin, end) = lines(machine, "b")
    assert (begin.event, begin.id, end.result, end.detail["rules"]) == (
        "begin",
        end.id,
        "failed",
        ["unwritable"],
    )


def test_what_was_killed_in_the_store_says_nothing_about_the_kernel(machine: Installer) -> None:
    """Else `unload` would say that it had taken the patch back, and `load` forget what it goes on with."""
    book, by = Journal(machine.config.state, "this-boot"), who(machine.place, "")
    (machine.place.livepatch / "a").mkdir()
    (machine.place.livepatch / "a/enabled").write_text("1\n")
    (machine.place.livepatch / "a/transition").write_text("0\n")
    for verb in ("install", "uninstall", "healthy"):
        book.begin(verb, "a", by, "", {"release": RELEASE})
    assert journal.resumable(book.records(), "this-boot") == ()
    assert machine.boot._here(read_kernel(machine.place))["a"].settled
    book.begin("load", "a", by, "", {}).end("interrupted", "")
    book.begin("install", "a", by, "", {"release": RELEASE}).end("done", "")
    assert [row.verb for row in journal.resumable(book.records(), "this-boot")] == ["load"]
    assert not machine.boot._here(read_kernel(machine.place))["a"].settled


@pytest.mark.parametrize(
    ("verb", "name", "release", "command", "told"),
    [
        (
            "install",
            "a",
            RELEASE,
            "install",
            f"`kmend install --list` shows whether a is installed for {RELEASE}",
        ),
        ("uninstall", "a", RELEASE, "uninstall a", f"shows whether a is installed for {RELEASE}"),
        ("uninstall", "a", "6.1.0-54-amd64", "uninstall a --kernel 6.1.0-54-amd64", "for 6.1.0-54-amd64"),
        ("healthy", "a", RELEASE, "healthy", "the next boot may leave a off"),
        ("load", "--all", RELEASE, "load --all --retry", "the next boot may leave the installed patches off"),
    ],
)
def test_status_says_how_to_go_on_with_what_was_killed_in_the_store(
    machine: Installer, verb: str, name: str, release: str, command: str, told: str
) -> None:
    """What is in the kernel is no matter then, and `kmend unload` would finish nothing."""
    book = Journal(machine.config.state, "this-boot")
    book.begin(verb, name, who(machine.place, ""), "", {"release": release} if verb != "load" else {})
    (row,) = book.records()
    text = unfinished_text(row, Seen(read_kernel(machine.place), (), (), None, (row,), False))
    assert text.startswith(f"an action did not end: `kmend {command}` of ")
    assert text.endswith(f"{told}. Run it again to finish it")
    assert "unload" not in text


def test_status_says_what_has_become_of_a_patch_whose_action_was_killed(machine: Installer) -> None:
    book = Journal(machine.config.state, "this-boot")
    book.begin("load", "a", who(machine.place, ""), "", {"file": "/root/a file.ko"})
    (row,) = book.records()
    text = unfinished_text(row, Seen(read_kernel(machine.place), (), (), None, (row,), False))
    assert text == (
        f"an action did not end: `kmend load '/root/a file.ko'` of {row.user} (process {row.pid}) was "
        "killed; a: it is not loaded now. Run it again to finish it, or `kmend unload a`"
    )


# -- in a chroot -------------------------------------------------------------------------------------


def test_without_sys_what_the_kernel_allows_is_not_checked(
    machine: Installer, enabling: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.ko").write_bytes(b"a")
    file = candidate("a").module
    monkeypatch.setattr(candidates, "read_module_file", lambda *_: file)
    monkeypatch.setattr(examine, "read_module_file", lambda *_: file)
    monkeypatch.setattr(candidates, "read", lambda *_: None)
    monkeypatch.setattr(candidates, "look", look)
    shutil.rmtree(machine.place.sys / "kernel/livepatch")
    with pytest.raises(Unable) as error:  # such a kernel would refuse it at boot, too
        machine.install([str(tmp_path / "a.ko")])
    assert error.value.rule == "no-livepatch"
    shutil.rmtree(machine.place.sys)
    for _ in range(2):
        (report,) = machine.install([str(tmp_path / "a.ko")])
        assert report.result is Result.DONE
        rows = [row for row in report.checks if row.name in LASTING]
        why = f"{machine.place.sys} is not mounted"
        assert rows == [Check(name, None, why) for name in LASTING]
        machine.place.sys.mkdir(exist_ok=True)
    assert [row.name for store in machine.stores() for row in store.patches] == ["a"]


# -- for several kernels -----------------------------------------------------------------------------

OTHER = "6.1.0-54-amd64"


@pytest.fixture
def both(machine: Installer, enabling: list[object], monkeypatch: pytest.MonkeyPatch) -> Installer:
    """`one` is for the running kernel, `two` and `three` for another; `old` is installed for both."""
    rows = {"one": RELEASE, "two": OTHER, "three": OTHER}
    looking(monkeypatch, lambda path: candidate(path, release=rows[path]))
    for release in (RELEASE, OTHER):
        empty = Store(persistence.release_of(release), machine.config.state / release, ())
        persistence.add(empty, [module("old")])
    return machine


def installed(machine: Installer) -> dict[str, list[str]]:
    """What is installed; nothing else lies there."""
    found = machine.stores()
    for store in found:
        named = {row.file for row in store.patches} | {row.report for row in store.patches} - {""}
        assert {path.name for path in store.folder.iterdir()} == named | {"index.json"}
    return {store.release: [row.name for row in store.patches] for store in found}


def failing(monkeypatch: pytest.MonkeyPatch, release: str, ending: str) -> None:
    """The disk is full when such a file of that release is written."""
    real = persistence.write_atomically

    def write(path: Path, data: bytes) -> None:
        if path.parent.name == release and path.name.endswith(ending):
            raise Failed(f"{path} cannot be written", why="No space left on device", rule="unwritable")
        real(path, data)

    monkeypatch.setattr(persistence, "write_atomically", write)


@pytest.mark.parametrize(("release", "ending"), [(OTHER, ".ko"), (RELEASE, ".ko")])
def test_a_disk_that_gets_full_changes_no_store(
    both: Installer, release: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, release, ending)
    with pytest.raises(Failed) as error:
        both.install(["one", "two", "three"])
    assert error.value.what == f"{both.config.state / release} cannot be written"
    assert installed(both) == {RELEASE: ["old"], OTHER: ["old"]}
    for name in ("one", "two", "three"):
        assert [row.result for row in lines(both, name)] == ["", "failed"]


def test_the_first_index_that_cannot_be_written_ends_it(
    both: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, RELEASE, "index.json")
    with pytest.raises(Failed):
        both.install(["one", "two", "three"])
    assert {store.release: len(store.patches) for store in both.stores()} == {RELEASE: 1, OTHER: 1}
    assert [row.result for row in lines(both, "two")] == ["", "failed"]


def test_a_later_index_that_cannot_be_written_is_told_of_its_patches_alone(
    both: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        failing(patched, OTHER, "index.json")
        found = both.install(["one", "two", "three"])
    assert [(row.patch, row.result) for row in found] == [
        ("one", Result.DONE),
        ("two", Result.FAILED),
        ("three", Result.FAILED),
    ]
    assert found[1].why == f"two was not installed for {OTHER}"
    assert [row.rule for row in found[1].refused] == ["unwritable"]
    assert [row.result for row in lines(both, "one")] == ["", "done"]
    for name in ("two", "three"):
        (_, end) = lines(both, name)
        assert (end.result, end.detail["rules"]) == ("failed", ["unwritable"])
    assert {row.release: len(row.patches) for row in both.stores()} == {RELEASE: 2, OTHER: 1}
    both.install(["one", "two", "three"])  # and the same command again puts it right
    assert installed(both) == {RELEASE: ["old", "one"], OTHER: ["old", "two", "three"]}
