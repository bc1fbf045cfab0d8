"""install, uninstall, healthy and load --all that are killed or stopped: what the next one finds and does."""

from __future__ import annotations

import time
from typing import Any

import pytest
from installing import another, candidate, lines, looking, stored
from test_persistence import RELEASE

from kmend import storing
from kmend.action import Following
from kmend.cli.status import unfinished_text
from kmend.core.errors import Failed, Refused, UsageError
from kmend.core.live import Result
from kmend.installer import Installer
from kmend.runtime import act, journal, persistence
from kmend.runtime.journal import Action, Journal, who
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.observe import Seen

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
