"""`kmend log` over several boots: kmend's journal, /dev/kmsg of this one, systemd's journal of the others."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmend.core.errors import Unable
from kmend.core.kmsg import KernelMessage
from kmend.core.live import LogEntry
from kmend.report import live
from kmend.runtime import klog, observe
from kmend.runtime.journal import Journal, who
from kmend.runtime.observe import read_log
from kmend.runtime.place import Place

OLD, NEW = "0f3c6a52-7b1e-4d7b-9a86-3f2d11c0ffee", "1a2b3c4d-0000-4000-8000-00000000b00b"
#: The wall clock when the crashed kernel's log clock was 0, and by how much the journal was late.
BEGAN, LATE = 1_700_000_000_000_000, 4_000_000
PANIC = "Kernel panic - not syncing: kmend test: the patch went off"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A machine that has booted again, with what a load left in kmend's journal."""
    roots = Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")
    for name, text in (("sys/kernel/osrelease", "6.1.0-55-amd64"), ("sys/kernel/random/boot_id", NEW)):
        path = roots.proc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    roots.dev.mkdir()
    (roots.dev / "kmsg").write_text("6,1,5000000,-;livepatch: enabling patch 'new'\n")
    by = who(roots, "")
    Journal(tmp_path / "state", OLD).begin("load", "old", by, "from old.ko", {}).end("done", "in force")
    Journal(tmp_path / "state", NEW).begin("load", "new", by, "from new.ko", {}).end("done", "in force")
    return roots


def row(seconds: float, text: object, **more: object) -> str:
    """A line of journalctl: said at so many seconds of the kernel's clock, kept later."""
    said = int(seconds * 1e6)
    return json.dumps(
        {
            "MESSAGE": text,
            "PRIORITY": "4",
            "SYSLOG_FACILITY": "0",
            "_SOURCE_MONOTONIC_TIMESTAMP": str(said),
            "__MONOTONIC_TIMESTAMP": str(said + LATE),
            "__REALTIME_TIMESTAMP": str(BEGAN + said + LATE),
            **more,
        }
    )


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A journalctl that answers with the file `answer`, and keeps its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "journalctl"
    script.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" >>{tmp_path}/asked\ncat {tmp_path}/answer\n"
        f"cat {tmp_path}/errors >&2 2>/dev/null\n[ -s {tmp_path}/answer ]\n"
    )
    script.chmod(0o755)
    (tmp_path / "answer").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return tmp_path


def kernel(rows: tuple[LogEntry, ...], boot: str) -> list[str]:
    found = [entry for entry in rows if entry.source == "kernel"]
    return [entry.text for entry in found if entry.record is not None and entry.record["boot"] == boot]


def test_what_the_crashed_kernel_said_last_is_shown_in_its_boot(place: Place, journalctl: Path) -> None:
    (journalctl / "answer").write_text(
        "\n".join(
            [
                row(20.5, PANIC, PRIORITY="0"),
                row(1.5, "livepatch: enabling patch 'old'"),
                row(2.0, list(b"old: \xff tainting kernel")),
                row(2.5, "old: loud", SYSLOG_FACILITY="3"),
                row(3.0, "audit: BUG in somebody's text"),
                row(3.5, None),
                "no JSON",
                "[]",
            ]
        )
    )
    rows, notes = read_log(place, journalctl / "state")
    assert notes == ()
    said = ["livepatch: enabling patch 'old'", "old: \ufffd tainting kernel", PANIC]
    assert kernel(rows, OLD) == said
    assert kernel(rows, NEW) == ["livepatch: enabling patch 'new'"]
    (panic,) = (entry for entry in rows if entry.text == PANIC)
    assert panic.time == pytest.approx(BEGAN / 1e6 + 20.5)  # when it was said, not when it was kept
    assert panic.message is not None
    assert (panic.message.seconds, panic.message.level) == (20.5, 0)
    text = [live.log_line(entry).split("  ", 2)[2].strip() for entry in rows]
    assert text.index(f"---- boot {OLD}: old ----") < text.index(PANIC)
    assert text.index(PANIC) < text.index(f"---- this boot {NEW}: new ----")
    assert text.index(f"---- this boot {NEW}: new ----") < text.index("load new: in force [done]")
    asked = (journalctl / "asked").read_text().splitlines()
    assert f"--boot={OLD.replace('-', '')}" in asked
    assert not any(NEW.replace("-", "") in word for word in asked)
    assert f"--lines={klog.KEPT_LINES}" in asked


