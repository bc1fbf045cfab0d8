"""A machine for install, uninstall, healthy and load --all, without a kernel to be patched."""

from __future__ import annotations

import json
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
from kmend import installer
from kmend.boot import Boot
from kmend.candidate import Candidate
from kmend.cli import main
from kmend.core.config import Config
from kmend.core.errors import Refusal
from kmend.core.live import Check
from kmend.core.progress import Silent
from kmend.installer import UNIT, Installer
from kmend.runtime import journal, persistence
from kmend.runtime.journal import Journal, Record, acting
from kmend.runtime.persistence import Store
from kmend.runtime.place import Place
from kmend.runtime.preflight import ModuleFile


def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
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


def enabled(machine: Installer, monkeypatch: pytest.MonkeyPatch) -> list[object]:
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
    monkeypatch.setattr(shutil, "which", lambda _name: "/bin/systemctl")
    looking(monkeypatch, candidate)
    return called


def lines(machine: Installer | Boot, name: str) -> list[Record]:
    """What the journal says of a patch."""
    return [row for row in Journal(machine.config.state, "").records() if row.patch == name]
