"""From replacement functions written by hand to a proven module: what ``kmend module`` does.

    folder with C files and kmend.toml -> objects -> names resolved -> module + report

A C file with its own ``module_init`` that calls ``klp_enable_patch()`` is taken as it is; then only what
modpost would add is added, and names that the kernel does not export are resolved. An ordinary module (no
livepatch) gets the former alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.core.config import Config
from kmend.core.errors import Refusal, Refused, UsageError
from kmend.core.files import write_atomically
from kmend.core.progress import Progress, Timings
from kmend.core.report import BuildReport, FunctionRow, ObjectRow
from kmend.core.target import VMLINUX, Linkage, Release, Target, Unit
from kmend.diff.declared import CallbackKind, Place, declarations
from kmend.elf.model import STT_FUNC
from kmend.elf.reader import read
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild, prepare, store
from kmend.module.byhand import HandPlan, HandUnit, Needs, link, needs
from kmend.module.describe import descriptors
from kmend.module.descriptor import FILE, Descriptor, ObjectSpec, bad_descriptor, parse
from kmend.module.output import Assembled, ModuleSpec, second_callback
from kmend.module.resolve import Livepatched, Resolution
from kmend.pairs import include_flags
from kmend.product import (
    Signing,
    concluded,
    cve_names,
    frame,
    modinfo_of,
    module_name,
    note,
    one_line,
    reported,
    written,
)
from kmend.verify.names import Names
from kmend.view import TargetView, scratch

if TYPE_CHECKING:
    from kmend.elf.model import ElfFile
    from kmend.module.layout import Layout

#: The names of files that make and the shell leave alone.
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.c")
#: Replacement functions are called by nobody that the compiler sees, and declared in no header.
_QUIET = ("-Wno-missing-prototypes", "-Wno-missing-declarations")


@dataclass(frozen=True, slots=True)
class ModuleRequest:
    """What ``kmend module`` is asked for; ``path`` is a folder, a descriptor, or a C file."""

    path: Path
    release: Release
    output: Path
    name: str | None = None
    signing: Signing | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """What was found at the path. ``files`` are names in ``folder``."""

    folder: Path
    files: tuple[str, ...]
    descriptor: Descriptor
    name: str


def sources_of(path: Path, name: str | None = None) -> Sources:
    """Find the C files and read the descriptor.

    Raises:
        UsageError: (``bad-descriptor``, ``no-sources``, ``module-name``) there is nothing to build, or it
            cannot be read.
    """
    path = path.absolute()
    toml = path if path.suffix == ".toml" else path / FILE
    lone = path.suffix == ".c" and path.is_file()
    folder = path.parent if lone or path.suffix == ".toml" else path
    if not folder.is_dir() or (path.suffix == ".toml" and not path.is_file()):
        raise _no_sources(path, "there is no such folder or file")
    descriptor = Descriptor()
    if not lone and toml.exists():
        try:
            descriptor = parse(toml.read_text(), str(toml))
        except (OSError, UnicodeDecodeError) as error:
            raise bad_descriptor(str(toml), str(error), "make it a readable text file") from error
    files = (path.name,) if lone else descriptor.sources
    if not files:
        files = tuple(sorted(entry.name for entry in folder.glob("*.c") if not entry.name.endswith(".mod.c")))
    if not files:
        raise _no_sources(path, "the folder has no .c file")
    for file in files:
        if not _FILE.fullmatch(file) or not (folder / file).is_file():
            raise _no_sources(
                folder / file, "it is no C file of the folder, or has a name that make would split"
            )
    stem = Path(files[0]).stem if lone or (len(files) == 1 and not toml.exists()) else folder.name
    return Sources(folder, files, descriptor, module_name(name or descriptor.name or stem))


def _no_sources(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path}: nothing to build",
        why=why,
        next_step=f"name a folder with C files and {FILE}, or a C file with its own module_init; "
        "`kmend module --new NAME --func FUNCTION` makes a beginning",
        rule="no-sources",
    )


def build_module(request: ModuleRequest, config: Config, progress: Progress) -> BuildReport:
    """Compile, resolve, link, check and write the module and its report.

    Every KmendError that speaks of the code becomes a report with ``refused`` or ``failed``.

    Raises:
        KmendError: wrong usage, and a machine or kernel that cannot do it (exit status 2 and 3).
    """
    timings = Timings()
    sources = sources_of(request.path, request.name)
    with timings.measure("total"):
        with timings.measure("fetch"):
            target = store.fetch(config, request.release, progress)
        work = _HandBuild(request, sources, target, config, progress, timings)
        report = reported(sources.name, target, work.run)
    return concluded(report, timings)


class _HandBuild:
    def __init__(
        self,
        request: ModuleRequest,
        sources: Sources,
        target: Target,
        config: Config,
        progress: Progress,
        timings: Timings,
    ) -> None:
        self.request, self.sources, self.descriptor = request, sources, sources.descriptor
        self.target, self.config = target, config
        self.progress, self.timings = progress, timings
        self.warnings: list[Refusal] = []
        self.cves: tuple[str, ...] = ()
        self.digest = ""

    def run(self) -> BuildReport:
        measure = self.timings.measure
        refusal = prepare.compiler_matches(self.target)
        if refusal is not None:
            raise Refused([refusal])
        with measure("compile"):
            units = self._compile()
            view = TargetView(self.config, self.target)
            self._take_modules(view)
        with measure("link"):
            self.progress.step("resolving names")
            wanted = needs(units)
            objects, states = self._declared(units, wanted, view.layout)
            plan = self._plan(view, wanted, objects, states)
            assembled = self._link(view, units, plan)
            self.warnings += assembled.warnings
        with measure("verify"):
            self._check(view, assembled.data, plan)
        with measure("link"):
            return self._write(assembled.data, view.layout)

    # -- objects ----------------------------------------------------------------------------

    def _compile(self) -> list[HandUnit]:
        """Compile every source with the flags of a module of this kernel, in a folder of links to them.

        Includes of the author's own files are found since the folder has links to all of them; what the
        compiler writes never lands in the author's folder.
        """
        name, folder = self.sources.name, self.sources.folder
        self.progress.step(f"compiling {len(self.sources.files)} file{'s'[: len(self.sources.files) != 1]}")
        with scratch(self.config) as run_folder:
            place = run_folder / "src"
            place.mkdir()
            stems = {}
            for entry in folder.iterdir():
                if entry.name not in ("Kbuild", "Makefile"):
                    (place / entry.name).symlink_to(entry)
            for file in self.sources.files:
                stem = file.removesuffix(".c")
                if stem == name and len(self.sources.files) > 1:
                    # kbuild cannot make NAME.o of a NAME.c and others
                    stem = f"{name}-kmend"
                    (place / f"{stem}.c").symlink_to(folder / file)
                stems[stem] = file
            kbuild_text = f"obj-m := {name}.o\n"
            if list(stems) != [name]:
                kbuild_text += f"{name}-y := {' '.join(f'{stem}.o' for stem in stems)}\n"
            write_atomically(place / "Kbuild", kbuild_text.encode())
            commands = kbuild.module_commands(self.target, place, list(stems))
            flags = (*_QUIET, f"-ffile-prefix-map={place}/=", *include_flags(), *self.descriptor.cflags)
            units = []
            for stem, file in stems.items():
                unit = Unit(f"{stem}.o", file, name, Linkage.MODULE)
                made = compiling.compile_unit(
                    self.target,
                    unit,
                    commands[stem],
                    tree=self.target.source,
                    out=run_folder / "out",
                    extra_flags=flags,
                )
                units.append(HandUnit(file, read(made.path.read_bytes(), file)))
                self.warnings += [
                    Refusal("compiler-warning", file, _relative(line, place), "look at the line")
                    for line in made.warnings
                ]
            return units

    def _take_modules(self, view: TargetView) -> None:
        """Objects that are no modules of the kernel's own: the patch is made for exactly the file given."""
        for spec in self.descriptor.objects:
            if spec.file:
                path = self.sources.folder / spec.file
                digest = view.take(spec.name, path)
                self.warnings.append(
                    Refusal(
                        "foreign-object",
                        spec.name,
                        f"it is taken from {path.name} (sha256 {digest[:16]}…), no module of the kernel's "
                        "own: another build of it may differ in what the patch rests on",
                        f"build the patch anew whenever {spec.name} is built anew",
                    )
                )

    # -- what it is to be -------------------------------------------------------------------

    def _declared(
        self, units: Sequence[HandUnit], wanted: Needs, layout: Layout
    ) -> tuple[tuple[ObjectSpec, ...], tuple[tuple[int, int], ...]]:
        """The objects and states: of the descriptor and of the macros in the code, or of its own structures.

        Raises:
            UsageError: ``bad-descriptor``: there are both, or none.
        """
        place = str(self.sources.folder / FILE)
        if wanted.own_init:
            if self.descriptor.objects or self.descriptor.states:
                raise bad_descriptor(
                    place,
                    "it describes objects, but the code has a module_init of its own",
                    "take out one of the two",
                )
            found = [row for unit in units for row in descriptors(unit.elf, layout)[1] or ()]
            return tuple(ObjectSpec(row.name) for row in found), ()
        callbacks: list[tuple[CallbackKind, str]] = []
        states: list[tuple[int, int]] = []
        refusals: list[Refusal] = []
        for unit in units:
            declared = declarations(unit.elf)
            refusals += declared.refusals
            states += declared.states
            callbacks += [(kind, _function_at(unit.elf, spot)) for kind, spot in declared.callbacks]
        if refusals:
            raise Refused(refusals)
        objects = self.descriptor.objects
        if callbacks:
            if len(objects) > 1:
                raise bad_descriptor(
                    place,
                    "the code declares a callback with a macro, and several objects may be meant",
                    "name it under callbacks of its [[object]] instead",
                )
            only = objects[0] if objects else ObjectSpec(VMLINUX)
            objects = (replace(only, callbacks=(*only.callbacks, *callbacks)),)
            _unique(objects[0].callbacks, only.name)
        if not objects:
            raise bad_descriptor(
                place,
                "nothing says which functions are to be replaced: the file is missing or names no "
                "[[object]], and the code has no module_init of its own",
                f"write {FILE}; `kmend module --new` shows one",
            )
        for spec in objects:
            if not spec.funcs and not spec.callbacks:
                raise bad_descriptor(
                    place, f"the object {spec.name} has neither functions nor callbacks", "add one"
                )
        return objects, (*self.descriptor.states, *states)

    def _plan(
        self,
        view: TargetView,
        wanted: Needs,
        objects: Sequence[ObjectSpec],
        states: tuple[tuple[int, int], ...],
    ) -> HandPlan:
        livepatch = not wanted.own_init or wanted.enables
        refusals = [
            Refusal(
                "unknown-module",
                spec.name,
                f"{self.target.release} has no module of that name",
                "see `kmend kernel show` for the modules folder, or check the spelling; the .ko of a module "
                f'that is not the kernel\'s own goes into {FILE}: file = "…"',
            )
            for spec in objects
            if spec.name != VMLINUX and view.optional_module(spec.name) is None and not wanted.own_init
        ]
        if refusals:
            raise Refused(refusals)
        # A module that somebody patches by their own structures may be one that is not of the kernel's.
        known = [s.name for s in objects if s.name == VMLINUX or view.optional_module(s.name) is not None]
        names = Names(view.world(), known, self.descriptor.symbols, livepatch=livepatch)
        reach: dict[str, Resolution] = {}
        for name in wanted.undefined:
            found = names.find(name)
            if isinstance(found, Refusal):
                refusals.append(found)
            else:
                reach[name] = found
        unused = sorted(set(self.descriptor.symbols) - set(wanted.undefined))
        self.warnings += [
            Refusal(
                "unused-symbol", name, "[symbols] names it, but no file refers to it", "take the line out"
            )
            for name in unused
        ]
        if refusals:
            raise Refused(refusals)
        return HandPlan(
            () if wanted.own_init else tuple(objects),
            states,
            wanted.own_init,
            livepatch,
            reach,
            names.carriers,
        )

    # -- module -----------------------------------------------------------------------------

    def _link(self, view: TargetView, units: Sequence[HandUnit], plan: HandPlan) -> Assembled:
        late = {r.obj for r in plan.reach.values() if isinstance(r, Livepatched) and r.obj != VMLINUX}
        base = frame(view, sorted(late), own_init=plan.own_init)
        self.warnings += base.warnings
        name, title = self.sources.name, self.descriptor.description
        made_from = b"".join((self.sources.folder / f).read_bytes() for f in self.sources.files)
        self.digest = digest = hashlib.sha256(made_from).hexdigest()
        self.cves = cve_names(made_from, title)
        info = modinfo_of(self.target, name, digest=digest)
        if title:
            info = (("description", one_line(title)), *info)
        return link(
            ModuleSpec(
                name,
                self.descriptor.replace,
                info,
                note(self.target, name, title=title, origin="by hand", digest=digest, cves=self.cves),
                base.forget,
            ),
            units,
            plan,
            base.glue,
            view.layout,
            base.crcs,
        )

    def _check(self, view: TargetView, data: bytes, plan: HandPlan) -> None:
        """Hold the finished bytes against every rule, as ``kmend check`` would."""
        checked = view.check(data, self.sources.name, livepatch=plan.livepatch)
        self.warnings += checked.warnings
        if checked.refusals:
            raise Refused(checked.refusals)

    def _write(self, data: bytes, layout: Layout) -> BuildReport:
        rows = []
        for row in descriptors(read(data, self.sources.name), layout)[1] or ():
            functions = [
                FunctionRow(f.old_name, f.sympos, "changed", f"replaced by {f.new_func}") for f in row.funcs
            ]
            functions += [
                FunctionRow(name, 0, "new", f"{kind.words} callback")
                for kind, name in row.callbacks
                if name != "kmend_forget"
            ]
            rows.append(ObjectRow(row.name, tuple(functions)))
        return written(
            self.target,
            self.sources.name,
            data,
            self.request.output,
            self.request.signing,
            objects=tuple(rows),
            warnings=self.warnings,
            cves=self.cves,
            digest=self.digest,
        )


def _relative(line: str, place: Path) -> str:
    return line.replace(f"{place}/", "")


def _function_at(elf: ElfFile, place: Place) -> str:
    """The name of the function that a declaration points at."""
    for symbol in elf.symbols:
        if symbol.type == STT_FUNC and (symbol.section, symbol.value) == (place.section, place.offset):
            return symbol.name
    return place.symbol


def _unique(callbacks: Sequence[tuple[CallbackKind, str]], obj: str) -> None:
    """Raise when a kind is there twice."""
    seen: dict[CallbackKind, str] = {}
    for kind, name in callbacks:
        if kind in seen:
            raise Refused([second_callback(obj, kind, seen[kind], name)])
        seen[kind] = name