def test_a_death_in_this_boot_is_shown_too(place: Place, journalctl: Path) -> None:
    (place.dev / "kmsg").write_text(f"0,1,5000000,-;{PANIC}\n")
    rows, _ = read_log(place, journalctl / "state")
    assert kernel(rows, NEW) == [PANIC]


def test_without_journalctl_the_rest_is_shown(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    rows, notes = read_log(place, tmp_path / "state")
    assert notes == ()
    assert (kernel(rows, OLD), kernel(rows, NEW)) == ([], ["livepatch: enabling patch 'new'"])
    assert [entry.text for entry in rows if entry.text.startswith("load")] == [
        f"load {name}: {words}"
        for name in ("old", "new")
        for words in (f"from {name}.ko, by {who(place, '').login or 'root'}", "in force [done]")
    ]


def test_a_journal_that_does_not_know_the_boot_has_nothing_to_say(place: Place, journalctl: Path) -> None:
    (journalctl / "errors").write_text(
        f"Data from the specified boot ({OLD}) is not available: No such boot ID in journal\n"
    )
    assert read_log(place, journalctl / "state")[1] == ()
    (journalctl / "errors").write_text("Compiled without pattern matching support\n")
    (note,) = read_log(place, journalctl / "state")[1]
    assert note.endswith("what the kernels of former boots said is not shown")
    with pytest.raises(Unable, match="systemd's journal"):
        klog.kept(OLD)
    assert klog.kept("no boot's id") == ()


def test_few_former_boots_are_asked_about(place: Place, journalctl: Path) -> None:
    by = who(place, "")
    for number in range(9):
        boot = f"{number:032x}"
        Journal(journalctl / "state", boot).refused("load", "x", by, "no", ())
    read_log(place, journalctl / "state")
    asked = [word for word in (journalctl / "asked").read_text().splitlines() if word.startswith("--boot=")]
    assert asked == [f"--boot={number:032x}" for number in range(9 - observe._FORMER_BOOTS, 9)]


def test_one_boot_has_no_mark(tmp_path: Path, place: Place) -> None:
    (tmp_path / "state/log").unlink()
    rows, _ = read_log(place, tmp_path / "state")
    assert [entry.text for entry in rows] == ["livepatch: enabling patch 'new'"]


@pytest.mark.parametrize("off", [0.0, 300.0, -300.0])
def test_the_log_of_one_patch_has_what_the_kernel_said_meanwhile(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    """Also after months, when the clock of the kernel's log is minutes off."""
    book, by = Journal(tmp_path / "state", NEW), who(place, "")
    began = klog.epoch_of_boot()

    def said(*rows: tuple[float, str]) -> None:
        messages = [KernelMessage(at - began + off, 6, text) for at, text in rows]
        kept = tuple(klog.Record(number, row) for number, row in enumerate(messages))
        monkeypatch.setattr(klog, "read_all", lambda *_: kept)

    one = book.begin("load", "one", by, "from one.ko", {})
    during = time.time()
    time.sleep(0.002)
    time.sleep(0.002)
    one.end("refused", "the kernel has no function f()", heard=[0, 0])
    book.begin("load", "none", by, "from none.ko", {}).end("done", "in force")
    time.sleep(0.002)
    said(
        (during, "livepatch: symbol 'f' not found in symbol table"),
        (time.time(), "livepatch: enabling patch 'none'"),
        (time.time(), "livepatch: 'one': unpatching complete"),
    )
    rows, _ = read_log(place, tmp_path / "state")
    texts = [row.text for row in observe.about(rows, "one") if not row.text.startswith("----")]
    assert texts == [
        "load one: from one.ko, by " + one.by.user,
        "livepatch: symbol 'f' not found in symbol table",
        "load one: the kernel has no function f() [refused], by " + one.by.user,
        "livepatch: 'one': unpatching complete",
    ]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (10.5, 11.5, 0.0),  # they lie there as they are
        (7.0, 8.0, 3.0),  # behind
        (14.0, 14.5, -2.5),  # ahead
        (10.0, 13.0, -0.5),  # longer than the time between: the clock was set
    ],
)
def test_the_kernels_clock_drifts(first: float, last: float, expected: float) -> None:
    assert klog.drift(first, last, 10.0, 12.0) == expected


