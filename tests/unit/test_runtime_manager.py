"""The manager's decisions on a machine of files: what it refuses, what it goes on with, how a stall ends."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kmend import action
from kmend.action import Choice, Following, OnStall
from kmend.core import kmsg
from kmend.core.config import Config
from kmend.core.errors import Failed, Unable, UsageError
from kmend.core.live import ActionReport, End, Followed, Phase, Result
from kmend.core.progress import Silent
from kmend.manager import Manager
from kmend.runtime import act, journal, klog, observe
from kmend.runtime.follow import Patience
from kmend.runtime.journal import Journal
from kmend.runtime.place import Place
from kmend.runtime.preflight import ModuleFile


def write(path: Path, contents: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(contents)


class Machine:
    """Files of a kernel that has one patch, and what is done to it."""

    def __init__(self, root: Path) -> None:
        self.place = Place(root / "sys", root / "proc", root / "dev", root / "run")
        self.state = root / "state"
        self.done: list[str] = []
        self.ends: list[End] = []
        self.goals: list[Phase] = []
        self.choices: list[Choice] = []
        for name, value in (("osrelease", "6.1.0"), ("random/boot_id", "b"), ("tainted", "0")):
            write(self.place.proc / "sys/kernel" / name, value)
        write(self.place.proc / "modules", "fix 1 1 - Live 0x0\n")
        self.place.livepatch.mkdir(parents=True)
        self.place.run.mkdir()

    def patch(self, enabled: int = 1, transition: int = 0) -> None:
        write(self.place.livepatch / "fix/enabled", f"{enabled}\n")
        write(self.place.livepatch / "fix/transition", f"{transition}\n")
        self.left()

    def left(self) -> None:
        write(self.place.module("fix") / "initstate", "live\n")
        write(self.place.module("fix") / "taint", "OEK\n")
        write(self.place.module("fix") / "refcnt", "0\n")

    def manager(self) -> Manager:
        config = Config(Path("/none"), self.state, 1, "")
        return Manager(config, Silent(), place=self.place, ask=lambda _last: self.choices.pop(0))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The kernel's side is written down; transitions end as ``ends`` says."""
    made = Machine(tmp_path)

    def enabled(_place: Place, name: str, value: bool, _messages: object) -> bool:
        made.done.append(f"{name} {'1' if value else '0'}")
        return True

    class Follower:
        def __init__(
            self, _place: Place, _name: str, goal: Phase, patience: Patience, _p: object, **_more: object
        ) -> None:
            made.goals.append(goal)
            self.patience = patience

        def run(self) -> Followed:
            return Followed(made.ends.pop(0), self.patience.limit)

    monkeypatch.setattr(act, "require_power", lambda *_: None)
    monkeypatch.setattr(act, "set_enabled", enabled)
    monkeypatch.setattr(act, "force", lambda _p, name, _m: made.done.append(f"{name} force"))
    monkeypatch.setattr(act, "remove", lambda _p, name, **_: made.done.append(f"rmmod {name}"))
    monkeypatch.setattr(action, "Follower", Follower)
    return made


def test_unload_disables_follows_and_removes(machine: Machine) -> None:
    machine.patch()
    machine.ends = [End.COMPLETE]
    report = machine.manager().unload("fix", Following())
    assert (report.result, machine.done) == (Result.DONE, ["fix 0", "rmmod fix"])
    assert machine.goals == [Phase.UNPATCHING]
    rows = Journal(machine.state, "b").records()
    assert rows[0].event == "begin"
    assert (rows[-1].event, rows[-1].result) == ("end", "done")


@pytest.mark.parametrize(
    ("enabled", "transition", "done"),
    [
        (1, 1, ["fix 0", "rmmod fix"]),  # patching: turned round
        (0, 1, ["rmmod fix"]),  # being taken back already: gone on with
    ],
)
def test_unload_in_a_transition(machine: Machine, enabled: int, transition: int, done: list[str]) -> None:
    machine.patch(enabled, transition)
    machine.ends = [End.COMPLETE]
    assert machine.manager().unload("fix", Following()).result is Result.DONE
    assert machine.done == done


def test_what_is_left_of_a_patch_is_removed_without_more(machine: Machine) -> None:
    machine.left()
    assert machine.manager().unload("fix", Following()).result is Result.DONE
    assert machine.done == ["rmmod fix"]


