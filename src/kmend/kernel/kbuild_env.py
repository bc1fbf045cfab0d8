"""kbuild without building: the environment that its top Makefile hands down, and directory calls.

The top-level Makefile costs 2-6 s per call; what it passes on to ``scripts/Makefile.build`` is
nothing but environment variables (``KBUILD_CFLAGS``, ``LINUXINCLUDE``, ``CC``, …). They are recorded
once, when the target is prepared; afterwards ``make -f scripts/Makefile.build obj=DIR`` runs
directly with them, some 20-50 ms a call, and evaluates the very rules of the kernel's makefiles.

``make -n`` does not execute recipes, so the prepared tree stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from kmend.core.errors import Failed
from kmend.core.files import write_atomically
from kmend.core.run import Result, environment, run
from kmend.core.target import Target

FILE = "kbuild-env.json"
_FORMAT = 2

#: A goal of ours inside of the top Makefile: what a recipe there sees is what a sub-make is given.
_PRINT_ENVIRONMENT = "kmend-environment: ; @env -0\n"

#: make's own state, and what belongs to the calling process and not to kbuild.
_NOT_KBUILD = {
    "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MAKE_TERMOUT", "MAKE_TERMERR", "GNUMAKEFLAGS",
    "PATH", "HOME", "TMPDIR", "PWD", "OLDPWD", "SHLVL", "SHELL", "_",
    "XDG_CACHE_HOME", "http_proxy", "https_proxy", "no_proxy",
}  # fmt: skip

#: Variables that a directory's makefile may extend for the directories below it
#: (``subdir-ccflags-y`` goes into the exported KBUILD_CFLAGS: scripts/Makefile.lib).
_INHERITED = re.compile(r"KBUILD_\w*FLAGS\w*|LINUXINCLUDE|NOSTDINC_FLAGS|\w*FLAGS\w*").fullmatch


@dataclass(frozen=True, slots=True)
class KbuildEnvironment:
    """What ``scripts/Makefile.build`` needs.

    ``variables`` is the top Makefile's environment, ``directories`` maps a directory to the
    variables that its parents changed for it, ``visited`` names every directory that kbuild
    descends into, ``builtin`` those of them whose objects are linked into vmlinux.
    ``vmlinux_objtool`` is objtool's command for vmlinux.o, without the file, where it runs on that
    (IBT kernels); else empty.
    """

    variables: Mapping[str, str]
    directories: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    visited: frozenset[str] = frozenset()
    builtin: frozenset[str] = frozenset()
    vmlinux_objtool: tuple[str, ...] = ()

    def inherited_names(self) -> tuple[str, ...]:
        """Names of the variables that a parent directory may have changed."""
        return tuple(sorted(name for name in self.variables if _INHERITED(name)))


def capture(target: Target, scratch: Path) -> KbuildEnvironment:
    """Ask the top Makefile for the environment of its sub-makes (one call, about 2 s).

    Raises:
        Failed: (rule ``kbuild``) make failed: the tree is not configured or not complete.
    """
    makefile = scratch / "environment.mk"
    write_atomically(makefile, _PRINT_ENVIRONMENT.encode())
    result = run(
        [
            "make", "-f", "Makefile", "-f", str(makefile), "-rR", "--no-print-directory",
            *overrides(target), "kmend-environment",
        ],
        cwd=target.source,
        check=False,
        timeout=120,
    )  # fmt: skip
    if result.status != 0:
        raise kbuild_failed(target, result)
    variables = {}
    # Messages of make itself come before env's output, on their own lines.
    for item in result.stdout.decode("utf-8", "surrogateescape").split("\0"):
        name, mark, value = item.rpartition("\n")[2].partition("=") if "\n" in item else item.partition("=")
        if mark and name not in _NOT_KBUILD:
            variables[name] = value
    if "KBUILD_CFLAGS" not in variables or "srctree" not in variables:
        raise Failed(
            f"kbuild's environment in {target.source} could not be read",
            why="the top Makefile exports no KBUILD_CFLAGS",
            next_step="check that the folder is a Linux source tree",
            rule="kbuild",
        )
    # A distribution builds image and modules in one go.
    variables["KBUILD_BUILTIN"] = variables["KBUILD_MODULES"] = "1"
    return KbuildEnvironment(variables)


def overrides(target: Target) -> tuple[str, ...]:
    """The command-line variables of every make call: the target's release and compiler."""
    return (f"KERNELRELEASE={target.release}", f"CC={target.compiler}")


