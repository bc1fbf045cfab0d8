"""Drivers that a guest of the lab needs and the kernel's flavour lacks, built from the target's own source.

Debian's cloud flavours have virtio and overlayfs but no 9p, through which a guest sees the host's files. The
prepared tree has the source of it, and everything that an external module of exactly this kernel needs; so
the lab's guests get modules that nobody else is ever given. The kernel under trial stays the stock one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Unable
from kmend.core.files import locked, scratch_folder
from kmend.core.progress import Progress
from kmend.core.run import run
from kmend.core.target import Target
from kmend.kernel import prepare

#: Below the target's folder: the modules, and a ``modules.dep`` of their own.
FOLDER = "lab-drivers"


@dataclass(frozen=True, slots=True)
class Driver:
    """A row: the module, the folder of its source, the option that its Makefile asks for."""

    name: str
    folder: str
    option: str


DRIVERS = (
    Driver("9pnet", "net/9p", "CONFIG_NET_9P"),
    Driver("9pnet_virtio", "net/9p", "CONFIG_NET_9P_VIRTIO"),
    Driver("9p", "fs/9p", "CONFIG_9P_FS"),
)
#: What the same Makefiles could add and a guest does not need.
_WITHOUT = ("CONFIG_NET_9P_FD", "CONFIG_NET_9P_XEN", "CONFIG_NET_9P_RDMA", "CONFIG_NET_9P_USBG",
            "CONFIG_9P_FSCACHE", "CONFIG_9P_FS_POSIX_ACL")  # fmt: skip


def provide(config: Config, target: Target, progress: Progress) -> Path | None:
    """The folder with the drivers that the target lacks, built when it is not there (10 s); None: it has all.

    Raises:
        Unable: rule ``no-lab-kernel``: they cannot be built, or the kernel would not load them.
        Failed: the cache cannot be written.
    """
    if target.modules is None:
        return None
    try:
        there = _known(target.modules)
    except OSError:
        return None  # who boots the kernel says what is wrong with its modules
    lacking = tuple(row for row in DRIVERS if row.name not in there)
    if not lacking:
        return None
    folder = target.folder / FOLDER
    try:
        with locked(target.folder / f".{FOLDER}.lock"):
            if (folder / "modules.dep").is_file():
                return folder
            names = ", ".join(row.name for row in lacking)
            progress.step(f"building drivers that {target.release} lacks and its guests need: {names}")
            with scratch_folder(target.folder, FOLDER) as scratch:
                _build(config, target, lacking, scratch)
                shutil.rmtree(folder, ignore_errors=True)
                (scratch / "made").rename(folder)
    except OSError as error:
        raise prepare.os_error(error) from error
    return folder


def _known(modules: Path) -> frozenset[str]:
    """The names of all modules, built-in ones included."""
    lines = (modules / "modules.dep").read_text().splitlines()
    builtin = modules / "modules.builtin"
    if builtin.exists():
        lines += builtin.read_text().splitlines()
    return frozenset(_name(line.partition(":")[0]) for line in lines)


def _name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _build(config: Config, target: Target, lacking: tuple[Driver, ...], scratch: Path) -> None:
    """Make the folder ``made`` in ``scratch``: stripped modules and their ``modules.dep``."""
    names = ", ".join(row.name for row in lacking)
    if re.search(r"^CONFIG_MODULE_SIG_FORCE=y$", target.config.read_text(), re.MULTILINE):
        raise _not(target, names, "it only loads signed modules, so it cannot be given them")
    tree, made = scratch / "tree", scratch / "made"
    made.mkdir()
    tree.mkdir()
    folders = {row.folder: row.folder.replace("/", "-") for row in lacking}
    for source, copy in folders.items():
        if not (target.source / source / "Makefile").is_file():
            raise _not(target, names, f"its source has no {source}")
        shutil.copytree(target.source / source, tree / copy)
    (tree / "Kbuild").write_text(f"obj-m := {' '.join(f'{copy}/' for copy in folders.values())}\n")
    options = [f"{row.option}={'m' if row in lacking else ''}" for row in DRIVERS]
    options += [f"{option}=" for option in _WITHOUT]
    try:
        run(
            [
                *("make", "-s", f"-j{config.jobs}", f"M={tree}"),
                *prepare.make_variables(target),
                *options,
                "modules",
            ],
            cwd=target.source,
        )
        for row in lacking:
            run(["strip", "--strip-debug", "-o", made / f"{row.name}.ko",
                 tree / folders[row.folder] / f"{row.name}.ko"])  # fmt: skip
    except Failed as error:
        raise _not(target, names, f"they could not be built from its source: {error.why}") from error
    contents = {row.name: (made / f"{row.name}.ko").read_bytes() for row in lacking}
    assert target.modules is not None
    rows = dependencies((target.modules / "modules.dep").read_text(), contents)
    (made / "modules.dep").write_text(rows)


def dependencies(table: str, modules: Mapping[str, bytes]) -> str:
    """Rows as depmod writes them (all that is needed, the first to load last) for ``modules``.

    ``table`` is the kernel's own ``modules.dep``; ``modules`` are contents by name (the file is ``NAME.ko``).

    Raises:
        Failed: rule ``bad-module``: a module needs one that is in neither.
    """
    theirs = {
        _name(path): [*reversed(rest.split()), path]
        for path, colon, rest in (line.partition(":") for line in table.splitlines())
        if colon
    }

    def order(name: str) -> Iterable[str]:
        if name in theirs:
            return theirs[name]
        if name not in modules:
            raise Failed(
                f"a driver for the lab needs the module {name}",
                why="the kernel has no such module",
                next_step="please report this",
                rule="bad-module",
            )
        match = re.search(rb"(?:^|\0)depends=([^\0]*)\0", modules[name])
        found: dict[str, None] = {}
        for needed in (match[1].decode() if match else "").split(","):
            if needed:
                found.update(dict.fromkeys(order(needed.replace("-", "_"))))
        return [*found, f"{name}.ko"]

    rows = {name: list(order(name)) for name in modules}
    return "".join(f"{row[-1]}: {' '.join(reversed(row[:-1]))}".rstrip() + "\n" for row in rows.values())


def _not(target: Target, names: str, why: str) -> KmendError:
    return Unable(
        f"{target.release} cannot be a guest",
        why=f"it has no drivers {names}, and {why}",
        next_step="try the patch on another flavour of the same version, or on a test machine",
        rule="no-lab-kernel",
    )
