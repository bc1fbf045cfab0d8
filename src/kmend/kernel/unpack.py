"""Packages into folders, streamed: nothing but the result touches the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kmend.core.errors import Failed
from kmend.kernel.work import Work

#: Of the image package: documentation and packaging notes serve no stage.
_NOT_WANTED = ("./usr/share",)


def unpack_deb(work: Work, deb: Path, into: Path) -> None:
    """Unpack the files of a Debian package below ``into`` (made when absent), documentation left out.

    Raises:
        Failed: the package is damaged, or the disk is full.
    """
    _make(into)
    excludes = [f"--exclude={name}" for name in _NOT_WANTED]
    with _of(deb):
        work.shell(
            'dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --no-same-owner "${@:3}"', deb, into, *excludes
        )


def unpack_source(work: Work, deb: Path, into: Path) -> None:
    """Unpack the kernel source of a ``linux-source-X.Y`` package into ``into``, its top folder removed.

    The package holds one file that matters, ``usr/src/linux-source-X.Y.tar.xz`` (a multi-block xz:
    it unpacks on several processors). It is never written to the disk.

    Raises:
        Failed: the package is damaged or holds no source archive, or the disk is full.
    """
    _make(into)
    with _of(deb):
        work.shell(
            'dpkg-deb --fsys-tarfile "$1"'
            " | tar -x -O --wildcards './usr/src/linux-source-*.tar.xz'"
            ' | xz -d -c -T "$3"'
            ' | tar -x -C "$2" --strip-components=1 --no-same-owner',
            deb,
            into,
            str(work.jobs),
        )
    if not (into / "Makefile").is_file():
        raise Failed(
            f"{deb.name} holds no kernel source",
            why="the archive in it has no Makefile in its top folder",
            rule="bad-package",
        )


def decompress_modules(work: Work, modules: Path) -> None:
    """Turn ``*.ko.xz`` and ``*.ko.zst`` (Debian 13 and later) into ``*.ko``; others stay."""
    for suffix, tool in (("xz", ["xz", "-d"]), ("zst", ["zstd", "-d", "-q", "--rm"])):
        if next(modules.rglob(f"*.ko.{suffix}"), None) is not None:
            work.shell(
                f'find "$1" -name "*.ko.{suffix}" -print0 | xargs -0 -n 64 -P "$2" -- "${{@:3}}"',
                modules,
                str(work.jobs),
                *tool,
            )


@contextmanager
def _of(deb: Path) -> Iterator[None]:
    """Name the package in the error of a pipeline (the shell that ran it tells nobody anything)."""
    try:
        yield
    except Failed as error:
        if error.rule != "subprocess":
            raise
        raise Failed(
            f"the package {deb.name} is not what was expected: it cannot be unpacked",
            why=error.why,
            next_step="check the release's name; if it is right, please report this",
            rule="bad-package",
        ) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failed(
            f"{folder} cannot be made",
            why=error.strerror or str(error),
            next_step="make the folder writable, or name another cache: KMEND_CACHE=DIR",
            rule="unwritable",
        ) from error
