"""Reading the files that a user names: each failure is one clear sentence."""

from __future__ import annotations

from pathlib import Path

from kmend.core.errors import UsageError


def read_file(name: str, what: str) -> bytes:
    """The contents of a file that the user named; ``what`` it should be goes into the message.

    Raises:
        UsageError: it is a folder, is not there, or cannot be read.
    """
    path = Path(name)
    if path.is_dir():
        raise UsageError(
            f"{name} is a folder", why=f"{what} is needed", next_step=f"name {what}", rule="not-a-file"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{name} cannot be read",
            why=error.strerror or str(error),
            next_step=f"name {what}",
            rule="unreadable",
        ) from error
