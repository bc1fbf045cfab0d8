"""What kmend did to the kernel: an append-only file of JSON lines, and the system's journal.

An action is written before it begins and again when it has ended. A beginning without an end is what a killed
kmend leaves; the next one finds it (:func:`unfinished`) and says what has become of it. A line is one
``write(2)`` to a file opened with ``O_APPEND``; a line that a power cut tore is passed over by the reader,
and never joined with the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pwd
import syslog
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from kmend.core.errors import Failed, Refusal, Refused
from kmend.runtime.place import Place, optional
from kmend.runtime.state import make_folder

SCHEMA = 1
#: The journal's name in the state folder.
NAME = "log"
#: How an action ended that the same command can go on with: it was stopped, or told not to wait.
INTERRUPTED, PENDING = "interrupted", "pending"
#: Verbs that change what is loaded at boot. Their actions say nothing about what is in the kernel.
STORING = ("install", "uninstall", "healthy")
#: The lock that whoever acts on the kernel holds, in ``/run``: it goes with the boot, as does what it guards.
LOCK = "kmend.lock"
#: So many bytes before the end of what was read tell one file from another: a line with its time.
_LAST = 512
#: Seconds to wait for it: who only asks whether it is free (:func:`is_free`) holds it for an instant.
LOCK_LIMIT = 0.5


@dataclass(frozen=True, slots=True)
class Record:
    """A line of the journal. ``event`` is ``begin``, ``step`` or ``end``; ``id`` is that of the action.

    ``time`` is seconds since the epoch, ``boot`` the kernel's ``boot_id``, ``result`` the word with which an
    action ended (``done``, ``pending``, ``failed``, ``refused``, ``reversed``, ``stalled``,
    ``interrupted``). What was refused before anything was done has an ``end`` alone.
    """

    time: float
    event: str
    id: str
    boot: str
    verb: str
    patch: str
    text: str
    result: str
    pid: int
    user: str
    detail: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Who:
    """Who acts: the login that began the session (``/proc/self/loginuid``) and the user as it is now."""

    user: str
    login: str
    pid: int
    command: str


def who(place: Place, command: str) -> Who:
    """Whoever runs this process."""
    login = optional(place.proc / "self/loginuid") or ""
    sudo = os.environ.get("SUDO_USER", "")
    number = int(login) if login.isdigit() and int(login) != 0xFFFFFFFF else None
    login_name = sudo or (_user(number) if number is not None else "")
    return Who(_user(os.geteuid()), login_name, os.getpid(), command)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except (KeyError, OSError):
        return str(number)


class Journal:
    """The journal in one state folder. Reading needs no lock; writers hold that of :func:`acting`."""

    def __init__(self, state: Path, boot: str) -> None:
        self.path = state / NAME
        self.boot = boot
        #: why the last line could not be kept; '' when all is well. What is done to the kernel goes on.
        self.trouble = ""

    def begin(self, verb: str, patch: str, by: Who, text: str, detail: Mapping[str, object]) -> Action:
        """Write down what is about to be done."""
        action = Action(self, uuid.uuid4().hex[:12], verb, patch, by)
        action.write("begin", text, detail=detail)
        return action

    def refused(self, verb: str, patch: str, by: Who, text: str, refusals: Sequence[Refusal]) -> None:
        """Write down what was asked for and not even begun."""
        Action(self, uuid.uuid4().hex[:12], verb, patch, by).end("refused", text, **reasons(refusals))

    def records(self) -> tuple[Record, ...]:
        """Every line, oldest first; torn and foreign lines are left out.

        Raises:
            Failed: (rule ``not-permitted``) this user may not read it.
        """
        try:
            with self.path.open("rb") as file:
                known = _READ.setdefault(self.path, _Read())
                known.add(file)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise Failed(
                f"{self.path} cannot be read",
                why=error.strerror or str(error),
                next_step="run kmend as root",
                rule="not-permitted",
            ) from error
        return tuple(known.rows)

    def append(self, row: Mapping[str, object]) -> None:
        """Add a line and make it last."""
        line = json.dumps(row, separators=(",", ":"), sort_keys=True).encode() + b"\n"
        try:
            make_folder(self.path.parent)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
            try:
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":
                    line = b"\n" + line  # a power cut tore the last one
                short = os.write(fd, line) < len(line)
                os.fsync(fd)
            finally:
                os.close(fd)
            self.trouble = f"{self.path}: {os.strerror(errno.ENOSPC)}" if short else ""
        except OSError as error:
            self.trouble = f"{self.path}: {error.strerror or error}"


@dataclass(slots=True)
class _Read:
    """What has been read of a journal: an action asks several times, and after years it is long.

    ``end`` is where the next line begins, ``last`` what stands before: by that it is told whether the file is
    still the one that was read.
    """

    rows: list[Record] = field(default_factory=list)
    end: int = 0
    last: bytes = b""

    def add(self, file: BinaryIO) -> None:
        """The lines that have come since. One without an end is torn, or is just being written."""
        file.seek(self.end - len(self.last))
        if file.read(len(self.last)) != self.last:
            self.rows, self.end, self.last = [], 0, b""
            file.seek(0)
        lines, newline, _ = file.read().rpartition(b"\n")
        if newline:
            found = map(_parsed, lines.decode(errors="replace").split("\n"))
            self.rows += [row for row in found if row is not None]
            self.end += len(lines) + 1
            self.last = (lines + newline)[-_LAST:]


_READ: dict[Path, _Read] = {}


class Action:
    """One action under way. ``end`` is written once."""

    def __init__(self, journal: Journal, number: str, verb: str, patch: str, by: Who) -> None:
        self.journal, self.id, self.verb, self.patch, self.by = journal, number, verb, patch, by
        self.ended = False

    def step(self, text: str, **detail: object) -> None:
        """A step of it is done or about to be done."""
        self.write("step", text, detail=detail)

    def end(self, result: str, text: str, **detail: object) -> None:
        """It is over."""
        if not self.ended:
            self.ended = True
            self.write("end", text, result=result, detail=detail)

    def write(self, event: str, text: str, *, result: str = "", detail: Mapping[str, object]) -> None:
        """Append a line, and tell the system's journal."""
        self.journal.append(
            {
                "schema": SCHEMA,
                "time": round(time.time(), 6),
                "event": event,
                "id": self.id,
                "boot": self.journal.boot,
                "verb": self.verb,
                "patch": self.patch,
                "text": text,
                "result": result,
                "user": self.by.user,
                "login": self.by.login,
                "pid": self.by.pid,
                "command": self.by.command,
                "detail": dict(detail),
            }
        )
        level = syslog.LOG_NOTICE if result in ("", "done", PENDING) else syslog.LOG_WARNING
        by = self.by.user + (f" ({self.by.login})" if self.by.login and self.by.login != self.by.user else "")
        line = f"{self.verb} {self.patch}: {text}" + (f" [{result}]" if result else "") + f", by {by}"
        # a file's name may be no text at all; an action is not to fail because of what is told of it
        with contextlib.suppress(OSError, ValueError):
            syslog.openlog("kmend", syslog.LOG_PID, syslog.LOG_DAEMON)
            syslog.syslog(level, line.encode(errors="backslashreplace").decode().replace("\0", "\\0"))


