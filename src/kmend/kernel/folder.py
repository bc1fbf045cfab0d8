"""A target's folder in the making: the lock on it, room for it, its indexes, its record, its removal.

What packaged targets (:mod:`kmend.kernel.store`) and custom ones (:mod:`kmend.kernel.custom`) share.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kmend.core.config import Config
from kmend.core.errors import KmendError
from kmend.core.files import write_atomically
from kmend.core.progress import Progress
from kmend.core.run import run
from kmend.core.target import Release, Target
from kmend.kernel import kallsyms, prepare, units
from kmend.kernel import modules as modules_index
from kmend.kernel.prepared import INDEXES, SCHEMA
from kmend.kernel.work import Shared, Work, disk_full, owned

#: Bytes that a target needs besides its packages: source 1.5 GB, vmlinux and indexes 0.2 GB (measured).
SOURCE_ROOM = 1_750_000_000
#: Files and folders of one source tree and one image, rounded up (83,000 + 5,000 for 6.1; 6.12 has more).
INODES = 110_000


@contextmanager
def working(config: Config, key: Release, progress: Progress) -> Iterator[Work]:
    """Hold the lock of one target; errors of the system leave as ours."""
    try:
        config.targets.mkdir(parents=True, exist_ok=True)
        with owned(
            config.targets / f".{key}.lock",
            on_wait=lambda: progress.step(f"another kmend is preparing {key}; waiting for it"),
        ) as lock:
            work = Work(progress=Shared(progress), lock=lock, jobs=config.jobs)
            try:
                yield work
            except BaseException:
                work.children.stop()
                raise
    except OSError as error:
        raise prepare.os_error(error) from error


def write_target(target: Target, **record: object) -> None:
    """Write ``target.json``: from here on the target exists. Relative paths let a cache be moved."""
    names = ("source", "config", "symvers", "vmlinux", "vmlinuz", "modules")
    paths = {n: str(p.relative_to(target.folder)) for n in names if (p := getattr(target, n)) is not None}
    document = {
        "schema": SCHEMA,
        "release": target.release,
        "source_version": target.source_version,
        "banner": target.banner,
        "build_id": target.build_id,
        "compiler": target.compiler,
        **paths,
        **record,
        "indexes": INDEXES,
        "size": size_on_disk(target.folder),
    }
    write_atomically(target.folder / "target.json", as_json(document))


def size_on_disk(folder: Path) -> int | None:
    """Bytes that a folder takes on the disk (counts every file: a second or more); None: cannot be told."""
    try:
        result = run(["du", "-s", "-B1", "--", folder], check=False, timeout=300)
    except KmendError:
        return None
    first = result.text.split("\t", 1)[0]
    return int(first) if first.isdigit() else None


def as_json(document: object) -> bytes:
    """A record as its file holds it."""
    return (json.dumps(document, indent=1) + "\n").encode()


def need_room(config: Config, room: int) -> None:
    """Raise ``disk-full`` before anything is downloaded when the target cannot fit."""
    there = config.targets
    space = os.statvfs(there)
    free = space.f_bavail * space.f_frsize
    if free < room:
        raise disk_full(f"{there} has {free / 1e9:.2f} GB free, the kernel needs {room / 1e9:.2f} GB")
    if space.f_files and space.f_favail < INODES:
        raise disk_full(f"{there} has room for {space.f_favail} more files, the kernel needs {INODES}")


def remove_tree(work: Work, path: Path) -> None:
    """Remove a part, whatever it is; a child of ours does it, so that it ends with us."""
    if path.is_symlink() or path.exists():
        work.run(["rm", "-rf", "--", path])


def remove_quietly(*paths: Path) -> None:
    """Remove what can be removed, when something has failed already."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def index_image(target: Target, progress: Progress) -> None:
    """Index what is made of the image: its symbols and its modules."""
    kallsyms.build_index(target, progress)
    modules_index.build_index(target, progress)


def index_source(target: Target, progress: Progress) -> None:
    """Index what is made of the prepared source: the compiled units."""
    units.build_unit_index(target, progress)


def depmod(work: Work, root: Path, release: str) -> None:
    """Make ``modules.dep`` below ``root`` when the package has none (Debian makes it when installing)."""
    if not (root / "lib" / "modules" / release / "modules.dep").exists():
        work.run([prepare.find_program("depmod") or "depmod", "-b", root, release])
