"""Which compiled units a patch reaches, and which of its files cannot be live patched at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from kmend.core.errors import Refusal, Refused
from kmend.core.target import Linkage, Unit
from kmend.patch.apply import Applied, AppliedFile
from kmend.patch.items import added_names


class UnitLookup(Protocol):
    """What kbuild knows of a target's units (``kmend.kernel.kbuild.UnitMap``)."""

    def units(self, source: str, /) -> tuple[Unit, ...]:
        """Every unit that is compiled from the source file; empty when it is compiled by none."""

    def includers(self, source: str, /) -> tuple[str, ...]:
        """The C files that include this one by name (``#include "x.c"``)."""

    def explain_absent(self, source: str, /) -> str:
        """Why no unit is compiled from the source file in this configuration."""

    def including(self, header: str, /) -> tuple[Unit, ...]:
        """Every unit that may include the header, through others as well; too many rather than too few."""

    def mentioning(self, names: Iterable[str], /) -> frozenset[str]:
        """The C files and headers of the unpatched tree in which one of the names stands."""


@dataclass(frozen=True, slots=True)
class ReachedFile:
    """A changed file and the units that are compiled from it, directly or through an ``#include``."""

    path: str
    units: tuple[Unit, ...]


@dataclass(frozen=True, slots=True)
class Reach:
    """What a patch can change: ``units`` that are compiled from its C files, without repetition, in their
    order; ``candidates`` beside them, which may include one of its headers."""

    files: tuple[ReachedFile, ...]
    units: tuple[Unit, ...]
    candidates: tuple[Unit, ...] = ()
    warnings: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class PathRule:
    """A row: which paths, the rule, why it cannot be done, what to do instead."""

    rule: str
    matches: Callable[[PurePosixPath], bool]
    why: str
    next_step: str


def under(*folders: str) -> Callable[[PurePosixPath], bool]:
    """Paths inside one of the folders."""
    return lambda path: any(path.is_relative_to(folder) for folder in folders)


def suffixed(*suffixes: str) -> Callable[[PurePosixPath], bool]:
    """Paths whose name ends so."""
    return lambda path: path.name.endswith(suffixes)


def is_build_file(path: PurePosixPath) -> bool:
    """Files that steer kbuild or from which it generates code."""
    return (
        path.name in {"Makefile", "Kbuild"}
        or path.name.startswith(("Makefile.", "Kbuild.", "Kconfig"))
        or path.name.endswith(GENERATES)
        or (path.parts[0] == "scripts" and path.name.endswith((".include", ".sh")))
    )


#: Suffixes from which the build generates source or steers the link.
GENERATES = (
    ".lds",
    ".lds.S",
    ".tbl",
    ".awk",
    ".asn1",
    ".l",
    ".y",
    ".mk",
    ".uc",
    ".keys",
    ".config",
    "_defconfig",
)

#: Never part of the kernel's code; a change there is noted and passed over. ``tools`` and
#: ``scripts`` hold programs of the build and of user space.
NOT_COMPILED = (
    PathRule(
        "not-compiled",
        under("Documentation", "LICENSES", "tools", ".github"),
        "files there are not part of the kernel's code",
        "nothing needs to be done",
    ),
    PathRule(
        "not-compiled",
        suffixed(".rst", ".txt", ".md", ".yaml", ".json", ".gitignore", ".mailmap", ".clang-format"),
        "a file of this kind is not part of the kernel's code",
        "nothing needs to be done",
    ),
    PathRule(
        "not-compiled",
        lambda path: len(path.parts) == 1 and path.name in {"MAINTAINERS", "CREDITS", "COPYING", "README"},
        "the file is not part of the kernel's code",
        "nothing needs to be done",
    ),
    PathRule(
        "not-compiled",
        lambda path: path.parts[0] == "scripts" and path.suffix in {".c", ".h", ".py", ".pl"},
        "it is a program of the build, which is not run again for a live patch",
        "nothing needs to be done",
    ),
)

#: Refused by name, first match wins. The first three are asked only of files that no unit is compiled from.
OUTSIDE_UNITS = (
    PathRule(
        "vdso",
        under("arch/x86/entry/vdso", "lib/vdso"),
        "the vDSO runs in user space, mapped into every process; livepatch cannot replace it",
        "leave this file out, or boot a fixed kernel",
    ),
    PathRule(
        "boot-code",
        under(
            "arch/x86/boot", "arch/x86/realmode", "arch/x86/purgatory", "drivers/firmware/efi/libstub", "usr"
        ),
        "it runs before the kernel proper or outside it, and is over when a live patch comes",
        "leave this file out, or boot a fixed kernel",
    ),
)
REFUSED = (
    PathRule(
        "build-system-change",
        is_build_file,
        "it changes how the kernel is built or generated; the running kernel was built without it",
        "make the change in C files alone",
    ),
    PathRule(
        "asm-unit",
        suffixed(".S", ".s"),
        "assembler code has no entry through which ftrace could redirect it",
        "make the change in C, in front of or behind the assembler code",
    ),
    PathRule(
        "rust-unit",
        suffixed(".rs"),
        "units in Rust are not understood",
        "make the change in C files",
    ),
)


