"""What is loaded again at boot: a store for each release, the guard against crash loops, the off switches.

    STATE/RELEASE/index.json               the patches in their order; replacing it is what commits a change
    STATE/RELEASE/NAME.DIGEST.ko, .json    a module and its build report, named by the module's contents
    STATE/RELEASE/attempt.json             a boot has begun to load them and is not known to be healthy yet

Files are written beside, synced and renamed, and the folder is synced before and after the index is replaced.
So whatever a power cut leaves, the index is the old one or the new one, and each file that it names is there,
whole. What an unfinished change has left beside is removed by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from kmend.core.errors import Failed, Refusal, Refused, UsageError
from kmend.core.files import write_atomically
from kmend.core.target import MAX_MODULE_NAME, Release
from kmend.runtime import journal
from kmend.runtime.place import Place, flag, is_folder, optional
from kmend.runtime.state import make_folder

SCHEMA = 1
INDEX = "index.json"
ATTEMPT = "attempt.json"
#: What stands for a patch's name in lines of the journal that are about all that are installed.
ALL = "--all"
#: Verbs whose lines in the journal can say why a patch is not loaded.
_LOADING = ("load", "unload", "disable", "enable")
#: A file that turns loading at boot off while it is there.
OFF_FILE = Path("/etc/kmend/off")
#: The word on the kernel's command line that does so for one boot.
OFF_WORD = "kmend=off"
#: File systems that a crash empties.
_IN_MEMORY = ("tmpfs", "ramfs", "rootfs")
#: ``uname -r`` begins with the version, so no release is called like another file in STATE.
_RELEASE = re.compile(r"[0-9][0-9A-Za-z.+~_-]{0,63}\Z")
_NAME = re.compile(rf"[0-9A-Za-z_]{{1,{MAX_MODULE_NAME}}}\Z")
_FILE = re.compile(r"[0-9A-Za-z_]+\.[0-9a-f]{16}\.(ko|json)\Z")
#: What `write_atomically` leaves when the power goes between link(2) and rename(2).
_TORN = re.compile(r"\..+\.tmp\Z")
#: Bits of the taint value: the kernel has oopsed (TAINT_DIE), locked up (TAINT_SOFTLOCKUP); kernel/panic.c.
DEADLY_TAINT = 1 << 7 | 1 << 14


@dataclass(frozen=True, slots=True)
class Installed:
    """A row of the index. ``file`` and ``report`` ('' for none) lie beside it.

    ``replace`` is None where nobody could tell whether the patch is cumulative; ``time`` is seconds since the
    epoch. ``build_id`` is the kernel's ('' when the module does not tell).
    """

    name: str
    file: str
    sha256: str
    report: str
    build_id: str
    replace: bool | None
    time: float
    user: str


@dataclass(frozen=True, slots=True)
class Store:
    """What is installed for one release, in the order of loading."""

    release: Release
    folder: Path
    patches: tuple[Installed, ...]

    def named(self, name: str) -> Installed | None:
        """The row of that name."""
        return next((row for row in self.patches if row.name == name), None)

    @property
    def wanted(self) -> tuple[Installed, ...]:
        """What has to be loaded: from the last cumulative patch on, which would replace those before it."""
        last = max((at for at, row in enumerate(self.patches) if row.replace), default=0)
        return self.patches[last:]


@dataclass(frozen=True, slots=True)
class Attempt:
    """A boot has begun to load patches. ``taint`` is that before; ``boot`` is '' in a damaged mark."""

    boot: str
    time: float
    taint: int
    patches: tuple[str, ...]


class Guard(Enum):
    """What the mark of an attempt says to the present boot.

    ``WATCHING``: it is this boot's, which is not known to be healthy yet. ``TRIPPED``: a former boot loaded
    the patches and never got healthy.
    """

    CLEAR = "clear"
    WATCHING = "watching"
    TRIPPED = "tripped"


@dataclass(frozen=True, slots=True)
class Absent:
    """An installed patch that should be in force, and is not loaded.

    ``why`` is a sentence from the last line of this boot's journal about it, ``rules`` are those that refused
    it, ``time`` is that of the line (seconds since the epoch; None where there is none). ``tried`` is False
    for one that was installed in this boot, when nobody has loaded it yet.
    """

    name: str
    why: str
    rules: tuple[str, ...] = ()
    time: float | None = None
    tried: bool = True


@dataclass(frozen=True, slots=True)
class Persistence:
    """Everything about loading at boot for one release. ``off`` says by what it is switched off, '' if not.

    ``trouble`` is what is wrong with the store, when it cannot be read. ``absent`` is empty for a release
    that does not run; where all patches are switched off or left off, it has those alone that somebody has
    tried to load all the same.
    """

    release: Release
    store: Store
    guard: Guard
    attempt: Attempt | None
    off: str
    trouble: Refusal | None = None
    absent: tuple[Absent, ...] = ()


def look(
    place: Place, state: Path, release: str, boot: str, *, off_file: Path = OFF_FILE
) -> Persistence | None:
    """How loading at boot stands for one release; None for a release that no store can have.

    Never raises for a damaged store: that is part of the answer.
    """
    if not _RELEASE.match(release):
        return None
    chosen = Release(release)
    off = switched_off(place, off_file)
    try:
        store = read(state, chosen)
        found = read_attempt(state, chosen)
    except (Failed, Refused) as error:
        empty = Store(chosen, state / release, ())
        return Persistence(chosen, empty, Guard.CLEAR, None, off, error.reasons[0])
    guard = Guard.CLEAR if found is None else Guard.WATCHING if found.boot == boot else Guard.TRIPPED
    missing = absent(place, state, store, boot, every=not off and guard is not Guard.TRIPPED)
    return Persistence(chosen, store, guard, found, off, absent=missing)


def absent(place: Place, state: Path, store: Store, boot: str, *, every: bool = True) -> tuple[Absent, ...]:
    """The patches that should be in force and are not loaded, and what kmend's journal says about why.

    Without ``every`` those alone of which it speaks by name. None for a release that does not run.
    """
    if optional(place.proc / "sys/kernel/osrelease") != store.release:
        return ()
    wanted = [row.name for row in store.wanted]
    missing = [name for name in wanted if not is_folder(place.livepatch / name)]
    if not missing:
        return ()
    try:
        records = journal.Journal(state, boot).records()
    except Failed as error:
        return tuple(Absent(name, f"why is not known: {error.what}") for name in missing if every)
    told = {
        row.patch: (at, row)
        for at, row in enumerate(records)
        if row.boot == boot
        and row.event != "step"
        and (row.verb in _LOADING or (row.verb == "install" and row.result == "done"))
    }
    # a cumulative patch of which the index does not know that it is one has replaced those before it
    known = journal.replacing(records, boot)
    over = [name for name in wanted if name not in missing and _replaces(place, name, known)]
    if over:
        missing = [name for name in missing if wanted.index(name) > wanted.index(over[-1])]
    everything = told.get(ALL) if every else None
    refused = everything if everything is not None and everything[1].result == "refused" else None
    found = []
    for name in missing:
        last = max((row for row in (told.get(name), refused) if row is not None), default=None, key=_place)
        if last is not None or every:
            found.append(_absent(name, None if last is None else last[1]))
    return tuple(found)


def _replaces(place: Place, name: str, known: Mapping[str, bool]) -> bool:
    shown = flag(place.livepatch / name / "replace")
    return shown if shown is not None else known.get(name) is True


def _place(row: tuple[int, journal.Record]) -> int:
    return row[0]


def _absent(name: str, row: journal.Record | None) -> Absent:
    """Why, by the last line about it."""
    if row is None:
        return Absent(name, "nobody has tried to load it in this boot (systemctl status kmend-load.service)")
    listed, reasons = row.detail.get("rules"), row.detail.get("why")
    rules = tuple(map(str, listed)) if isinstance(listed, list) else ()
    tried = True
    match row.verb, row.event, row.result:
        case "install", _, _:
            why, tried = "it was installed in this boot; `kmend load --all` loads it", False
        case verb, "begin", _:
            why = f"`kmend {verb} {row.patch}`, process {row.pid}, has begun and has not ended"
        case "load", _, "done" | "pending":
            why = "it was loaded in this boot, and has been replaced or taken away since"
        case _:
            first = str(reasons).partition("\n")[0] if reasons else ""
            why = row.text
            if first.startswith(row.text) or (first and row.text == f"{name} was not loaded"):
                why = first  # says more than that
            elif first:
                why = f"{row.text}: {first}"
            if len(rules) > 1:
                why += f", and {len(rules) - 1} more"
    return Absent(name, why, rules, row.time, tried)


def switched_off(place: Place, off_file: Path = OFF_FILE) -> str:
    """By what loading at boot is switched off; '' when it is not."""
    if OFF_WORD in (optional(place.proc / "cmdline") or "").split():
        return f"{OFF_WORD} on the kernel's command line"
    if (place.proc / "vmcore").exists():  # fs/proc/vmcore.c: only where the memory of a dead kernel is
        return "this being a crash kernel, started to save the memory of another (/proc/vmcore)"
    try:
        off_file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError:
        pass  # it cannot be looked at: the careful answer
    return f"the file {off_file}"


def release_of(release: str) -> Release:
    """A release that may have a store.

    Raises:
        UsageError: (rule ``bad-release``) it is no kernel release.
    """
    if not _RELEASE.match(release):
        raise UsageError(
            f"{release!r} is no kernel release",
            why="a release begins with the kernel's version, as uname -r prints it",
            next_step="`uname -r`, or `modinfo -F vermagic FILE`",
            rule="bad-release",
        )
    return Release(release)


def is_name(name: str) -> bool:
    """Whether it is a module's name (and so fit to be part of a file's)."""
    return _NAME.match(name) is not None


def releases(state: Path) -> tuple[Release, ...]:
    """The releases that have a store.

    Raises:
        Failed: (rule ``unreadable``) the state folder cannot be listed.
    """
    try:
        names = sorted(path.parent.name for path in state.glob(f"*/{INDEX}"))
    except OSError as error:
        raise _unreadable(state, error) from error
    return tuple(Release(name) for name in names if _RELEASE.match(name))


def read(state: Path, release: Release) -> Store:
    """The store of a release; empty when there is none.

    Raises:
        Failed: (rule ``unreadable``) this user may not read it.
        Refused: (rule ``store-damaged``) it is not as kmend wrote it.
    """
    folder = state / release
    path = folder / INDEX
    data = _read(path)
    if data is None:
        return Store(release, folder, ())
    try:
        document = json.loads(data)
        if document["schema"] != SCHEMA:
            raise _damaged(path, f"its schema is {document['schema']!r}, and this kmend knows {SCHEMA}")
        if document["release"] != release:
            raise _damaged(path, f"it is that of {document['release']!r}")
        rows = tuple(_row(entry) for entry in document["patches"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"it cannot be understood: {error}") from error
    if len({row.name for row in rows}) != len(rows):
        raise _damaged(path, "it names a patch twice")
    return Store(release, folder, rows)


def _row(entry: Mapping[str, object]) -> Installed:
    replace, when = entry["replace"], entry["time"]
    if not (replace is None or isinstance(replace, bool)) or not isinstance(when, int | float):
        raise ValueError("a field has the wrong type")
    row = Installed(
        name=str(entry["name"]),
        file=str(entry["file"]),
        sha256=str(entry["sha256"]),
        report=str(entry["report"]),
        build_id=str(entry["build_id"]),
        replace=replace,
        time=float(when),
        user=str(entry["user"]),
    )
    if not _NAME.match(row.name) or not _FILE.match(row.file) or (row.report and not _FILE.match(row.report)):
        raise ValueError(f"{row.file!r} is no name of a file in a store")
    return row


def contents(store: Store, row: Installed) -> bytes:
    """The module's bytes, which must be those that were installed.

    Raises:
        Failed: (rule ``unreadable``). Refused: (rule ``store-damaged``) it is missing or other.
    """
    path = store.folder / row.file
    data = _read(path)
    if data is None:
        raise _damaged(path, "it is not there")
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise _damaged(path, "it is not the file that was installed: its digest is another one")
    return data


def require_safe(store: Store) -> None:
    """Refuse a store in which somebody else than root could have put something.

    Raises:
        Refused: (rule ``unsafe-store``).
    """
    files = (INDEX, *(row.file for row in store.patches))
    for path in (store.folder.parent, store.folder, *(store.folder / name for name in files)):
        try:
            found = path.stat()
        except OSError:
            continue  # what is missing is found missing when it is read
        if found.st_uid not in (0, os.geteuid()) or stat.S_IMODE(found.st_mode) & 0o022:
            raise Refused(
                [
                    Refusal(
                        "unsafe-store",
                        f"{path} may be written by others than root",
                        "whoever writes there decides what runs in the kernel",
                        f"look at what is there, then: chown root: {path}; chmod go-w {path}",
                    )
                ]
            )


def forgetful(place: Place, folder: Path) -> Refusal | None:
    """Why a mark in this folder would not outlive a crash although what is installed does; None: it does.

    So it is on an overlay over a file system in memory (live systems, overlayroot): the index may lie in the
    lower layer, the mark never does. With a store that is in memory altogether nothing is installed any more.
    """
    mounts = _mounts(place)
    with contextlib.suppress(OSError):
        kind, options = mounts.get(folder.stat().st_dev, ("", ()))
        upper = next((row.removeprefix("upperdir=") for row in options if row.startswith("upperdir=")), "")
        if kind != "overlay" or not upper:
            return None
        try:
            below = mounts.get(Path(upper).stat().st_dev, ("", ()))[0]
        except OSError:
            below = ""  # the path is that of another mount namespace, or of the initramfs
        if below in ("", *_IN_MEMORY):
            where = f"is on {below}" if below else "cannot be seen from here, so it may be in memory"
            return Refusal(
                "forgetful-state",
                f"{folder} is on an overlay that may not outlive a crash",
                f"its upper layer, {upper}, {where}: the mark of the crash guard would be gone at the next "
                "boot, which would load the same patches again",
                f"mount a disk on {folder.parent}, or set `state` in kmend.toml to a folder on one",
            )
    return None


def _mounts(place: Place) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Kind and options of each mounted file system by its device number (proc_pid_mountinfo(5))."""
    found = {}
    for line in (optional(place.proc / "self/mountinfo") or "").splitlines():
        mount, _, system = line.partition(" - ")
        fields, kind = mount.split(), system.split()
        if len(fields) > 2 and len(kind) > 2 and all(word.isdigit() for word in fields[2].split(":")):
            major, _, minor = fields[2].partition(":")
            options = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), kind[2]).split(",")
            found[os.makedev(int(major), int(minor))] = (kind[0], tuple(options))
    return found


