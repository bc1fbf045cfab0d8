"""Files that are complete or absent: write beside, sync, rename."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kmend.core.errors import Failed


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write ``data`` to ``path``; a reader (or a power cut) sees the old file or the new one, never half.

    Raises:
        Failed: the folder cannot be written or the disk is full; nothing is left behind.
    """
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(fd, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        Path(name).chmod(mode)
        Path(name).replace(path)
    except OSError as error:
        if name:
            with contextlib.suppress(OSError):
                Path(name).unlink()
        raise Failed(
            f"{path} cannot be written",
            why=error.strerror or str(error),
            next_step="name another folder with -o, or free space",
            rule="unwritable",
        ) from error


@contextmanager
def locked(path: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold an exclusive lock on the file ``path`` (made when absent); waits for another holder.

    ``on_wait`` is called once when somebody else holds the lock, before waiting. Yields the
    descriptor that carries the lock: a child that is given it (``run(..., pass_fds=(fd,))``)
    keeps the lock until it ends too, so that a child which outlives a killed kmend cannot meet
    the next run at work on the same files. The kernel drops the lock when its last holder dies,
    so a killed run leaves none behind.

    Raises:
        Failed: the folder or the file cannot be made or locked.
    """
    fd = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise Failed(
            f"{path} cannot be locked",
            why=error.strerror or str(error),
            next_step="make the folder writable, or name another cache (KMEND_CACHE)",
            rule="unwritable",
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)