def _parsed(line: str) -> Record | None:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or row["schema"] != SCHEMA:
            return None
        detail = row["detail"]
        return Record(
            time=float(row["time"]),
            event=str(row["event"]),
            id=str(row["id"]),
            boot=str(row["boot"]),
            verb=str(row["verb"]),
            patch=str(row["patch"]),
            text=str(row["text"]),
            result=str(row["result"]),
            pid=int(row["pid"]),
            user=str(row["login"] or row["user"]),
            detail=detail if isinstance(detail, dict) else {},
        )
    except (ValueError, KeyError, TypeError):
        return None


def unfinished(records: Sequence[Record], boot: str) -> tuple[Record, ...]:
    """The beginnings of this boot that have no end: actions under way, or killed ones."""
    ended = {row.id for row in records if row.event == "end"}
    return tuple(row for row in records if row.event == "begin" and row.boot == boot and row.id not in ended)


def resumable(records: Sequence[Record], boot: str) -> tuple[Record, ...]:
    """The beginnings of this boot that the same command goes on with, with how they ended as ``result``.

    Those without an end (''), and of each patch its last action if it was interrupted or left to go on.
    Actions on the store of installed patches are not among them (:func:`resumable_in_store`), nor is
    `signal`: whoever interrupts tasks does not change where the patch is to go.
    """
    return _resumable([row for row in records if row.boot == boot and row.verb not in (*STORING, "signal")])


def resumable_in_store(records: Sequence[Record], boot: str, release: str) -> tuple[Record, ...]:
    """The same of ``install`` and ``uninstall`` for a release, which their ``detail`` names."""
    return _resumable(
        [
            row
            for row in records
            if row.boot == boot
            and row.verb in ("install", "uninstall")
            and (row.event == "end" or row.detail.get("release") == release)
        ]
    )