def test_a_patch_that_does_not_go_stays_as_it_was(machine: Machine) -> None:
    machine.patch()
    (machine.place.livepatch / "fix/enabled").write_text("0\n")
    (machine.place.livepatch / "fix/transition").write_text("1\n")
    machine.ends = [End.STALLED, End.COMPLETE]
    report = machine.manager().unload("fix", Following(patience=Patience(limit=3)))
    assert report.result is Result.REVERSED
    assert [row.rule for row in report.refused] == ["transition-stalled"]
    assert machine.done == ["fix 1"]
    assert machine.goals == [Phase.UNPATCHING, Phase.PATCHING]
    assert report.followed[1].seconds == 60.0  # the way back gets its time
    machine.ends = [End.STALLED, End.STALLED]
    report = machine.manager().unload("fix", Following())
    assert (report.result, len(report.refused)) == (Result.STALLED, 2)


def test_one_that_ended_at_the_last_moment_is_not_turned_round(machine: Machine) -> None:
    machine.patch(0, 1)

    def gone() -> End:
        for name in ("enabled", "transition"):
            (machine.place.livepatch / "fix" / name).unlink()
        return End.STALLED

    class Ends(list[End]):
        def pop(self, _at: object = 0) -> End:
            return gone() if (machine.place.livepatch / "fix/enabled").exists() else End.COMPLETE

    machine.ends = Ends()
    report = machine.manager().unload("fix", Following())
    assert (report.result, machine.done) == (Result.DONE, ["rmmod fix"])


@pytest.mark.parametrize(
    ("choices", "ends", "result"),
    [
        ([Choice.LEAVE], [End.STALLED], Result.PENDING),
        ([Choice.WAIT, Choice.WAIT], [End.STALLED, End.STALLED, End.COMPLETE], Result.DONE),
        ([Choice.REVERSE], [End.STALLED, End.COMPLETE], Result.REVERSED),
    ],
)
def test_who_is_asked_decides(
    machine: Machine, choices: list[Choice], ends: list[End], result: Result
) -> None:
    machine.patch(0, 1)
    machine.choices, machine.ends = choices, ends
    report = machine.manager().unload("fix", Following(on_stall=OnStall.ASK))
    assert report.result is result


