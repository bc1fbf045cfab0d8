"""healthy and load --all at boot: whom they wait for, what they refuse, what they ask."""

from __future__ import annotations

from pathlib import Path

import pytest
from installing import another, candidate, lines, looking, stored
from test_persistence import RELEASE, module

from kmend import boot as booting
from kmend.action import Following
from kmend.boot import Boot
from kmend.cli import main
from kmend.cli.install import boot_document, boot_text
from kmend.core.errors import Failed, Refusal, Refused, UsageError
from kmend.core.live import ActionReport, Result
from kmend.core.progress import Silent
from kmend.installer import Installer
from kmend.manager import Manager
from kmend.runtime import act, persistence
from kmend.runtime.journal import Journal, who
from kmend.runtime.persistence import Store

# -- waiting for who acts --------------------------------------------------------------------------


class Told(Silent):
    """Keeps the steps."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)


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


# -- what was refused leaves its trace ---------------------------------------------------------------


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