def _resumable(records: Sequence[Record]) -> tuple[Record, ...]:
    ends = {row.id: row.result for row in records if row.event == "end"}
    begun = [row for row in records if row.event == "begin"]
    last = {row.patch: row.id for row in begun}
    return tuple(
        replace(row, result=ends.get(row.id, ""))
        for row in begun
        if row.id not in ends or (last[row.patch] == row.id and ends[row.id] in (INTERRUPTED, PENDING))
    )


def reasons(refusals: Sequence[Refusal]) -> dict[str, object]:
    """Why something was refused, as the detail of its end."""
    if not refusals:
        return {}
    return {
        "rules": [row.rule for row in refusals],
        "why": "\n".join(f"{row.what}: {row.why}" for row in refusals),
    }


def close_killed(book: Journal, place: Place, by: str) -> tuple[str, ...]:
    """Write an end for each action of this boot that has none; the patches that they were about.

    For who holds the lock alone: whoever began them is dead. ``by`` is the command that found them.
    """
    try:
        found = unfinished(book.records(), book.boot)
    except Failed:
        return ()
    for row in found:
        Action(book, row.id, row.verb, row.patch, who(place, "")).end(
            INTERRUPTED, f"its kmend (process {row.pid}) was killed; found by `kmend {by}`"
        )
    return tuple(row.patch for row in found)


def loads(records: Iterable[Record], boot: str) -> dict[str, Record]:
    """For each patch that kmend loaded in this boot: the beginning of its last load."""
    return {
        row.patch: row for row in records if row.boot == boot and row.event == "begin" and row.verb == "load"
    }


def replacing(records: Iterable[Record], boot: str) -> dict[str, bool]:
    """Which of the patches loaded in this boot are cumulative, as their files said."""
    return {
        name: value
        for name, row in loads(records, boot).items()
        if isinstance(value := row.detail.get("replace"), bool)
    }


@dataclass(slots=True)
class Forced:
    """What was forced in a boot. ``patches``: those of which a transition was.

    ``pins``: modules that the kernel keeps for good, with the patch whose forced transition is why. That are
    the patches which such a transition removes (``klp_force_transition()``, ``klp_free_patch_finish()``):
    the patch itself when it was being taken back, all others when it was replacing them. A patch that was
    forced *into* force, and is taken back in the ordinary way, is not kept.
    """

    patches: set[str] = field(default_factory=set)
    pins: dict[str, str] = field(default_factory=dict)

    def again(self, patch: str) -> None:
        """It is loaded afresh: what was forced was another one."""
        self.patches.discard(patch)
        self.pins.pop(patch, None)


def forced(records: Iterable[Record], boot: str) -> Forced:
    """What kmend forced in this boot."""
    found = Forced()
    for row in records:
        if row.boot != boot:
            continue
        if row.event == "begin" and row.verb == "load":
            found.again(row.patch)
        if row.event == "step" and "forced" in row.detail:
            found.patches.add(row.patch)
            pins = row.detail.get("pins")
            found.pins |= dict.fromkeys(map(str, pins), row.patch) if isinstance(pins, list) else {}
    return found


@contextlib.contextmanager
def acting(place: Place, verb: str, limit: float = LOCK_LIMIT) -> Iterator[None]:
    """Hold the lock of whoever acts on the kernel; the kernel drops it when its holder dies.

    ``limit``: for so many seconds another one's end is waited for.

    Raises:
        Refused: (rule ``busy``) another kmend acts now.
        Failed: the lock's file cannot be made.
    """
    path = place.run / LOCK
    try:
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Failed(
            f"{path} cannot be made",
            why=error.strerror or str(error),
            next_step="run kmend as root",
            rule="unwritable",
        ) from error
    mine = False
    try:
        mine = _locked(fd, time.monotonic() + limit)
        if not mine:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
            raise Refused(
                [
                    Refusal(
                        "busy",
                        f"another kmend acts on this kernel: {holder or 'it has just begun'}",
                        "two at once would work against each other",
                        "wait until it ends (`kmend status --watch` shows what it does), or stop it",
                    )
                ]
            )
        with contextlib.suppress(OSError):  # a full /run keeps nobody from taking a patch back
            os.ftruncate(fd, 0)
            os.pwrite(fd, os.fsencode(f"{verb}, process {os.getpid()}\n"), 0)
        yield
    finally:
        # the file stays: removing it would let a third one lock another file of the same name
        if mine:  # else it names who holds it
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
        os.close(fd)


def _locked(fd: int, deadline: float) -> bool:
    """Take the lock; False: it is still held at the deadline."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def is_free(place: Place) -> bool:
    """Whether nobody acts now. For who may not open the lock's file: as far as can be told, nobody."""
    try:
        fd = os.open(place.run / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
