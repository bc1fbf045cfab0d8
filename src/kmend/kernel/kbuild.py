"""The exact compiler and objtool command of a unit, as kbuild itself would run it.

``scripts/Makefile.build`` is run for the unit's own directory with the recorded environment
(:mod:`kmend.kernel.kbuild_env`) and ``make -n``; its rule for objects is replaced on the command
line by one that prints what the rule would use: ``$(CC) $(c_flags)``, ``$<``, objtool's arguments.
So every peculiarity of a makefile (``CFLAGS_foo.o``, ``ccflags-remove-y``, target-specific
variables) is evaluated by make and not by us. 20-50 ms for a directory; cached per unit.

The unit map (:mod:`kmend.kernel.units`) is offered here as well.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kmend.core.errors import Failed
from kmend.core.files import write_atomically
from kmend.core.target import Target, Unit
from kmend.kernel import generated, kbuild_env
from kmend.kernel.kbuild_env import KbuildEnvironment
from kmend.kernel.units import UnitMap, build_unit_index, unit_map

__all__ = [
    "CompileCommand",
    "UnitMap",
    "build_unit_index",
    "commands",
    "module_command",
    "module_commands",
    "unit_map",
]

_CACHE = "commands"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class CompileCommand:
    """How one unit is compiled; relative paths are relative to the tree, where the compiler is run.

    ``compiler`` is gcc's argument list without ``-c``, ``-o``, the dependency output and the
    source; ``source`` is the source argument in kbuild's spelling (it reaches ``__FILE__``).
    ``objtool`` is objtool's argument list without the object file, or None for a unit that it does
    not look at (``OBJECT_FILES_NON_STANDARD``). ``late_objtool``: this kernel runs objtool on
    vmlinux.o or on the linked module instead (``delay-objtool``: IBT, LTO), with these arguments.
    ``defines_module``: compiled for a loadable module (``-DMODULE``).
    """

    compiler: tuple[str, ...]
    source: str
    objtool: tuple[str, ...] | None
    late_objtool: bool
    defines_module: bool


#: Replaces Kbuild.include's ``if_changed_rule`` (used for objects compiled from C and assembly, and
#: for modules of several objects). $(info) speaks while make expands the recipe, also under -n.
_PRINT_RULE = (
    "if_changed_rule="
    "$(info @kmend-object $@)"
    "$(info @kmend-source $<)"
    "$(info @kmend-missing $(filter-out FORCE $(wildcard $^),$^))"
    "$(info @kmend-cc $(CC) $(c_flags))"
    "$(info @kmend-standard $(is-standard-object))"
    "$(info @kmend-late $(delay-objtool))"
    "$(info @kmend-module $(part-of-module))"
    "$(info @kmend-objtool $(objtool) $(objtool-args))"
    "@:"
)


def commands(target: Target, units: Sequence[Unit]) -> dict[Unit, CompileCommand]:
    """The command of every unit.

    Headers and tables that kbuild would generate first are there since the target was prepared
    (:mod:`kmend.kernel.generated`); one that could not be made then is tried again here.

    Raises:
        Failed: (rule ``kbuild``) make failed, a generated file cannot be made, or a unit is
            no unit of this target.
    """
    kbuild = kbuild_env.load(target)
    stamp = _stamp(target)
    out: dict[Unit, CompileCommand] = {}
    wanted: dict[str, list[Unit]] = {}
    units_of = unit_map(target)
    for unit in units:
        cached = _read_cached(target, unit, stamp)
        if cached is not None:
            out[unit] = cached
            continue
        rows = [row for row in units_of.rows_of(unit.obj) if row.unit.owner == unit.owner]
        if not rows:
            raise _unknown(target, unit)
        wanted.setdefault(rows[0].directory, []).append(unit)
    for directory, group in wanted.items():
        objects = tuple(dict.fromkeys(unit.obj for unit in group))
        found = _ask(target, kbuild, directory, objects)
        for unit in group:
            command = found.get(unit.obj)
            if command is None:
                raise _unknown(target, unit)
            out[unit] = command
            _write_cached(target, unit, stamp, command)
    return {unit: out[unit] for unit in units}


def _unknown(target: Target, unit: Unit) -> Failed:
    return Failed(
        f"{unit.obj} is no object that kbuild compiles from C for {target.release}",
        why="kbuild printed no compile command for it",
        next_step="prepare the target again: `kmend kernel fetch RELEASE`",
        rule="kbuild",
    )


def _ask(
    target: Target, kbuild: KbuildEnvironment, directory: str, objects: Sequence[str]
) -> dict[str, CompileCommand]:
    result = kbuild_env.directory_make(target, kbuild, directory, [_PRINT_RULE, *objects])
    answers = list(_answers(result.text))
    missing = sorted({name for answer in answers for name in answer["missing"].split()})
    if missing:
        generated.make(target, kbuild, directory, missing)
    return {answer["object"]: _command(target, kbuild, answer) for answer in answers}


def _answers(text: str) -> Iterable[dict[str, str]]:
    answer: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("@kmend-"):
            continue
        key, _, value = line[len("@kmend-") :].partition(" ")
        if key == "object" and answer:
            yield answer
            answer = {}
        answer[key] = value
    if answer:
        yield answer


def _command(target: Target, kbuild: KbuildEnvironment, answer: dict[str, str]) -> CompileCommand:
    try:
        words = shlex.split(answer["cc"])
        objtool = tuple(shlex.split(answer["objtool"]))
    except ValueError as error:
        raise Failed(
            f"the compile command of {answer['object']} cannot be understood",
            why=f"{error}: {answer['cc'][:300]}",
            next_step=f"compile it by hand in {target.source}: make V=1 {answer['object']}",
            rule="kbuild",
        ) from error
    compiler = tuple(word for word in words if not word.startswith("-Wp,-M"))
    late = bool(answer["late"].strip())
    module = bool(answer["module"].strip())
    if late and not module:
        objtool = kbuild.vmlinux_objtool
    standard = late or bool(answer["standard"].strip())
    return CompileCommand(
        compiler=compiler,
        source=answer["source"],
        objtool=objtool if objtool and standard else None,
        late_objtool=late,
        defines_module="-DMODULE" in compiler,
    )


def module_command(target: Target, folder: Path, name: str) -> CompileCommand:
    """The command for ``folder/NAME.c`` as the one source of a loadable module NAME outside of the tree.

    ``folder`` is absolute and holds ``Kbuild`` with ``obj-m := NAME.o`` and the source. The flags
    are those of any module of this kernel: no directory's own ones.

    Raises:
        Failed: (rule ``kbuild``) make failed.
    """
    return module_commands(target, folder, [name])[name]


def module_commands(target: Target, folder: Path, stems: Sequence[str]) -> dict[str, CompileCommand]:
    """The commands for ``folder/STEM.c`` of each stem, all parts of one module outside of the tree.

    As :func:`module_command`; with several sources ``Kbuild`` says ``NAME-y := STEM.o …`` as well.

    Raises:
        Failed: (rule ``kbuild``) make failed.
    """
    kbuild = kbuild_env.load(target)
    objects = {f"{folder}/{stem}.o": stem for stem in stems}
    result = kbuild_env.directory_make(
        target, kbuild, str(folder), [f"KBUILD_EXTMOD={folder}", _PRINT_RULE, *objects]
    )
    found = {
        objects[answer["object"]]: _command(target, kbuild, answer)
        for answer in _answers(result.text)
        if answer["object"] in objects
    }
    if len(found) != len(objects):
        raise kbuild_env.kbuild_failed(target, result)
    return found


def _stamp(target: Target) -> str:
    """Changes whenever the target is prepared anew, so that no cached command outlives its tree."""
    status = (target.folder / kbuild_env.FILE).stat()
    return f"{_FORMAT}:{target.source}:{target.compiler}:{status.st_mtime_ns}:{status.st_size}"


def _cache_file(target: Target, unit: Unit) -> Path:
    return target.folder / _CACHE / f"{hashlib.sha256(unit.obj.encode()).hexdigest()[:32]}.json"


def _read_cached(target: Target, unit: Unit, stamp: str) -> CompileCommand | None:
    try:
        row = json.loads(_cache_file(target, unit).read_bytes())
        if row["stamp"] != stamp or row["object"] != unit.obj:
            return None
        return CompileCommand(
            tuple(row["compiler"]),
            row["source"],
            None if row["objtool"] is None else tuple(row["objtool"]),
            bool(row["late_objtool"]),
            bool(row["defines_module"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: ask again


def _write_cached(target: Target, unit: Unit, stamp: str, command: CompileCommand) -> None:
    row = {
        "stamp": stamp,
        "object": unit.obj,
        "compiler": command.compiler,
        "source": command.source,
        "objtool": command.objtool,
        "late_objtool": command.late_objtool,
        "defines_module": command.defines_module,
    }
    write_atomically(_cache_file(target, unit), json.dumps(row).encode())