def directory_make(
    target: Target,
    kbuild: KbuildEnvironment,
    directory: str,
    arguments: Sequence[str],
    *,
    dry: bool = True,
    timeout: float = 120.0,
    check: bool = True,
    keep: int | None = None,
) -> Result:
    """Run ``scripts/Makefile.build`` for one directory, as kbuild's own descent would.

    ``dry``: ``make -n``. ``keep``: a lock's descriptor that make holds with us.

    Raises:
        Failed: (rule ``kbuild``) make ended with an error (``check``).
    """
    result = run(
        [
            "make", *(["-n"] if dry else []), "-rR", "--no-print-directory",
            "-f", f"{kbuild.variables['srctree']}/scripts/Makefile.build", f"obj={directory}",
            f"need-builtin={'1' if directory in kbuild.builtin else ''}", "need-modorder=1",
            *overrides(target), *arguments,
        ],
        cwd=target.source,
        env=make_environment(kbuild, directory),
        clean_env=False,
        check=False,
        timeout=timeout,
        pass_fds=() if keep is None else (keep,),
    )  # fmt: skip
    if check and result.status != 0:
        raise kbuild_failed(target, result)
    return result


def make_environment(kbuild: KbuildEnvironment, directory: str = "") -> dict[str, str]:
    """The environment of a sub-make: scrubbed, kbuild's variables, the directory's own on top."""
    env = environment()
    del env["LC_ALL"]  # the top Makefile sets LC_COLLATE and LC_NUMERIC and unexports LC_ALL
    env.update(kbuild.variables)
    env.update(kbuild.directories.get(directory, {}))
    return env


def kbuild_failed(target: Target, result: Result) -> Failed:
    """make's last words as an error of ours."""
    lines = [line for line in (result.errors or result.text).strip().splitlines() if line.strip()]
    return Failed(
        f"kbuild failed in {target.source}",
        why="\n".join(lines[-6:]) or f"status {result.status}",
        next_step="prepare the target again: `kmend kernel fetch RELEASE`",
        rule="kbuild",
    )


def save(target: Target, kbuild: KbuildEnvironment) -> None:
    """Write the record into the target's folder."""
    document = {
        "format": _FORMAT,
        "variables": dict(kbuild.variables),
        "directories": {name: dict(changes) for name, changes in kbuild.directories.items() if changes},
        "visited": sorted(kbuild.visited),
        "builtin": sorted(kbuild.builtin),
        "vmlinux_objtool": list(kbuild.vmlinux_objtool),
    }
    write_atomically(target.folder / FILE, json.dumps(document, indent=0).encode("utf-8", "surrogateescape"))


def load(target: Target) -> KbuildEnvironment:
    """Read the record.

    Raises:
        Failed: (rule ``no-unit-index``) the target was not prepared to its end, or by another version.
    """
    path = target.folder / FILE
    try:
        status = path.stat()
    except OSError as error:
        raise no_index(path, str(error)) from error
    return _load(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _load(path: Path, _mtime: int, _size: int) -> KbuildEnvironment:
    try:
        document = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
        if document["format"] != _FORMAT:
            raise no_index(path, f"it has format {document['format']}")
        return KbuildEnvironment(
            document["variables"],
            document["directories"],
            frozenset(document["visited"]),
            frozenset(document["builtin"]),
            tuple(document["vmlinux_objtool"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise no_index(path, repr(error)) from error


def no_index(path: Path, why: str) -> Failed:
    """The error of an absent or damaged index file."""
    return Failed(
        f"{path} (the index of compiled units) cannot be used",
        why=why,
        next_step="prepare the target again: `kmend kernel fetch RELEASE`",
        rule="no-unit-index",
    )