def reach(applied: Applied, lookup: UnitLookup) -> Reach:
    """Find the units of every changed file.

    Raises:
        Refused: with every file that cannot be live patched (``asm-unit``,
            ``vdso``, ``boot-code``, ``build-system-change``, ``rust-unit``, ``library-member``,
            ``deleted-unit``), or ``not-compiled`` when no changed file is compiled at all.
    """
    refusals: list[Refusal] = []
    warnings: list[Refusal] = []
    files: list[ReachedFile] = []
    for file in applied.files:
        if file.mode_change is not None:
            old, new = file.mode_change
            warnings.append(
                Refusal("mode-change", f"{file.path}: mode {old} to {new}", "a mode is not compiled", "")
            )
        if file.old == file.new:
            continue
        _one(file, lookup, files, refusals, warnings)
    if not refusals and not files:
        refusals = [
            Refusal(
                "not-compiled",
                row.what,
                row.why,
                "the change has no effect on this kernel; check --kernel and the patch",
            )
            for row in warnings
            if row.rule == "not-compiled"
        ] or [
            Refusal(
                "nothing-to-compile",
                "the patches change no file's content",
                "taken together they leave every file as it is",
                "check which patches were meant",
            )
        ]
    if refusals:
        raise Refused(refusals)
    units = tuple(dict.fromkeys(u for file in files if not is_header(file.path) for u in file.units))
    certain = set(units)
    certain_files = {u.source for u in units}
    quiet = _only_add([f for f in applied.files if is_header(f.path)], certain_files, lookup)
    candidates = dict.fromkeys(
        u for file in files if is_header(file.path) and file.path not in quiet for u in file.units
    )
    return Reach(tuple(files), units, tuple(u for u in candidates if u not in certain), tuple(warnings))


def _only_add(headers: list[AppliedFile], certain: set[str], lookup: UnitLookup) -> frozenset[str]:
    """The headers whose change only adds names that nobody used: no unit but the ``certain`` ones sees it."""
    added = {
        file.path: names
        for file in headers
        if file.old is not None
        and file.new is not None
        and (names := added_names(file.old, file.new)) is not None
    }
    names = frozenset().union(*added.values())
    if not names:
        return frozenset(added)
    elsewhere = lookup.mentioning(names) - certain
    return frozenset() if elsewhere else frozenset(added)


def is_header(path: str) -> bool:
    """Whether a file is included and never compiled by itself."""
    return path.endswith((".h", ".inc"))


def _one(
    file: AppliedFile,
    lookup: UnitLookup,
    files: list[ReachedFile],
    refusals: list[Refusal],
    warnings: list[Refusal],
) -> None:
    """Sort one changed file into reached, refused or passed over."""
    path = PurePosixPath(file.path)
    for rule in NOT_COMPILED:
        if rule.matches(path):
            warnings.append(_row(rule, file.path))
            return
    for rule in REFUSED:
        if rule.matches(path):
            # assembler and headers of the vDSO and of boot code are called by what they belong to
            special = next((row for row in OUTSIDE_UNITS if row.matches(path)), rule)
            refusals.append(_row(special if rule.rule != "build-system-change" else rule, file.path))
            return
    if is_header(file.path):
        units = lookup.including(file.path) or units_of(file.path, lookup)
    else:
        units = units_of(file.path, lookup)
    if not units:
        for rule in OUTSIDE_UNITS:
            if rule.matches(path):
                refusals.append(_row(rule, file.path))
                return
        why = (
            "no makefile compiles the new file, and no compiled file includes it"
            if file.old is None
            else "no compiled unit includes it"
            if is_header(file.path)
            else lookup.explain_absent(file.path)
        )
        warnings.append(
            Refusal(
                "not-compiled",
                f"{file.path} is not compiled into this kernel",
                why,
                "nothing needs to be done if the change does not matter here",
            )
        )
        return
    if file.new is None and not is_header(file.path):
        refusals.append(
            Refusal(
                "deleted-unit",
                f"{file.path} is deleted or renamed",
                f"{', '.join(unit.obj for unit in units)} is compiled from it, and code cannot be taken away "
                "from a running kernel",
                "keep the file and change its functions instead",
            )
        )
        return
    if is_header(file.path):
        files.append(ReachedFile(file.path, units))
        return
    members = [unit for unit in units if unit.linkage is Linkage.LIBRARY]
    refusals.extend(
        Refusal(
            "library-member",
            f"{file.path}: {unit.obj} is a member of lib.a",
            "the linker takes such a unit only where it is wanted, and the build does not say which it took",
            "replace the function's callers instead",
        )
        for unit in members
    )
    if not members:
        files.append(ReachedFile(file.path, units))


def units_of(path: str, lookup: UnitLookup) -> tuple[Unit, ...]:
    """Units compiled from ``path`` itself or from a C file that includes it, at any distance."""
    found: dict[Unit, None] = {}
    seen = {path}
    waiting = [path]
    while waiting:
        source = waiting.pop(0)
        found.update(dict.fromkeys(lookup.units(source)))
        for includer in lookup.includers(source):
            if includer not in seen:
                seen.add(includer)
                waiting.append(includer)
    return tuple(found)


def _row(rule: PathRule, path: str) -> Refusal:
    return Refusal(rule.rule, path, rule.why, rule.next_step)
