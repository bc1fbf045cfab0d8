"""From a patch applied in memory to pairs of objects: which units it reaches, each compiled twice.

A header's change may reach thousands of units; those for which it makes no difference are left out
before anything is compiled: :mod:`kmend.patch.items` says how that is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.core.config import Config
from kmend.core.errors import Failed, Refusal, Refused
from kmend.core.progress import Progress
from kmend.core.target import Linkage, Target, Unit
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild, overlay
from kmend.patch.apply import Applied
from kmend.patch.items import unseen
from kmend.patch.lines import with_line_control
from kmend.patch.reach import Reach, reach

if TYPE_CHECKING:
    from kmend.diff.unit import UnitObject
    from kmend.kernel.kbuild import CompileCommand


#: Lines and offsets in a warning: they move with the patch.
_DIGITS = re.compile(r"0x[0-9a-f]+|\d+")


def include_flags() -> tuple[str, ...]:
    """Lets patched code find ``kmend.h``, ``kpatch-macros.h`` and ``kpatch-syscall.h``, after all else."""
    return ("-idirafter", str(Path(__file__).parent / "module" / "include"))


def reached_by(applied: Applied, target: Target, progress: Progress) -> Reach:
    """The units that the patch reaches, or may reach through a header.

    Raises:
        Refused: a file of the patch is none that a live patch can change.
    """
    return reach(applied, _Lookup(target, progress))


class _Lookup:
    """What :func:`kmend.patch.reach.reach` asks of the target; the header index is read on first use."""

    def __init__(self, target: Target, progress: Progress) -> None:
        self.target, self.progress = target, progress
        self.map = kbuild.unit_map(target)

    def units(self, source: str) -> tuple[Unit, ...]:
        return self.map.units(source)

    def includers(self, source: str) -> tuple[str, ...]:
        return self.map.includers(source)

    def explain_absent(self, source: str) -> str:
        return self.map.explain_absent(source)

    def including(self, header: str) -> tuple[Unit, ...]:
        from kmend.kernel import headers

        return headers.units_reached(self.target, [header], self.progress)

    def mentioning(self, names: Iterable[str]) -> frozenset[str]:
        from kmend.kernel import headers

        return headers.mentioning(self.target, names, self.progress)


@dataclass(frozen=True, slots=True)
class Pair:
    """One unit, its original and its patched object."""

    unit: Unit
    old: UnitObject
    new: UnitObject


@dataclass(slots=True)
class Compiler:
    """Compiles what a patch reaches; ``scratch`` is a folder for this run only.

    ``warnings`` collects what was passed over.
    """

    config: Config
    target: Target
    scratch: Path
    progress: Progress
    warnings: list[Refusal] = field(default_factory=list)

    def pairs(self, applied: Applied, reached: Reach, meanwhile: Callable[[], None]) -> list[Pair]:
        """Original and patched object of every unit; ``meanwhile`` is called once, as the compilers run.

        Raises:
            Refused: ``library-member``: a header change reaches code that cannot be live patched;
                ``compile-error``.
            Failed: the overlay cannot be made, or something was read around it.
        """
        files = {
            file.path: with_line_control(file.new, file.origins)
            if file.new and file.old is not None
            else file.new
            for file in applied.files
            if file.new != file.old
        }
        compiled = tuple(u for u in reached.candidates if u.source.endswith(".c"))
        commands = kbuild.commands(self.target, (*reached.units, *compiled))
        sources = [command.source for command in commands.values()]
        tree = overlay.make_overlay(self.target.source, files, self.scratch / "tree", also=sources)
        affected = self._affected(reached, commands, files, tree)
        made = compiling.compile_pairs(
            self.config,
            self.target,
            {unit: commands[unit] for unit in (*reached.units, *affected)},
            patched_tree=tree,
            out=self.scratch / "patched",
            progress=self.progress,
            extra_flags=compiling.SPLIT_WITH_TYPES,
            patched_flags=include_flags(),
            meanwhile=meanwhile,
        )
        from kmend.diff.unit import UnitObject

        out = []
        for unit, pair in made.items():
            self._only_patched(unit, tree, files, pair.patched.deps)
            old = UnitObject.parse(pair.original.path.read_bytes(), f"{unit.obj} (original)")
            new = UnitObject.parse(pair.patched.path.read_bytes(), f"{unit.obj} (patched)")
            out.append(Pair(unit, old, new))
            self._new_warnings(unit, pair)
        return out

    def _new_warnings(self, unit: Unit, pair: compiling.Pair) -> None:
        """What the compiler and objtool say of the patched unit and did not say of the original."""
        known = {_DIGITS.sub("", line) for line in pair.original.warnings}
        self.warnings += [
            Refusal("compiler-warning", unit.source, line, "look at the line")
            for line in pair.patched.warnings
            if _DIGITS.sub("", line) not in known
        ]

    def as_built(self, unit: Unit) -> UnitObject:
        """The original unit without ``-ffunction-sections``, exactly as the kernel was built."""
        from kmend.diff.unit import UnitObject

        command = kbuild.commands(self.target, [unit])[unit]
        made = compiling.compile_unit(
            self.target, unit, command, tree=self.target.source, out=self.scratch / "plain", extra_flags=()
        )
        return UnitObject.parse(made.path.read_bytes(), f"{unit.obj} (as the kernel was built)")

    def _only_patched(
        self, unit: Unit, tree: Path, files: Mapping[str, bytes | None], deps: Sequence[str]
    ) -> None:
        """Make sure that nothing was read around the overlay."""
        behind = overlay.read_behind(tree, self.target.source, files, deps)
        if behind:
            raise Failed(
                f"{unit.obj} was compiled with the unpatched {behind[0]}",
                why="the file was reached by a path that leads around the patched copy",
                next_step="report the patch",
                rule="overlay",
            )

    def _affected(
        self,
        reached: Reach,
        commands: Mapping[Unit, CompileCommand],
        files: Mapping[str, bytes | None],
        tree: Path,
    ) -> tuple[Unit, ...]:
        """Those candidates that can see a difference after preprocessing.

        Raises:
            Refused: ``library-member``: it changes one that cannot be live patched.
        """
        if not reached.candidates:
            return ()
        compiled = tuple(u for u in reached.candidates if u in commands)
        differing = compiling.differing_units(
            self.config,
            self.target,
            {unit: commands[unit] for unit in compiled},
            patched_tree=tree,
            scratch=self.scratch,
            progress=self.progress,
            check=lambda unit, deps: self._only_patched(unit, tree, files, deps),
            same=unseen,
            patched_flags=include_flags(),
        )
        self.progress.step(
            f"{len(differing)} of {len(compiled)} units that may include a changed header can see the change"
        )
        refusals = [
            Refusal(
                "library-member",
                unit.obj,
                "the header change reaches a member of lib.a; which of them the kernel holds is not known",
                "keep the change out of what this unit includes",
            )
            for unit in differing
            if unit.linkage is Linkage.LIBRARY
        ]
        if refusals:
            raise Refused(refusals)
        assembly = [u for u in reached.candidates if u not in commands]
        if assembly:
            self.warnings.append(
                Refusal(
                    "asm-unit",
                    f"{len(assembly)} assembler files, {assembly[0].source} among them",
                    "they may include a changed header; assembler code is not compared and not replaced",
                    "make sure that the change does not concern them",
                )
            )
        return differing