@pytest.fixture
def kmsg_pipe(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A FIFO in the place of /dev/kmsg: the descriptor to write to it. It has no end to go to."""
    monkeypatch.setattr(os, "lseek", lambda *_: 0)
    (place.dev / "kmsg").unlink()
    os.mkfifo(place.dev / "kmsg")
    fd = os.open(place.dev / "kmsg", os.O_RDWR)
    yield fd
    os.close(fd)


def rings(bell: klog.Bell, seconds: float) -> tuple[bool, float, float]:
    """Whether it rings, after how many seconds, and how many of a processor."""
    began, used = time.monotonic(), time.process_time()
    rang = bell.wait(seconds)
    return rang, time.monotonic() - began, time.process_time() - used


@pytest.mark.parametrize("others", [b"", b"6,2,4000000,-;usb 1-1: new device\n"])
def test_the_cores_word_rings_the_bell(place: Place, kmsg_pipe: int, others: bytes) -> None:
    word = b"6,3,5000000,-;livepatch: 'fix': patching complete\n"
    with klog.Bell(place) as bell:
        os.write(kmsg_pipe, others)
        said = threading.Timer(0.2, os.write, (kmsg_pipe, word))
        said.start()
        rang, seconds, _ = rings(bell, 60)
        assert rang and 0.15 < seconds < 30
        assert not rings(bell, 0.1)[0]


@pytest.mark.parametrize(
    "text", [b"6,2,5000000,-;usb 1-1: new device\n", b"14,2,5000000,-;livepatch: says a user's program\n"]
)
def test_what_others_say_does_not(place: Place, kmsg_pipe: int, text: bytes) -> None:
    with klog.Bell(place) as bell:
        os.write(kmsg_pipe, text)
        rang, seconds, _ = rings(bell, 0.3)
        assert not rang and seconds >= 0.3


def test_a_bell_whose_log_was_overwritten_rings(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_fd: int, _size: int) -> bytes:
        raise OSError(errno.EPIPE, "overwritten")

    with klog.Bell(place) as bell:
        monkeypatch.setattr(os, "read", read)
        assert bell.wait(5)


def test_what_cannot_be_listened_to_costs_nothing(place: Place) -> None:
    """/dev/null is always ready and never has anything; without a file the caller is to look for itself."""
    (place.dev / "kmsg").unlink()
    with klog.Bell(place) as bell:
        rang, seconds, _ = rings(bell, 5)
        assert not rang and seconds < 2
    (place.dev / "kmsg").symlink_to("/dev/null")
    with klog.Bell(place) as bell:
        rang, seconds, used = rings(bell, 0.5)
        assert not rang and seconds >= 0.5 and used < 0.25


def test_where_very_much_is_said_the_bell_rings(place: Place) -> None:
    """It does not read on for good: the word may be in what it skips."""
    (place.dev / "kmsg").unlink()
    (place.dev / "kmsg").symlink_to("/dev/zero")
    with klog.Bell(place) as bell:
        assert rings(bell, 60)[0]
