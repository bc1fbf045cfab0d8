"""install, uninstall, healthy, load --all: what they say of the store, without a kernel to be patched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_persistence import RELEASE, module

from kmend.cli import main
from kmend.cli.install import boot_document, boot_text
from kmend.core.config import Config
from kmend.core.errors import Refused, UsageError
from kmend.core.live import Result
from kmend.core.progress import Silent
from kmend.installer import UNIT, Installer
from kmend.manager import Following
from kmend.runtime import act, persistence
from kmend.runtime.journal import Journal, who
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.persistence import Store
from kmend.runtime.place import Place


@pytest.fixture
def machine(tmp_path: Path) -> Installer:
    """A machine with an empty state folder, on which nothing is loaded and systemd is not there."""
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
    return Installer(
        config, Silent(), place=place, off_file=tmp_path / "off", unit_folders=[tmp_path / "units"]
    )


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
    assert machine.healthy().result is Result.DONE  # nothing waits for it
    persistence.arm(store, "former-boot", 4096)
    assert "nothing changes" in machine.healthy().why
    assert persistence.read_attempt(machine.config.state, RELEASE) is not None
    persistence.arm(store, "this-boot", 4096)
    (machine.place.proc / "sys/kernel/tainted").write_text(f"{4096 | 128}\n")  # an oops since
    report = machine.healthy()
    assert (report.result, report.refused[0].rule) == (Result.REFUSED, "boot-unhealthy")
    assert persistence.read_attempt(machine.config.state, RELEASE) is not None
    (machine.place.proc / "sys/kernel/tainted").write_text(f"{4096 | 512}\n")  # a warning is no death
    assert machine.healthy().result is Result.DONE
    assert persistence.read_attempt(machine.config.state, RELEASE) is None


def test_an_oops_from_before_the_patches_does_not_count(machine: Installer) -> None:
    persistence.arm(stored(machine, "a"), "this-boot", 128)
    (machine.place.proc / "sys/kernel/tainted").write_text("128\n")
    assert machine.healthy().result is Result.DONE


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
    here = machine._here(read_kernel(machine.place))
    assert {name: row.settled for name, row in here.items()} == {
        "moving": False,
        "killed": False,
        "settled": True,
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
    (report,) = machine.load_all(Following())
    assert [row.rule for row in report.refused] == ["out-of-order"]
    assert "b" in report.next_step
    (folder / "replace").write_text("1\n")
    reports = machine.load_all(Following())
    assert [(row.patch, row.result, row.why) for row in reports] == [
        ("a", Result.DONE, "a is not loaded: b, which comes later, is cumulative"),
        ("b", Result.DONE, "b is in force already"),
    ]


def test_status_says_how_loading_at_boot_stands(machine: Installer) -> None:
    assert list(boot_text(machine.look())) == []
    store = stored(machine, "a", "b")
    assert list(boot_text(machine.look())) == ["loaded at boot: a, b"]
    persistence.arm(store, "former-boot", 0)
    machine.off_file.write_text("")
    text = "\n".join(boot_text(machine.look()))
    assert f"switched off by the file {machine.off_file}" in text
    assert "LEFT OFF: the boot of " in text
    assert "began to load a, b and was never found to be healthy" in text
    document = boot_document(machine.look())
    assert document is not None
    assert (document["guard"], document["trouble"]) == ("tripped", None)
    (store.folder / "index.json").write_text("{")
    assert "is damaged" in "\n".join(boot_text(machine.look()))
    with pytest.raises(Refused):
        machine.stores()


def test_the_unit_is_looked_for_where_systemd_looks(machine: Installer) -> None:
    (row,) = machine._enable_unit()
    assert (row.rule, UNIT in row.why) == ("no-boot-unit", True)