def add(store: Store, rows: Sequence[tuple[Installed, bytes, bytes]]) -> Store:
    """Put modules with their build reports (empty for none) into the store: :func:`put`, then :func:`commit`.

    One of the same name is replaced in its place. All of them are in it afterwards, or none.
    The caller holds the lock of whoever acts.

    Raises:
        Failed: (rule ``unwritable``) the store is as it was.
        Refused: (rule ``unsafe-store``) so is it then: what is there would not be loaded at boot.
    """
    return commit(put(store, rows))


def put(store: Store, rows: Sequence[tuple[Installed, bytes, bytes]]) -> Store:
    """Write the files of an :func:`add` beside those of the store. What comes back is not in force before
    :func:`commit`: who changes several stores writes all files first, then the indexes, which are small.

    Raises:
        Failed, Refused: as :func:`add`; what has been written is removed.
    """
    with _writing(store.folder):
        _make(store.folder)
        require_safe(store)
        try:
            for row, module, report in rows:
                write_atomically(store.folder / row.file, module)
                if row.report:
                    write_atomically(store.folder / row.report, report)
            _sync(store.folder)
        except (OSError, Failed):
            with contextlib.suppress(OSError):
                _sync(store.folder)  # a killed run may not have: what it has replaced goes only then
                sweep(store)
            raise
    changed = {row.name: row for row, _, _ in rows}
    known = {row.name for row in store.patches}
    kept = tuple(changed.get(row.name, row) for row in store.patches)
    added = tuple(row for name, row in changed.items() if name not in known)
    return Store(store.release, store.folder, (*kept, *added))


