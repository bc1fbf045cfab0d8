"""install, uninstall, healthy, load --all: what they say of the store, without a kernel to be patched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from installing import another, answer, candidate, lines, looking, stored
from test_persistence import RELEASE, module

from kmend import candidate as candidates
from kmend import examine, installer
from kmend.action import Following
from kmend.candidate import LASTING, look
from kmend.cli import install as cli_install
from kmend.cli import main
from kmend.cli.install import boot_document, boot_text
from kmend.core.errors import Failed, Refusal, Refused, Unable, UsageError
from kmend.core.files import write_atomically
from kmend.core.live import ActionReport, Check, Result
from kmend.installer import UNIT, Installer
from kmend.runtime import act, journal, persistence
from kmend.runtime.journal import Journal, who
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.persistence import Store
from kmend.runtime.place import Place


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

    def write(path: Path, data: bytes) -> None:
        if path.parent.name == release and path.name.endswith(ending):
            raise Failed(f"{path} cannot be written", why="No space left on device", rule="unwritable")
        write_atomically(path, data)

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
