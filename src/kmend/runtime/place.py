"""Where the live kernel shows itself, and how its files are read.

Everything in ``/proc`` and ``/sys`` may vanish between two system calls: a task ends, a patch is taken back,
a module goes. Reading such a file answers with ENOENT, ESRCH or ENODEV; that is no error but the answer
"gone", and :func:`text` returns None for it.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from kmend.core.errors import Unable

#: What the kernel answers for something that went while it was looked at.
GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.ENOTDIR, errno.EINVAL, errno.EIO})


@dataclass(frozen=True, slots=True)
class Place:
    """The roots of the kernel's own file systems; tests bring trees of their own."""

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")
    dev: Path = Path("/dev")
    run: Path = Path("/run")

    @property
    def livepatch(self) -> Path:
        """The folder with one folder per patch."""
        return self.sys / "kernel/livepatch"

    @property
    def modules(self) -> Path:
        """The folder with one folder per module."""
        return self.sys / "module"

    def module(self, name: str) -> Path:
        """A module's folder; built-in modules may have one too, without ``initstate``."""
        return self.modules / name


def text(path: Path | str) -> str | None:
    """A file's contents without the final newline; None when it is gone or was never there.

    Raises:
        Unable: (rule ``not-permitted``) this user may not read it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # one read of a seq_file gives at most its buffer
            chunks = []
            while chunk := os.read(fd, 1 << 16):
                chunks.append(chunk)
        finally:
            os.close(fd)
    except PermissionError as error:
        raise not_permitted(path) from error
    except OSError as error:
        if error.errno in GONE:
            return None
        raise Unable(f"{path} cannot be read", why=error.strerror or str(error), rule="unreadable") from error
    return b"".join(chunks).decode(errors="replace").rstrip("\n")


def data(path: Path | str) -> bytes | None:
    """As :func:`text`, but bytes."""
    try:
        return Path(path).read_bytes()
    except PermissionError as error:
        raise not_permitted(path) from error
    except OSError as error:
        if error.errno in GONE:
            return None
        raise Unable(f"{path} cannot be read", why=error.strerror or str(error), rule="unreadable") from error


def optional(path: Path | str) -> str | None:
    """As :func:`text`; also None when this user may not read it."""
    try:
        return text(path)
    except Unable:
        return None


def flag(path: Path) -> bool | None:
    """A file that holds 0 or 1 (or N or Y); None when it is gone, unreadable, or holds something else."""
    match optional(path):
        case "0" | "N":
            return False
        case "1" | "Y":
            return True
        case _:
            return None


def entries(path: Path) -> list[str]:
    """The names in a folder, sorted; none when it is gone.

    Raises:
        Unable: (rule ``not-permitted``) this user may not list it.
    """
    try:
        return sorted(os.listdir(path))  # noqa: PTH208 - names alone: a Path for each of 5,000 tasks costs
    except PermissionError as error:
        raise not_permitted(path) from error
    except OSError as error:
        if error.errno in GONE:
            return []
        raise Unable(f"{path} cannot be read", why=error.strerror or str(error), rule="unreadable") from error


def is_folder(path: Path) -> bool:
    """Whether it is a folder now; False also when it cannot be looked at."""
    try:
        return path.is_dir()
    except OSError:
        return False


def not_permitted(path: Path | str) -> Unable:
    """The error for what this user may not read."""
    return Unable(
        f"{path} may not be read by this user",
        why="the kernel shows it to root alone",
        next_step="run kmend as root",
        rule="not-permitted",
    )