@pytest.mark.parametrize(
    ("act_on", "rule"),
    [
        (lambda m: m.enable("fix", Following()), "not-enabled-again"),
        (lambda m: m.force("fix", confirmed=True), "no-transition"),
        (lambda m: m.signal("fix"), "no-transition"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    machine: Machine, act_on: Callable[[Manager], object], rule: str
) -> None:
    machine.left()
    report = act_on(machine.manager())
    assert isinstance(report, ActionReport)
    assert [row.rule for row in report.refused] == [rule]
    assert machine.done == []


@pytest.mark.parametrize(
    ("ends", "goals", "result", "rule"),
    [
        ([End.REVERSED, End.COMPLETE], [Phase.UNPATCHING, Phase.PATCHING], Result.FAILED, "turned-round"),
        (
            [End.REVERSED, End.REVERSED, End.COMPLETE],  # they changed their mind
            [Phase.UNPATCHING, Phase.PATCHING, Phase.UNPATCHING],
            Result.DONE,
            None,
        ),
        ([End.REVERSED, End.STALLED], [Phase.UNPATCHING, Phase.PATCHING], Result.STALLED, "turned-round"),
        ([End.REVERSED, End.GONE], [Phase.UNPATCHING, Phase.PATCHING], Result.FAILED, "taken-away"),
    ],
)
def test_what_somebody_else_turns_round_is_followed_and_told(
    machine: Machine, ends: list[End], goals: list[Phase], result: Result, rule: str | None
) -> None:
    machine.patch(0, 1)
    machine.ends = ends
    report = machine.manager().unload("fix", Following())
    assert (report.result, machine.goals) == (result, goals)
    assert [row.rule for row in report.refused][:1] == ([rule] if rule else [])
    assert Journal(machine.state, "b").records()[-1].event == "end"
    assert machine.done == (["rmmod fix"] if result is Result.DONE else [])


KINDS = ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch")


def loaded_with_callbacks(machine: Machine) -> None:
    """As if kmend had loaded the patch; its second object is there, its third is not."""
    write(machine.place.module("ext4") / "initstate", "live\n")
    known = [(name, {kind: f"{name}_{kind}" for kind in KINDS}) for name in ("vmlinux", "ext4", "nfsd")]
    by = journal.Who("root", "", 1, "kmend")
    Journal(machine.state, "b").begin("load", "fix", by, "", {"callbacks": known}).end("done", "")


@pytest.mark.parametrize(
    ("state", "verb", "ends", "kinds"),
    [
        ((1, 0), "disable", [End.COMPLETE], ["pre_unpatch", "post_unpatch"]),
        # turning a transition round calls nothing; its end does (klp_reverse_transition())
        ((1, 1), "disable", [End.COMPLETE], ["post_unpatch"]),
        ((0, 1), "enable", [End.COMPLETE], ["post_patch"]),
        ((0, 1), "disable", [End.REVERSED, End.COMPLETE], ["post_patch"]),
    ],
)
def test_which_callbacks_were_called(
    machine: Machine, state: tuple[int, int], verb: str, ends: list[End], kinds: list[str]
) -> None:
    machine.patch(*state)
    loaded_with_callbacks(machine)
    machine.ends = ends
    report = getattr(machine.manager(), verb)("fix", Following())
    assert report.callbacks == tuple(
        f"{kind} of {name}: {name}_{kind}()" for kind in kinds for name in ("vmlinux", "ext4")
    )


def test_callbacks_of_a_patch_that_somebody_else_loaded_are_not_known(machine: Machine) -> None:
    machine.patch()
    machine.ends = [End.COMPLETE]
    assert machine.manager().disable("fix", Following()).callbacks is None


@pytest.mark.parametrize(
    ("cumulative", "words"),
    [(True, "kmend load {file}"), (False, "kmend unload fix && kmend load {file}")],
)
def test_the_way_back_to_what_was_replaced(
    machine: Machine, tmp_path: Path, cumulative: bool, words: str
) -> None:
    """Only as long as the file is what was loaded."""
    file = tmp_path / "old.ko"
    file.write_bytes(b"old")
    detail = {"file": str(file), "sha256": hashlib.sha256(b"old").hexdigest(), "replace": cumulative}
    book = Journal(machine.state, "b")
    book.begin("load", "old", journal.Who("root", "", 1, "kmend"), "", detail).end("done", "")
    book.begin("load", "fix", journal.Who("root", "", 1, "kmend"), "", {"replace": True})
    machine.patch(1, 1)
    write(machine.place.livepatch / "old/enabled", "1\n")
    write(machine.place.livepatch / "old/transition", "0\n")
    write(machine.place.proc / "modules", "fix 1 1 - Live 0x0\nold 1 1 - Live 0x0\n")

    class Ends(list[End]):
        def pop(self, _at: object = 0) -> End:
            for name in ("enabled", "transition"):
                (machine.place.livepatch / "old" / name).unlink(missing_ok=True)
            return End.COMPLETE

    machine.ends = Ends()
    report = machine.manager().enable("fix", Following())
    assert report.result is Result.DONE
    assert report.replaced == ("old",)
    assert report.next_step == f"to go back to old: {words.format(file=file)}"


def test_who_forces_is_shown_which_task_is_in_which_function(machine: Machine) -> None:
    machine.patch(1, 1)
    (machine.place.livepatch / "fix/vmlinux/f,1").mkdir(parents=True)
    write(machine.place.proc / "self/patch_state", "1\n")
    for number in range(30, 55):
        task = machine.place.proc / f"{number}/task/{number}"
        write(task / "stat", f"{number} (reader) S 1 1 1 0 -1 0 0 0")
        write(task / "patch_state", "0\n")
        write(task / "stack", "[<0>] f+0x1/0x9\n")
    (row,) = machine.manager().force("fix", confirmed=False).refused
    assert row.what == "fix was not forced: 25 tasks left, in f()"
    named = row.why.splitlines()
    assert named[0] == "30 (reader) sleeps inside f()"
    assert (named[20], len(named)) == ("… and 5 more (kmend blockers)", 22)
    assert named[21].startswith("forcing lets these tasks go on in code that does not fit")
    machine.ends = [End.COMPLETE]
    steps = [row.text for row in machine.manager().force("fix", confirmed=True).steps]
    assert steps[0] == "left: 30 (reader) sleeps inside f()"
    assert steps[-1] == "forced 25 tasks"


def test_force_is_remembered_in_the_journal(machine: Machine) -> None:
    machine.patch(1, 1)
    assert machine.manager().force("fix", confirmed=False).result is Result.REFUSED
    assert machine.done == []
    machine.ends = [End.COMPLETE]
    assert machine.manager().force("fix", confirmed=True).result is Result.DONE
    assert machine.done == ["fix force"]
    machine.patch(1, 0)
    seen = observe.observe(machine.place, machine.state)
    assert [row.forced for row in seen.patches] == [True]


def test_a_killed_one_is_written_down_by_the_next(machine: Machine) -> None:
    machine.patch()
    manager = machine.manager()
    interrupted = journal.who(machine.place, "kmend unload fix")
    Journal(machine.state, "b").begin("unload", "fix", replace(interrupted, pid=1), "it is enabled", {})
    assert [row.verb for row in observe.observe(machine.place, machine.state).unfinished] == ["unload"]
    machine.ends = [End.COMPLETE]
    manager.unload("fix", Following())
    assert observe.observe(machine.place, machine.state).unfinished == ()
    ends = [row for row in Journal(machine.state, "b").records() if row.event == "end"]
    assert [row.result for row in ends] == ["interrupted", "done"]


def test_an_unload_that_was_killed_after_its_work_is_at_its_end(machine: Machine) -> None:
    by = journal.who(machine.place, "kmend unload fix")
    Journal(machine.state, "b").begin("unload", "fix", by, "it is enabled", {})
    report = machine.manager().unload("fix", Following())
    assert (report.result, machine.done) == (Result.DONE, [])
    assert observe.observe(machine.place, machine.state).unfinished == ()
    with pytest.raises(UsageError):  # from then on it is as unknown as any other
        machine.manager().unload("fix", Following())
    Journal(machine.state, "b").begin("unload", "fix", by, "it is enabled", {})
    machine.manager().close_killed("unload --all")
    assert observe.observe(machine.place, machine.state).unfinished == ()


def left_behind(machine: Machine, name: str, references: int) -> None:
    """Its folder is gone, its module is there."""
    write(machine.place.module(name) / "initstate", "live\n")
    write(machine.place.module(name) / "taint", "OEK\n")
    write(machine.place.module(name) / "refcnt", f"{references}\n")
    for file in (machine.place.livepatch / name).glob("*"):
        file.unlink()
    (machine.place.livepatch / name).rmdir()


def other_patch(machine: Machine) -> None:
    write(machine.place.livepatch / "old/enabled", "1\n")
    write(machine.place.livepatch / "old/transition", "0\n")
    write(machine.place.proc / "modules", "fix 1 1 - Live 0x0\nold 1 1 - Live 0x0\n")


@pytest.mark.parametrize(
    ("state", "gone", "pins"),
    [
        # klp_force_transition(): into force it pins nothing of its own, out of force it pins itself
        ((1, 1), ("fix", 0), {"fix": ""}),
        ((0, 1), ("fix", 1), {"fix": "fix"}),
        # a patch that it replaced stays; one that stayed enabled and went later in the ordinary way does not
        ((1, 1), ("old", 1), {"old": "fix"}),
        ((1, 1), ("old", 0), {"old": ""}),
    ],
)
def test_what_a_forced_transition_pins(
    machine: Machine, state: tuple[int, int], gone: tuple[str, int], pins: dict[str, str]
) -> None:
    machine.patch(*state)
    other_patch(machine)
    machine.ends = [End.COMPLETE]
    assert machine.manager().force("fix", confirmed=True).result is Result.DONE
    left_behind(machine, *gone)
    seen = observe.observe(machine.place, machine.state)
    assert {row.name: row.pinned_by for row in seen.left} == pins
    machine.done.clear()
    report = machine.manager().unload(gone[0], Following())
    if pins[gone[0]]:
        assert ([row.rule for row in report.refused], machine.done) == (["module-in-use"], [])
    else:
        assert (report.result, machine.done) == (Result.DONE, [f"rmmod {gone[0]}"])


def test_a_patch_that_is_loaded_afresh_was_not_forced(machine: Machine) -> None:
    machine.patch(1, 1)
    machine.ends = [End.COMPLETE]
    machine.manager().force("fix", confirmed=True)
    by = journal.Who("root", "", 1, "kmend")
    Journal(machine.state, "b").begin("load", "fix", by, "", {}).end("done", "")
    assert [row.forced for row in observe.observe(machine.place, machine.state).patches] == [False]


BACK = ("'fix': starting unpatching transition",)
FORCING = "livepatch: forcing remaining tasks to the patched state"


@pytest.mark.parametrize(
    ("lines", "forced", "pinned_by"),
    [
        (["'fix': starting patching transition", FORCING], [True], "fix"),
        (["'fix': starting patching transition", FORCING, "enabling patch 'fix'"], [False], "fix"),
        (["'fix': starting unpatching transition", FORCING], [True], ""),
        (["'old': starting unpatching transition", FORCING], [False], "old"),
        (["'fix': starting patching transition", *BACK, FORCING], [True], ""),
    ],
)
def test_what_a_hand_forced_is_in_the_kernels_log(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, lines: list[str], forced: list[bool], pinned_by: str
) -> None:
    machine.patch()
    other_patch(machine)
    left_behind(machine, "old", 1)
    texts = [row if row.startswith("livepatch") else f"livepatch: {row}" for row in lines]
    rows = [klog.Record(at, kmsg.KernelMessage(float(at), 4, row)) for at, row in enumerate(texts)]

    def read(_place: Place, word: bytes = b"") -> tuple[klog.Record, ...]:
        return tuple(row for row in rows if word.decode() in row.message.text)

    monkeypatch.setattr(klog, "read_all", read)
    seen = observe.observe(machine.place, machine.state)
    assert [row.forced for row in seen.patches] == forced
    assert [row.pinned_by for row in seen.left] == [pinned_by]


def test_what_is_refused_is_in_the_journal(machine: Machine) -> None:
    machine.patch()
    machine.manager().force("fix", confirmed=True)
    (row,) = Journal(machine.state, "b").records()
    assert (row.event, row.verb, row.result) == ("end", "force", "refused")
    assert row.detail["rules"] == ["no-transition"]
    assert journal.unfinished([row], "b") == ()


class Stopped(list[End]):
    """Ctrl-C comes while the transition is followed."""

    def pop(self, _at: object = 0) -> End:
        raise KeyboardInterrupt


def test_the_same_command_goes_on_with_what_was_interrupted(machine: Machine) -> None:
    machine.patch()
    machine.ends = Stopped()
    with pytest.raises(KeyboardInterrupt):
        machine.manager().unload("fix", Following())
    for file in ("initstate", "taint", "refcnt"):
        (machine.place.module("fix") / file).unlink()
    for file in ("enabled", "transition"):
        (machine.place.livepatch / "fix" / file).unlink()
    report = machine.manager().unload("fix", Following())
    assert report.result is Result.DONE
    assert report.why == "fix is not loaded: the `kmend unload` that was interrupted has left nothing of it"
    with pytest.raises(UsageError):  # from then on it is as unknown as any other
        machine.manager().unload("fix", Following())


@pytest.mark.parametrize("result", ["interrupted", "pending"])
def test_what_the_same_command_goes_on_with(result: str, tmp_path: Path) -> None:
    book, by = Journal(tmp_path, "b"), journal.Who("root", "", 1, "kmend")
    book.begin("load", "fix", by, "", {}).end(result, "")
    assert [row.result for row in journal.resumable(book.records(), "b")] == [result]
    book.refused("load", "fix", by, "no", [])  # changes nothing
    assert [row.result for row in journal.resumable(book.records(), "b")] == [result]
    book.begin("signal", "fix", by, "", {}).end("done", "")  # nor does this, where the patch goes
    book.begin("signal", "fix", by, "", {})
    assert [(row.verb, row.result) for row in journal.resumable(book.records(), "b")] == [("load", result)]
    book.begin("disable", "fix", by, "", {}).end("done", "")
    assert journal.resumable(book.records(), "b") == ()


def test_a_stall_that_ends_before_it_is_turned_round_is_none(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.patch(0, 1)
    machine.ends = [End.STALLED]
    monkeypatch.setattr(act, "set_enabled", lambda *_: False)
    assert machine.manager().unload("fix", Following()).result is Result.DONE
    assert machine.done == ["rmmod fix"]
    machine.patch(0, 1)
    machine.ends = [End.STALLED, End.GONE]
    monkeypatch.setattr(act, "set_enabled", lambda *_: True)
    assert machine.manager().unload("fix", Following()).result is Result.DONE


def test_whoever_turns_the_way_back_round_is_told_of(machine: Machine) -> None:
    machine.patch(0, 1)
    machine.ends = [End.STALLED, End.REVERSED]
    report = machine.manager().unload("fix", Following())
    assert report.result is Result.STALLED
    assert [row.rule for row in report.refused] == ["transition-stalled", "turned-round"]
    assert "its unpatching goes on" in report.why


def test_waiting_on_is_waiting_without_an_end_also_at_a_terminal(machine: Machine) -> None:
    machine.patch(0, 1)
    machine.ends = [End.STALLED, End.COMPLETE]
    following = Following(on_stall=OnStall.WAIT, patience=Patience(limit=0))
    report = machine.manager().unload("fix", following)
    assert [row.seconds for row in report.followed] == [0, math.inf]
    machine.patch(0, 1)
    machine.ends, machine.choices = [End.STALLED, End.COMPLETE], [Choice.WAIT]
    following = Following(on_stall=OnStall.ASK, patience=Patience(limit=0))
    report = machine.manager().unload("fix", following)
    assert [row.seconds for row in report.followed] == [0, action.ASK_AGAIN]


def test_an_unknown_name(machine: Machine) -> None:
    with pytest.raises(UsageError) as error:
        machine.manager().unload("absent", Following())
    assert error.value.rule == "unknown-patch"
    assert not os.listdir(machine.place.livepatch)  # noqa: PTH208 - names alone


@pytest.mark.parametrize("verb", ["enable", "force", "signal"])
def test_what_changes_nothing_closes_what_a_killed_one_left_open(machine: Machine, verb: str) -> None:
    """Else `kmend status` would ask for the same command again for ever."""
    machine.patch()
    by = journal.who(machine.place, "kmend")
    Journal(machine.state, "b").begin(verb, "fix", replace(by, pid=1), "it is enabled", {})
    manager = machine.manager()
    match verb:
        case "enable":
            assert manager.enable("fix", Following()).result is Result.DONE
        case "force":
            assert manager.force("fix", confirmed=True).result is Result.REFUSED
        case _:
            assert manager.signal("fix").result is Result.REFUSED
    assert observe.observe(machine.place, machine.state).unfinished == ()


def test_an_error_before_an_action_has_begun_is_in_the_journal_too(machine: Machine, tmp_path: Path) -> None:
    manager = machine.manager()
    with pytest.raises(UsageError):
        manager.unload("nothing", Following())
    with pytest.raises(Failed):
        manager.load(str(tmp_path / "absent.ko"), Following())
    with pytest.raises(UsageError) as error:
        manager.load(str(tmp_path), Following())
    assert error.value.rule == "not-a-file"
    os.mkfifo(tmp_path / "fifo.ko")
    with pytest.raises(UsageError):  # and is not waited for
        manager.load(str(tmp_path / "fifo.ko"), Following())
    rows = Journal(machine.state, "b").records()
    assert [(row.verb, row.patch, row.result, row.detail["rules"]) for row in rows] == [
        ("unload", "nothing", "refused", ["unknown-patch"]),
        ("load", "absent", "refused", ["unreadable"]),
        ("load", tmp_path.name, "refused", ["not-a-file"]),
        ("load", "fifo", "refused", ["not-a-file"]),
    ]
    assert journal.unfinished(rows, "b") == ()


def test_what_this_machine_cannot_do_is_no_refusal_of_the_kernels(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.patch(0, 1)

    class Ends(list[End]):
        def pop(self, _at: object = 0) -> End:
            raise Unable("no such system call", rule="machine")

    machine.ends = Ends()
    with pytest.raises(Unable):
        machine.manager().unload("fix", Following())
    *_, last = Journal(machine.state, "b").records()
    assert (last.event, last.result, last.detail["rules"]) == ("end", "failed", ["machine"])


def test_what_somebody_turns_round_begins_where_it_did(machine: Machine) -> None:
    machine.patch(0, 1)

    class Slow(list[End]):
        def pop(self, at: object = 0) -> End:
            time.sleep(0.05)
            return super().pop(0)

    machine.ends = Slow([End.REVERSED, End.COMPLETE])
    report = machine.manager().unload("fix", Following())
    assert [row.began >= at for row, at in zip(report.followed, (0.0, 0.05), strict=True)] == [True, True]


def test_replaced_patches_are_waited_for(machine: Machine) -> None:
    """The kernel disables them, and removes their folders from a work queue."""
    machine.patch(1, 1)
    other_patch(machine)
    write(machine.place.livepatch / "old/enabled", "0\n")
    threading.Timer(0.2, left_behind, [machine, "old", 0]).start()
    seen = machine.manager()._after_replacing({"old"})
    assert [row.name for row in seen.patches] == ["fix"]
    assert [row.name for row in seen.left] == ["old"]


def gone_on_with(machine: Machine, **detail: object) -> ActionReport:
    """What comes of the same load again, when a run was killed that had this in the journal."""
    by = replace(journal.who(machine.place, "kmend"), pid=1)
    Journal(machine.state, "b").begin("load", "fix", by, "from fix.ko", {"sha256": "ab", **detail})
    file = ModuleFile("fix.ko", "fix", "6.1.0 ", "", (), False, "", "ab", (), True)
    manager = machine.manager()
    seen = manager._observe()
    there = seen.named("fix")
    assert there is not None
    report = manager._continue(there, file, seen.resumable, Following(), seen)
    assert report is not None
    return report


def test_a_patch_that_came_into_force_before_it_was_turned_round(machine: Machine) -> None:
    """The kernel then disables it, and what it has replaced does not come back."""
    machine.patch(1, 1)
    machine.ends = [End.STALLED, End.COMPLETE]
    report = gone_on_with(machine, before=["old"], replace=True)
    assert (report.result, report.replaced, machine.done) == (
        Result.REVERSED,
        ("old",),
        ["fix 0", "rmmod fix"],
    )
    assert report.why == (
        "fix came into force at the last moment, replaced old, and was taken back: none of them is in force "
        "any more"
    )


@pytest.mark.parametrize("gone", [True, False])
def test_one_that_is_unloaded_while_it_comes_into_force(machine: Machine, gone: bool) -> None:
    machine.patch(1, 1)
    other_patch(machine)
    if gone:

        class Ends(list[End]):
            def pop(self, _at: object = 0) -> End:
                shutil.rmtree(machine.place.livepatch / "old")
                return End.COMPLETE

        machine.ends = Ends()
    else:
        machine.ends = [End.COMPLETE]
    report = machine.manager().unload("fix", Following())
    assert (report.result, report.replaced) == (Result.DONE, ("old",) if gone else ())
    assert ("old, which it replaced, went with it" in report.why) is gone


def test_pinned_modules_are_the_last_to_be_unloaded(machine: Machine) -> None:
    machine.patch()
    write(machine.place.proc / "modules", "fix 1 1 - Live 0x0\nlate 1 1 - Live 0x0\nold 1 1 - Live 0x0\n")
    for name, references in (("late", 1), ("old", 0)):
        (machine.place.livepatch / name).mkdir()
        left_behind(machine, name, references)
    by = journal.who(machine.place, "kmend")
    forced = Journal(machine.state, "b").begin("force", "fix", by, "", {})
    forced.step("forced", forced="patching", pins=["late"])
    forced.end("done", "")
    assert machine.manager().loaded() == ("fix", "old", "late")


def test_what_moves_is_the_first_to_be_taken_back(machine: Machine) -> None:
    """The kernel makes one transition at a time."""
    machine.patch(0, 1)
    other_patch(machine)
    write(machine.place.proc / "modules", "old 1 1 - Live 0x0\nfix 1 1 - Live 0x0\n")
    assert [row.name for row in observe.observe(machine.place, machine.state).patches] == ["fix", "old"]
    assert machine.manager().loaded() == ("fix", "old")
    write(machine.place.livepatch / "fix/transition", "0\n")
    write(machine.place.livepatch / "fix/enabled", "1\n")
    assert machine.manager().loaded() == ("old", "fix")


def test_a_load_that_is_gone_on_with_knows_its_callbacks(machine: Machine) -> None:
    """Also the unload after it: what counts is the last load."""
    machine.patch(1, 1)
    machine.ends = [End.COMPLETE, End.COMPLETE]
    report = gone_on_with(machine, callbacks=[["vmlinux", {"post_patch": "ready"}]])
    assert (report.result, report.callbacks) == (Result.DONE, ("post_patch of vmlinux: ready()",))
    machine.patch(0, 1)
    assert machine.manager().unload("fix", Following()).callbacks == ()
