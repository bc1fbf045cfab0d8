"""Files that are complete or absent: write beside, sync, rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kmend.core.errors import Failed

#: Ending of the file that says whether a scratch folder's run is alive.
LOCK = ".lock"


def open_regular(path: Path | str) -> int:
    """A descriptor of a regular file, for reading.

    What else may have the name is neither waited for (a FIFO, which anybody can put into a folder of theirs)
    nor read (a device has no end).

    Raises:
        OSError: there is none, it may not be read, or (EINVAL, EISDIR) it is something else.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(number, "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file", str(path))


def read_regular(path: Path | str, most: int) -> bytes:
    """The contents of a regular file of at most so many bytes.

    Raises:
        OSError: as :func:`open_regular`; (EFBIG) it is larger.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write ``data`` to ``path``; a reader (or a power cut) sees the old file or the new one, never half.

    The file has no name until it is complete (``O_TMPFILE``, where the file system offers it), so that a
    process that is killed while it writes leaves nothing behind.

    Raises:
        Failed: the folder cannot be written or the disk is full; nothing is left behind.
    """
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _nameless(path.parent)
        if fd is None:
            fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(fd, "wb") as out:
            out.write(data)
            out.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
            if not name:
                name = _named(fd, path)
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


def _nameless(folder: Path) -> int | None:
    """A new file in the folder that has no name yet; None: the file system has no such files (open(2))."""
    if not Path("/proc/self/fd").is_dir():
        return None  # as in a chroot: it could not be given a name
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            return None
        raise


def _named(fd: int, path: Path) -> str:
    """Give a nameless file a name beside ``path``: linkat(2) makes none in place of another file's."""
    for _ in range(100):
        name = f"{path.parent}/.{path.name}.{os.urandom(4).hex()}.tmp"
        with contextlib.suppress(FileExistsError):
            # a folder's descriptor makes Python use linkat(2), which alone can follow the link in /proc
            os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)
            return name
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


@contextmanager
def scratch_folder(base: Path, prefix: str) -> Iterator[Path]:
    """A new folder ``PREFIX-…`` in ``base`` for this run only, gone afterwards.

    What killed runs left in ``base`` under the same prefix goes as well. Beside each folder lies a locked
    file; the kernel drops the lock when its holder dies, however it dies.

    Raises:
        Failed: (rule ``unwritable``) ``base`` cannot be written.
    """
    fd = -1
    try:
        base.mkdir(parents=True, exist_ok=True)
        while True:
            # The lock first: a folder without one would be nobody's to remove.
            fd, name = tempfile.mkstemp(prefix=f"{prefix}-", suffix=LOCK, dir=base)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink > 0:
                break  # else another run swept it between the two lines above
            os.close(fd)
            fd = -1
        lock = Path(name)
        folder = lock.with_suffix("")
        folder.mkdir(mode=0o700)
        sweep(base, prefix, keep=lock.name)
    except OSError as error:
        if fd >= 0:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            os.close(fd)
        raise Failed(
            f"{base} cannot be written",
            why=error.strerror or str(error),
            next_step="free space, or name another cache with --cache",
            rule="unwritable",
        ) from error
    try:
        yield folder
    finally:
        if remove(folder):
            lock.unlink(missing_ok=True)
        os.close(fd)


def sweep(base: Path, prefix: str, keep: str = "") -> None:
    """Remove the folders of :func:`scratch_folder` whose runs are dead (no longer hold their lock)."""
    for lock in base.glob(f"{prefix}-*{LOCK}"):
        if lock.name == keep:
            continue
        with contextlib.suppress(OSError), lock.open("r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if remove(lock.with_suffix("")):
                lock.unlink(missing_ok=True)


def remove(folder: Path) -> bool:
    """Remove a folder and all that is in it; whether it is gone.

    It is renamed first: a child that outlived a killed run and still writes there (by the folder's name)
    meets with an error instead of filling it as fast as it is emptied.
    """
    aside = folder.with_name(f"{folder.name}.gone")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while it removed
    with contextlib.suppress(OSError):
        folder.rename(aside)
    for _ in range(3):
        for path in (aside, folder):
            shutil.rmtree(path, ignore_errors=True)
        if not aside.exists() and not folder.exists():
            return True
    return False


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
