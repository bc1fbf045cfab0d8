"""Files that kbuild generates before it compiles a unit: ``lib/crc32table.h``, SELinux's ``flask.h`` …

``make modules_prepare`` makes only what modules outside of the tree need. About a hundred units
(6.1, amd64) need more: a table or a header that a makefile generates in the unit's own directory.
They are made by kbuild's own rules, for that directory alone, when the target is prepared; a
file is only ever added to the tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kmend.core.errors import Failed
from kmend.core.files import locked
from kmend.core.target import Target
from kmend.kernel import kbuild_env
from kmend.kernel.kbuild_env import KbuildEnvironment

#: A rule of a makefile of its own: only those can give a unit a prerequisite besides its source.
_RULE = re.compile(r"^\$\((?:obj|addprefix \$\(obj\)|call )[^=\n]*:(?:[^=\n]|$)", re.MULTILINE)

_PRINT_MISSING = "if_changed_rule=$(info @kmend-missing $(filter-out FORCE $(wildcard $^),$^))@:"


def prepare(
    target: Target, kbuild: KbuildEnvironment, objects: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """Make what the units (``objects``: directory to objects) need; returns the files made.

    A file that cannot be made (a tool is missing) is passed over here: whoever compiles a unit that
    needs it is told then (:func:`make`).
    """
    made: list[str] = []
    for directory, group in objects.items():
        folder = target.source / directory
        makefile = folder / "Kbuild" if (folder / "Kbuild").exists() else folder / "Makefile"
        if not _RULE.search(makefile.read_text(errors="replace")):
            continue
        result = kbuild_env.directory_make(
            target, kbuild, directory, ["-k", _PRINT_MISSING, *group], check=False
        )
        missing = sorted(
            {
                name
                for line in result.text.splitlines()
                if line.startswith("@kmend-missing ")
                for name in line.split()[1:]
            }
        )
        if missing:
            kbuild_env.directory_make(target, kbuild, directory, ["-k", *missing], dry=False, check=False)
            made += [name for name in missing if (target.source / name).exists()]
    return tuple(made)


def make(target: Target, kbuild: KbuildEnvironment, directory: str, files: Iterable[str]) -> None:
    """Make the files now, under a lock, unless they are there.

    Raises:
        Failed: (rule ``kbuild``) with make's words.
    """
    with locked(target.folder / "generate.lock") as lock:
        wanted = [name for name in files if not _exists(target.source, name)]
        if not wanted:
            return
        kbuild_env.directory_make(target, kbuild, directory, wanted, dry=False, timeout=300, keep=lock)
        for name in wanted:
            if not _exists(target.source, name):
                raise Failed(
                    f"{name} was not generated",
                    why="kbuild's rule for it ended without an error and without the file",
                    next_step=f"make it by hand in {target.source}",
                    rule="kbuild",
                )


def _exists(tree: Path, name: str) -> bool:
    return (tree / name).exists()
