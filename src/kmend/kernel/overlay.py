"""A tree with some files replaced, made of symbolic links; the cached tree is never written.

gcc runs with the overlay as its working folder, so every path on its command line, every
``__FILE__`` and every relative ``#include`` is spelled as in the tree itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from kmend.core.errors import Failed, Refusal, Refused
from kmend.kernel.work import FULL, disk_full


def make_overlay(
    source: Path, files: Mapping[str, bytes | None], folder: Path, *, also: Iterable[str] = ()
) -> Path:
    """Make ``folder`` look like ``source`` with ``files`` replaced (None: absent) and return it.

    ``also`` names further files whose folders are made real ones: the sources of all units
    that are going to be compiled, as they are spelled on gcc's command line. The kernel
    resolves ``..`` in an ``#include`` after it has followed links: seen from a linked folder it
    would lead back into ``source`` and to the unchanged file. :func:`read_behind` checks
    afterwards that this did not happen.

    Raises:
        Failed: ``overlay``: the folder exists and is not empty, or cannot be written; ``disk-full``. Nothing
            is left of it.
        Refused: ``unsafe-path``: a path leaves the tree or leads through a symbolic link.
    """
    source = source.absolute()
    for path in files:
        inside(source, path)
    real: set[PurePosixPath] = {PurePosixPath(".")}
    for path in (*files, *also):
        real.update(_folders(path))
    try:
        if folder.exists() and any(folder.iterdir()):
            raise Failed(
                f"{folder} is not empty",
                why="an overlay is made in a folder of its own",
                next_step="remove the folder, or name another one",
                rule="overlay",
            )
        try:
            # shortest first: a folder is made before what lies in it
            for place in sorted(real, key=lambda path: len(path.parts)):
                _mirror(source / place, folder / place, place, real, files)
            for path, content in files.items():
                if content is not None:
                    (folder / path).write_bytes(content)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        if FULL.search(str(error)):
            raise disk_full(str(error)) from error
        raise Failed(
            f"the overlay {folder} cannot be written",
            why=error.strerror or str(error),
            next_step="free space, or name another cache with --cache",
            rule="overlay",
        ) from error
    return folder


def _folders(path: str) -> Iterator[PurePosixPath]:
    """Every folder that the kernel enters on the way to ``path``, which may hold ``..``."""
    place = PurePosixPath(".")
    for part in PurePosixPath(path).parts[:-1]:
        place = place.parent if part == ".." else place / part
        yield place


def _mirror(
    original: Path,
    copy: Path,
    place: PurePosixPath,
    real: set[PurePosixPath],
    files: Mapping[str, bytes | None],
) -> None:
    """One real folder, with links to everything in the original that is neither replaced nor real itself."""
    copy.mkdir(parents=True, exist_ok=True)
    if not original.is_dir():
        return  # a folder that the patch brings
    with os.scandir(original) as entries:
        for entry in entries:
            path = place / entry.name
            if path in real or str(path) in files:
                continue
            (copy / entry.name).symlink_to(entry.path)


def read_behind(
    overlay: Path, source: Path, files: Iterable[str], dependencies: Iterable[str]
) -> tuple[str, ...]:
    """Which ``dependencies`` (paths as gcc's ``-MD`` writes them, relative to the overlay) were read
    from ``source`` although the overlay replaces them. Must be empty, else an object is wrong.

    Files are told by their inode: one look each, where a unit reads a thousand of them."""
    replaced = {found for path in files if (found := _inode(source / path))}
    base = f"{overlay}/"  # gcc was run there; an absolute name stays what it is
    return tuple(path for path in dependencies if _inode(path if path[0] == "/" else base + path) in replaced)


def _inode(path: str | Path) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def inside(source: Path, path: str) -> Path:
    """The file that ``path`` means in the tree.

    Raises:
        Refused: ``unsafe-path``: absolute, with ``..``, or through a symbolic link.
    """
    pure = PurePosixPath(path)
    why = ""
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path:
        why = "the path leaves the source tree"
    else:
        place = source
        for part in pure.parts:
            place = place / part
            if place.is_symlink():
                why = f"{place.relative_to(source)} is a symbolic link"
                break
    if why:
        raise Refused(
            [Refusal("unsafe-path", path, why, "a patch may only name regular files inside the source tree")]
        )
    return source / pure


def tree_reader(source: Path) -> Callable[[str], bytes | None]:
    """How :func:`kmend.patch.apply.apply` reads a tree: content by path, None when there is no such file.

    The function raises:
        Refused: ``unsafe-path``.
        Failed: ``unreadable``.
    """

    def read(path: str) -> bytes | None:
        file = inside(source, path)
        try:
            return file.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise Failed(f"{file} cannot be read", why=error.strerror or "", rule="unreadable") from error

    return read
