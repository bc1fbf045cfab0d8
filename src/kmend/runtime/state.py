"""The state folder: made with rights that loading at boot accepts."""

from __future__ import annotations

from pathlib import Path

#: Nobody but its owner writes there: whoever does decides what runs in the kernel.
MODE = 0o755


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, with :data:`MODE` whatever the umask.

    What is there already stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        try:
            path.mkdir(MODE)
        except FileExistsError:
            if not path.is_dir():
                raise
        else:
            path.chmod(MODE)