def drop(store: Store, names: Sequence[str]) -> Store:
    """Take patches out of the store. The caller holds the lock of whoever acts.

    Raises:
        Failed: (rule ``unwritable``) the store is as it was.
    """
    left = tuple(row for row in store.patches if row.name not in names)
    return commit(Store(store.release, store.folder, left))


def commit(store: Store) -> Store:
    """Make the index name these patches. Their files are on the disk already.

    Raises:
        Failed: (rule ``unwritable``) the store is as it was; (``unsynced``) it is changed, and the disk may
            not have it.
    """
    document = {"schema": SCHEMA, "release": store.release, "patches": [asdict(row) for row in store.patches]}
    with _writing(store.folder):
        write_atomically(store.folder / INDEX, json.dumps(document, indent=1).encode() + b"\n")
    try:
        _sync(store.folder)
    except OSError as error:
        raise Failed(
            f"{store.folder} is changed, but perhaps not on the disk",
            why=error.strerror or str(error),
            next_step="look at the disk (dmesg), then run the same command again",
            rule="unsynced",
        ) from error
    sweep(store)
    return store


def sweep(store: Store) -> None:
    """Remove what the store, as its index has it, does not name: former modules, and the leavings of
    unfinished changes.

    Without patches there is nothing that a former boot's mark could keep from being loaded.
    """
    named = {row.file for row in store.patches} | {row.report for row in store.patches}
    with contextlib.suppress(OSError):
        for path in list(store.folder.iterdir()):
            unnamed = _FILE.match(path.name) and path.name not in named
            if unnamed or _TORN.match(path.name) or (path.name == ATTEMPT and not store.patches):
                path.unlink()


