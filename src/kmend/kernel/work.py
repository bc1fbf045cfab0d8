"""One piece of work on the cache: the lock that it holds, its children, and who is told of its progress.

Preparing a kernel runs several children in two threads. All of them are started through one
:class:`Work`, so that they share kmend's lock (a child that outlives a killed kmend keeps the next
run waiting instead of writing beside it) and can be ended together.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kmend.core.errors import Failed, KmendError
from kmend.core.files import locked
from kmend.core.progress import Progress, Silent
from kmend.core.run import Children, Result, run

log = logging.getLogger("kmend.work")

#: How long killed processes may take to disappear, in seconds (one may sleep in a disk write).
ORPHANS_GONE = 60.0

#: What tools say when the disk is full (libc's text of ENOSPC and EDQUOT; children run in the C locale).
FULL = re.compile(r"No space left on device|Disk quota exceeded|not enough free space", re.IGNORECASE)


class Shared:
    """A Progress that several threads may use at once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self.text = ""  # the present step

    def step(self, text: str) -> None:
        with self._lock:
            self.text = text
            self._progress.step(text)

    def amount(self, done: int, total: int) -> None:
        with self._lock:
            self._progress.amount(done, total)


@dataclass(frozen=True, slots=True)
class Work:
    """How children are started. ``lock`` is the descriptor of the held lock, or None."""

    progress: Progress = field(default_factory=Silent)
    lock: int | None = None
    jobs: int = 1
    children: Children = field(default_factory=Children)

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 3600.0,
        check: bool = True,
    ) -> Result:
        """As :func:`kmend.core.run.run`, with our lock and among our children.

        Raises:
            Unable: the program does not exist.
            Failed: it failed; rule ``disk-full`` when that is what it complained about.
        """
        try:
            result = run(
                argv,
                cwd=cwd,
                env=env,
                timeout=timeout,
                check=check,
                pass_fds=() if self.lock is None else (self.lock,),
                children=self.children,
            )
        except Failed as error:
            if full := as_disk_full(error):
                raise full from error
            raise
        return result

    def shell(self, script: str, *arguments: str | os.PathLike[str], timeout: float = 3600.0) -> Result:
        """Run a pipeline; ``$1`` … are the arguments. A failure of any member of it fails the whole."""
        return self.run(["bash", "-c", f"set -o pipefail; {script}", "kmend", *arguments], timeout=timeout)


@contextmanager
def owned(path: Path, *, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold the lock file ``path``; yields a second lock's descriptor, which our children shall inherit.

    The first lock says that a kmend is at work, and goes when that kmend dies. The second one goes
    only when its children have ended as well. So whoever has the first and finds the second taken
    knows that its holders were left behind by a kmend that was killed: they are killed too (make and
    tar would else go on writing where we are about to).

    Raises:
        Failed: the files cannot be made, or a process that was left behind does not go away.
    """
    with locked(path, on_wait=on_wait):
        try:
            fd = os.open(path.with_name(path.name + ".children"), os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise Failed(f"{path} cannot be locked", why=str(error), rule="unwritable") from error
        try:
            deadline = time.monotonic() + ORPHANS_GONE
            while not _try_lock(fd):
                left = [pid for pid in holders(fd) if pid != os.getpid()]
                log.debug("ending what a killed kmend left running: %s", left)
                for pid in left:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                if time.monotonic() > deadline:
                    raise Failed(
                        "a process that a killed kmend left behind does not end",
                        why=f"{path}.children is held by {', '.join(map(str, left)) or 'another user'}",
                        next_step="end them, then run again",
                        rule="orphan",
                    )
                time.sleep(0.05)
            yield fd
        finally:
            os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holders(fd: int) -> list[int]:
    """The processes that have the file of ``fd`` open, as far as this user may see."""
    wanted = os.fstat(fd)
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    info = link.stat()
                    if (info.st_dev, info.st_ino) == (wanted.st_dev, wanted.st_ino):
                        found.append(int(process.name))
                        break
    return found


def as_disk_full(error: KmendError) -> Failed | None:
    """The error as one of rule ``disk-full`` when it says that the disk was full, else None."""
    if error.rule == "disk-full" and isinstance(error, Failed):
        return error
    if not FULL.search(f"{error.what}\n{error.why}"):
        return None
    lines = (*error.why.splitlines(), error.what)
    return disk_full(next(line.strip() for line in lines if FULL.search(line)))


def disk_full(why: str) -> Failed:
    """The error for a full disk, with the one advice that there is."""
    return Failed(
        "the disk that holds kmend's cache is full",
        why=why,
        next_step="free some 3 GB there, or name a cache on another disk: KMEND_CACHE=DIR",
        rule="disk-full",
    )