# -- the guard ---------------------------------------------------------------------------------------


def read_attempt(state: Path, release: Release) -> Attempt | None:
    """The mark of a boot that began to load; a damaged one counts as that of a former boot.

    Raises:
        Failed: (rule ``unreadable``) this user may not read it.
    """
    data = _read(state / release / ATTEMPT)
    if data is None:
        return None
    try:
        document = json.loads(data)
        return Attempt(
            boot=str(document["boot"]),
            time=float(document["time"]),
            taint=int(document["taint"]),
            patches=tuple(str(name) for name in document["patches"]),
        )
    except (ValueError, KeyError, TypeError):
        return Attempt("", 0.0, 0, ())


def arm(store: Store, boot: str, taint: int) -> Attempt:
    """Mark that this boot is about to load the store's patches; on the disk when this returns.

    Raises:
        Failed: (rule ``unwritable``) the mark cannot be made: then nothing may be loaded either.
    """
    attempt = Attempt(boot, round(time.time(), 3), taint, tuple(row.name for row in store.wanted))
    with _writing(store.folder):
        write_atomically(store.folder / ATTEMPT, json.dumps(asdict(attempt)).encode() + b"\n")
        _sync(store.folder)
    return attempt


def disarm(state: Path, release: Release) -> None:
    """Take the mark away; gone from the disk when this returns.

    Raises:
        Failed: (rule ``unwritable``) it cannot be removed.
    """
    folder = state / release
    with _writing(folder):
        (folder / ATTEMPT).unlink(missing_ok=True)
        if folder.is_dir():
            _sync(folder)


# -- files -------------------------------------------------------------------------------------------


def _make(folder: Path) -> None:
    """Make the folder; a new name lasts once the folder that holds it is synced.

    The state folder may just have been made by who did not sync: what is above it is synced as well.
    """
    make_folder(folder)
    for path in (folder.parent, folder.parent.parent):
        _sync(path)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> Failed:
    return Failed(
        f"{path} cannot be read",
        why=error.strerror or str(error),
        next_step="run kmend as root; if it is root already, look at the disk",
        rule="unreadable",
    )


def _damaged(path: Path, why: str) -> Refused:
    return Refused(
        [
            Refusal(
                "store-damaged",
                f"{path} is damaged: nothing of this store is loaded",
                why,
                f"move {path.parent} away and install the patches again",
            )
        ]
    )


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into our error, with the advice that fits."""
    try:
        yield
    except (OSError, Failed) as error:
        why = error.why if isinstance(error, Failed) else error.strerror or str(error)
        raise Failed(
            f"{folder} cannot be written",
            why=why,
            next_step="run kmend as root, mount the file system read-write, or free space",
            rule="unwritable",
        ) from error
