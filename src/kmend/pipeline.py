"""From patch files to a proven module: the stages in one direction, and the times they took.

    patch file -> PatchSet -> affected units -> object pairs -> object diff
               -> livepatch module + build report

Each stage is a function of values; this file joins the pure stages to the edges that read
the target and run the compiler.

What comes after the compiler is imported where it is used (:data:`LATER` names it): a build begins
with the compiler runs, and everything else that can be made ready is made ready beside them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kmend import __version__
from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Refusal, Refused, UsageError
from kmend.core.files import scratch_folder, write_atomically
from kmend.core.progress import Progress, Timings
from kmend.core.report import BuildReport, FunctionRow, KernelId, ObjectRow, Outcome, Verified
from kmend.core.target import MAX_MODULE_NAME, VMLINUX, Linkage, Release, Target, Unit
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild, overlay, prepare, prepared
from kmend.patch.apply import Applied, apply
from kmend.patch.intake import parse
from kmend.patch.lines import with_line_control
from kmend.patch.reach import Reach, reach

if TYPE_CHECKING:
    from kmend.diff.compare import ObjectDiff
    from kmend.diff.select import Selection
    from kmend.diff.unit import UnitObject
    from kmend.elf.model import ElfFile
    from kmend.kernel.kbuild import CompileCommand
    from kmend.module.layout import Layout
    from kmend.module.resolve import Resolution
    from kmend.patch.model import PatchSet
    from kmend.verify.rules import Checked, TargetFacts
    from kmend.verify.symbols import Proof, World

#: The stages behind the compiler: loaded while it runs.
LATER = (
    "kmend.diff.compare",
    "kmend.diff.select",
    "kmend.verify.rules",
    "kmend.verify.symbols",
    "kmend.module.assemble",
    "kmend.report.build",
)


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What ``kmend build`` is asked for.

    ``patches`` are (name, contents) in the order of application; ``strip`` is how many leading folders to
    take off the names in them: for all, or by the patch's name (those not named: found out).
    """

    patches: tuple[tuple[str, bytes], ...]
    release: Release
    output: Path
    name: str | None = None
    replace: bool = True
    fuzz: int = 0
    strip: int | Mapping[str, int] | None = None
    sign_key: str | None = None
    sign_cert: Path | None = None


# -- the target as the pure stages see it ------------------------------------------------------


class TargetView:
    """Lazily opened parts of a target: image, symbols, exports, modules, glue."""

    def __init__(self, config: Config, target: Target) -> None:
        from kmend.kernel import kallsyms, symvers
        from kmend.kernel.vmlinux import Image
        from kmend.verify.provenance import VmlinuxBinary

        self.config, self.target = config, target
        self._modules: dict[str, UnitObject | None] = {}
        self._sites: dict[str, frozenset[int]] = {}
        self.image = Image.open(target.vmlinux)
        self.symbols = kallsyms.load(target)
        self.exports = symvers.load(target.symvers)
        self.vmlinux = VmlinuxBinary(self.image, self.symbols)

    def glue(self, *, forget: bool = False, own_init: bool = False) -> ElfFile:
        """``glue.c`` compiled for this target; made once. As :func:`kmend.module.layout.glue_source`."""
        from kmend.elf.reader import read
        from kmend.module.layout import glue_source

        source = glue_source(forget=forget, own_init=own_init)
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        path = self.target.folder / f"glue-{digest}.o"
        if not path.exists():
            with _scratch(self.config) as folder:
                made = compiling.compile_snippet(self.target, source, out=folder, module_name="kmend")
                write_atomically(path, made.read_bytes())
        return read(path.read_bytes(), path.name)

    def takes_back(self) -> bool:
        """Whether the kernel clears what it relocated for a module when that goes.

        Probed by the function that does it: 0c05e7bd2d01 "livepatch,x86: Clear relocation targets on a module
        removal" (6.3).
        """
        return bool(self.symbols.named("clear_relocate_add"))

    def forget(self) -> Resolution | None:
        """How a module reaches ``text_poke_set()`` to do it itself; None: no need, or no such function."""
        from kmend.module.resolve import Livepatched

        found = self.symbols.named("text_poke_set")
        return None if self.takes_back() or len(found) != 1 else Livepatched(VMLINUX, "text_poke_set", 0)

    def module(self, name: str) -> UnitObject:
        """A module of the target, parsed.

        Raises:
            Failed: the target has no such module.
        """
        found = self.optional_module(name)
        if found is None:
            raise Failed(f"{self.target.release} has no module {name}", rule="unknown-module")
        return found

    def optional_module(self, name: str) -> UnitObject | None:
        from kmend.diff.unit import UnitObject
        from kmend.kernel import modules

        if name not in self._modules:
            known = modules.find(self.target, name)
            data = modules.module_file(self.target, name).path.read_bytes() if known else None
            self._modules[name] = UnitObject.parse(data, f"{name}.ko") if data is not None else None
        return self._modules[name]

    def dependencies(self, name: str) -> tuple[str, ...]:
        from kmend.kernel.modules import module_dependencies

        return module_dependencies(self.target, name)

    def world(self) -> World:
        from kmend.verify.symbols import World

        return World(self.symbols, self.vmlinux, self.exports, self.module, self.dependencies)

    def traceable(self, obj: str, place: int) -> bool:
        """Whether ftrace can redirect the function: the object's ``__mcount_loc`` lists it."""
        from kmend.verify.rules import mcount_sites

        if obj not in self._sites:
            if obj == VMLINUX:
                self._sites[obj] = self._vmlinux_sites()
            else:
                self._sites[obj] = mcount_sites(self.module(obj))
        sites = self._sites[obj]
        return place in sites or (obj == VMLINUX and place + 4 in sites)

    def _vmlinux_sites(self) -> frozenset[int]:
        bounds = [self.symbols.named(n) for n in ("__start_mcount_loc", "__stop_mcount_loc")]
        if any(len(b) != 1 for b in bounds):
            raise Failed("the image has no table of ftrace sites", rule="no-ftrace")
        start, stop = bounds[0][0].address, bounds[1][0].address
        data = self.image.read(start, stop - start)
        return frozenset(struct.unpack(f"<{len(data) // 8}Q", data))

    def facts(self, layout: Layout, vermagic: str) -> TargetFacts:
        from kmend.verify.rules import TargetFacts

        return TargetFacts(
            self.target.release,
            vermagic,
            layout,
            self.exports,
            self.symbols,
            self.optional_module,
            self.traceable,
        )


def _scratch(config: Config) -> AbstractContextManager[Path]:
    """A folder for this run only."""
    return scratch_folder(config.cache / "scratch", "build")


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


# -- the stages ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UnitWork:
    """One unit on its way through the stages."""

    unit: Unit
    diff: ObjectDiff
    selection: Selection


def module_name(request: BuildRequest) -> str:
    """The module's name: ``-n``, or ``kmend_`` and the first patch file's name.

    Raises:
        UsageError: it is no usable name for a module.
    """
    if request.name is not None:
        name = request.name.removesuffix(".ko").replace("-", "_")
    else:
        stem = Path(request.patches[0][0]).name
        for suffix in (".gz", ".patch", ".diff"):
            stem = stem.removesuffix(suffix)
        name = "kmend_" + re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_").lower()
        name = name[:MAX_MODULE_NAME].rstrip("_")
    if not re.fullmatch(r"[A-Za-z0-9_]+", name) or len(name) > MAX_MODULE_NAME:
        raise UsageError(
            f"{request.name!r} is no name for a module",
            why=f"letters, digits and underscores, at most {MAX_MODULE_NAME} of them",
            next_step="name another one with -n",
            rule="module-name",
        )
    return name


def build(request: BuildRequest, config: Config, progress: Progress) -> BuildReport:
    """Build, prove and write the module and its report.

    Every KmendError that speaks of the patch becomes a report with ``refused`` or ``failed``; wrong usage
    and a machine or kernel that cannot do it (exit status 2 and 3) are raised.
    """
    timings = Timings()
    name = module_name(request)
    kernel = KernelId(request.release, "", "")
    with timings.measure("total"):
        patchset = parse(request.patches, strip=request.strip)
        with timings.measure("fetch"):
            target = _target(request.release, config, progress)
        kernel = KernelId(target.release, target.version, target.build_id)
        try:
            report = _Build(request, name, patchset, target, config, progress, timings).run()
        except KmendError as error:
            if error.exit_status != 1:
                raise
            outcome = Outcome.REFUSED if isinstance(error, Refused) else Outcome.FAILED
            report = BuildReport(name, outcome, kernel, refused=error.reasons)
    timings.seconds.setdefault("total", 0.0)
    report = replace(report, timings=dict(timings.seconds))
    if report.result is Outcome.BUILT and report.module:
        write_report(report)
    return report


def write_report(report: BuildReport) -> None:
    """Write ``NAME.json`` beside the module; without it the module goes as well."""
    from kmend.report.build import to_document

    module = Path(report.module or "")
    try:
        write_atomically(
            module.with_suffix(".json"), (json.dumps(to_document(report), indent=2) + "\n").encode()
        )
    except KmendError:
        module.unlink(missing_ok=True)  # without its report nobody knows what it is
        raise


def _target(release: Release, config: Config, progress: Progress) -> Target:
    """The prepared target; what fetching takes is loaded only for one that is not ready."""
    found = prepared.ready(config, release)
    if found is None:
        from kmend.kernel import store

        found = store.fetch(config, release, progress)
    return found


class _Build:
    def __init__(
        self,
        request: BuildRequest,
        name: str,
        patchset: PatchSet,
        target: Target,
        config: Config,
        progress: Progress,
        timings: Timings,
    ) -> None:
        self.request, self.name, self.patchset = request, name, patchset
        self.target, self.config = target, config
        self.progress, self.timings = progress, timings
        self.warnings: list[Refusal] = []
        self.refusals: list[Refusal] = []

    def run(self) -> BuildReport:
        measure = self.timings.measure
        with measure("prepare"):
            self._compiler()
            applied = self._apply()
            reached = self._reach(applied)
        with _scratch(self.config) as scratch:
            with measure("compile"):
                pairs, view = self._compile(applied, reached, scratch)
            with measure("diff"):
                from kmend.module.layout import read_layout

                self.progress.step("comparing")
                layout = read_layout(view.glue())
                works = self._diff(pairs, layout)
                if not works:
                    return self._nothing()
            with measure("verify"):
                self.progress.step("proving against the kernel's own code")
                proofs = self._prove(view, works, layout, scratch)
            refusals = [*dict.fromkeys(self.refusals), *(r for w in works for r in w.selection.refusals)]
            refusals += [r for p in proofs for r in p.refusals]
            if refusals:
                raise Refused(refusals)
        with measure("link"):
            data, rows = self._assemble(view, works, proofs, layout, applied)
        with measure("verify"):
            self._check(view, data, layout)
        with measure("link"):
            return self._write(data, rows, proofs)

    # -- patch, units ---------------------------------------------------------------------------

    def _compiler(self) -> None:
        refusal = prepare.compiler_matches(self.target)
        if refusal is not None:
            raise Refused([refusal])

    def _apply(self) -> Applied:
        self.progress.step("applying the patch")
        applied = apply(self.patchset, overlay.tree_reader(self.target.source), fuzz=self.request.fuzz)
        self.warnings += applied.warnings
        return applied

    def _reach(self, applied: Applied) -> Reach:
        reached = reach(applied, _Lookup(self.target, self.progress))
        self.warnings += reached.warnings
        return reached

    # -- objects --------------------------------------------------------------------------------

    def _compile(
        self, applied: Applied, reached: Reach, scratch: Path
    ) -> tuple[list[tuple[Unit, UnitObject, UnitObject]], TargetView]:
        """Original and patched object of every unit; the target is opened while the compilers run."""
        views: list[TargetView] = []
        files: dict[str, bytes | None] = {}
        for file in applied.files:
            if file.new != file.old:
                controlled = file.new is not None and file.old is not None
                files[file.path] = (
                    with_line_control(file.new, file.origins) if controlled and file.new else file.new
                )
        compiled = tuple(u for u in reached.candidates if u.source.endswith(".c"))
        commands = kbuild.commands(self.target, (*reached.units, *compiled))
        sources = [command.source for command in commands.values()]
        tree = overlay.make_overlay(self.target.source, files, scratch / "tree", also=sources)
        affected = self._affected(reached, commands, files, tree, scratch)
        commands = {unit: commands[unit] for unit in (*reached.units, *affected)}
        pairs = compiling.compile_pairs(
            self.config,
            self.target,
            commands,
            patched_tree=tree,
            out=scratch / "patched",
            progress=self.progress,
            extra_flags=compiling.SPLIT_WITH_TYPES,
            patched_flags=include_flags(),
            meanwhile=lambda: views.append(self._open()),
        )
        from kmend.diff.unit import UnitObject

        out = []
        for unit, pair in pairs.items():
            self._only_patched(unit, tree, files, pair.patched.deps)
            old = UnitObject.parse(pair.original.path.read_bytes(), f"{unit.obj} (original)")
            new = UnitObject.parse(pair.patched.path.read_bytes(), f"{unit.obj} (patched)")
            out.append((unit, old, new))
        return out, views[0] if views else self._open()

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
        scratch: Path,
    ) -> tuple[Unit, ...]:
        """Those candidates whose preprocessed text a header change really changes.

        Raises:
            Refused: ``library-member``, ``asm-unit``: it changes one that cannot be live patched.
        """
        if not reached.candidates:
            return ()
        compiled = tuple(u for u in reached.candidates if u in commands)
        differing = compiling.differing_units(
            self.config,
            self.target,
            {unit: commands[unit] for unit in compiled},
            patched_tree=tree,
            scratch=scratch,
            progress=self.progress,
            check=lambda unit, deps: self._only_patched(unit, tree, files, deps),
            patched_flags=include_flags(),
        )
        self.progress.step(
            f"{len(differing)} of {len(compiled)} units that may include a changed header see another text"
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

    def _open(self) -> TargetView:
        """The target, and the code of the stages to come: made ready while the compilers run."""
        view = TargetView(self.config, self.target)
        for name in LATER:
            importlib.import_module(name)
        view.glue()
        view.symbols.named("_stext")  # the first question of all lets the table of names be made
        return view

    def _diff(self, pairs: list[tuple[Unit, UnitObject, UnitObject]], layout: Layout) -> list[UnitWork]:
        from kmend.diff.compare import compare
        from kmend.diff.select import select

        works = []
        for unit, old, new in pairs:
            diff = compare(old, new, layout.special_sizes())
            selection = select(diff)
            # What is new alone changes nothing here, but another unit may need it.
            if not diff.nothing or diff.new_functions or diff.new_data or selection.refusals:
                works.append(UnitWork(unit, diff, selection))
                self.refusals += self._types(old, new)
            self.warnings += selection.warnings
        works = [
            w
            for w in self._share(works)
            if w.selection.included or w.selection.refusals or w.diff.declared.acts
        ]
        if any(w.selection.changed or w.selection.refusals or w.diff.declared.acts for w in works) or (
            self.refusals
        ):
            return works
        return []

    @staticmethod
    def _types(old: UnitObject, new: UnitObject) -> tuple[Refusal, ...]:
        """Structures and enumerations that the two objects lay out differently."""
        from kmend.verify.types import Types, changed_layouts

        before, after = Types.of(old.elf, old.name), Types.of(new.elf, new.name)
        if before is None or after is None:
            raise Failed(f"{new.name} was compiled without its types", rule="internal")
        return changed_layouts(before, after)

    def _share(self, works: list[UnitWork]) -> list[UnitWork]:
        """Let each unit bring along its new global functions and variables that another unit needs.

        Of the same object: another module may have a global symbol of that name, which is not the one meant.
        """
        from kmend.diff.select import select

        while True:
            wanted = {(work.unit.owner, name) for work in works for name in work.selection.externs}
            again = False
            out = []
            for work in works:
                new, twins = work.diff.new, work.diff.twins.original
                roots = [
                    key
                    for key, part in new.parts.items()
                    if not part.local and key not in twins and (work.unit.owner, part.name) in wanted
                ]
                if set(roots) <= set(work.selection.included):
                    out.append(work)
                    continue
                again = True
                out.append(replace(work, selection=select(work.diff, roots)))
            works = out
            if not again:
                return works

    # -- proof ----------------------------------------------------------------------------------

    def _prove(
        self, view: TargetView, works: Sequence[UnitWork], layout: Layout, scratch: Path
    ) -> list[Proof]:
        """Prove every unit; those of one object know of what the others bring and make global."""
        from kmend.module.output import PATCH
        from kmend.verify.symbols import Prover

        provers = [Prover(view.world(), w.unit.owner, w.diff.old, w.diff.old_special) for w in works]
        for work, prover in zip(works, provers, strict=True):
            shared: set[str] = {PATCH}
            promoted: dict[str, Callable[[], Resolution | None]] = {}
            for other, its in zip(works, provers, strict=True):
                if other.unit.owner != work.unit.owner:
                    continue
                for key, part in other.diff.new.parts.items():
                    twin = other.diff.twins.original.get(key)
                    if part.local:
                        continue
                    if twin is not None and other.diff.old.parts[twin].local:
                        promoted[part.name] = partial(its.reach, other.diff.old.parts[twin])
                    elif twin is None and key in other.selection.included:
                        shared.add(part.name)
            prover.prove(work.selection, frozenset(shared), promoted)
        proofs = [prover.proof for prover in provers]
        for work, proof in zip(works, proofs, strict=True):
            if proof.mismatches:
                self._second_look(view, work, proof, layout, scratch)
        return proofs

    def _second_look(
        self, view: TargetView, work: UnitWork, proof: Proof, layout: Layout, scratch: Path
    ) -> None:
        """Compare once more without ``-ffunction-sections``.

        With it the assembler cannot shorten a jump to another static function of the unit, so a function
        may differ from the kernel's in nothing but the length of such a jump. Compiled as the kernel was,
        it must be the very code.
        """
        from kmend.diff.special import SpecialSections
        from kmend.diff.unit import UnitObject
        from kmend.verify.symbols import Prover

        command = kbuild.commands(self.target, [work.unit])[work.unit]
        made = compiling.compile_unit(
            self.target,
            work.unit,
            command,
            tree=self.target.source,
            out=scratch / "plain",
            extra_flags=(),
        )
        plain = UnitObject.parse(made.path.read_bytes(), f"{work.unit.obj} (as the kernel was built)")
        prover = Prover(view.world(), work.unit.owner, plain, SpecialSections(plain, layout.special_sizes()))
        for key, mismatch in proof.mismatches.items():
            part = plain.parts.get(key)
            second = mismatch if part is None else prover.function(part)
            if second is None and part is not None:
                proof.identical += 1
                before = len(prover.proof.refusals)
                proof.sympos[key] = prover.sympos(part, prover.known[key])
                proof.refusals += prover.proof.refusals[before:]
            else:
                proof.refusals.append((second or mismatch).refusal(work.unit.owner))

    # -- module ---------------------------------------------------------------------------------

    def _assemble(
        self,
        view: TargetView,
        works: Sequence[UnitWork],
        proofs: Sequence[Proof],
        layout: Layout,
        applied: Applied,
    ) -> tuple[bytes, tuple[ObjectRow, ...]]:
        from kmend.elf.model import SHN_UNDEF
        from kmend.module.assemble import UnitPatch, assemble
        from kmend.module.output import ModuleSpec
        from kmend.verify.symbols import crcs_of

        rows = self._rows(works, proofs, applied)
        report_hash = hashlib.sha256(
            json.dumps([[o.name, [[f.name, f.sympos, f.status] for f in o.functions]] for o in rows]).encode()
        )
        report_hash.update(b"".join(text for _, text in self.request.patches))
        note = {
            "kmend": __version__,
            "patch": self.name,
            "title": self.patchset.title,
            "origin": self.patchset.origin,
            "kernel": self.target.release,
            "build_id": self.target.build_id,
            "report": report_hash.hexdigest(),
        }
        info = (
            ("description", _one_line(self.patchset.title) or f"live patch {self.name}"),
            ("version", __version__),
            ("kmend_patch", self.name),
            ("kmend_build_id", self.target.build_id),
            ("kmend_report", report_hash.hexdigest()),
        )
        modules = [work.unit.owner for work in works if work.unit.owner != VMLINUX]
        forget = view.forget() if modules else None
        if modules and forget is None and not view.takes_back():
            self.warnings.append(
                Refusal(
                    "module-reload",
                    ", ".join(dict.fromkeys(modules)),
                    "this kernel cannot relocate the patch a second time: while it is loaded, the module "
                    "can be unloaded but not loaded again",
                    "take the patch back before the module is loaded again",
                )
            )
        glue = view.glue(forget=forget is not None)
        needed = [s.name for s in glue.symbols if s.section == SHN_UNDEF and s.name]
        assembled = assemble(
            ModuleSpec(
                self.name, self.request.replace, info, json.dumps(note, sort_keys=True).encode(), forget
            ),
            [
                UnitPatch(
                    work.unit.owner, work.unit.obj, work.selection, proof.outer, proof.externs, proof.sympos
                )
                for work, proof in zip(works, proofs, strict=True)
            ],
            glue,
            layout,
            crcs_of([*needed, "module_layout"], view.exports),
        )
        self.warnings += assembled.warnings
        return assembled.data, rows

    def _check(self, view: TargetView, data: bytes, layout: Layout) -> None:
        """Hold the finished bytes against every rule, as ``kmend check`` would."""
        from kmend.elf.reader import read
        from kmend.module.layout import modinfo
        from kmend.verify.rules import check

        vermagic = dict(modinfo(view.glue())).get("vermagic", "")
        checked = check(read(data, self.name), view.facts(layout, vermagic), self.name)
        if checked.refusals:
            raise Refused(checked.refusals)

    def _rows(
        self, works: Sequence[UnitWork], proofs: Sequence[Proof], applied: Applied
    ) -> tuple[ObjectRow, ...]:
        from kmend.diff.unit import PartKind, base_name
        from kmend.patch.definitions import edited_functions

        sources = {work.unit.source for work in works}
        objects: dict[str, list[FunctionRow]] = {}
        for work, proof in zip(works, proofs, strict=True):
            rows = objects.setdefault(work.unit.owner, [])
            new = work.diff.new
            # What was edited in another unit's own source is none of this one's business; a header may be.
            files = [f for f in applied.files if f.path == work.unit.source or f.path not in sources]
            edited = frozenset().union(*map(edited_functions, files))
            standing = {base_name(p.name) for p in new.functions()}
            inlined = sorted(edited - standing)
            for row in work.selection.changed:
                name = work.diff.old.parts[row.original].name
                rows.append(
                    FunctionRow(
                        name,
                        proof.sympos.get(row.original, 0),
                        "changed",
                        _why(name, row.difference, edited, inlined),
                    )
                )
            callbacks = {key: f"{kind.words} callback" for kind, key in work.selection.callbacks}
            rows += [
                FunctionRow(
                    new.parts[key].name,
                    0,
                    "new",
                    callbacks.get(key, "the original object has no such function"),
                )
                for key in work.selection.new_functions
                if new.parts[key].kind is PartKind.FUNCTION
            ]
        order = sorted(objects, key=lambda n: (n != VMLINUX, n))
        return tuple(ObjectRow(name, tuple(objects[name])) for name in order)

    # -- results --------------------------------------------------------------------------------

    def _kernel(self) -> KernelId:
        return KernelId(self.target.release, self.target.version, self.target.build_id)

    def _nothing(self) -> BuildReport:
        return BuildReport(self.name, Outcome.NOTHING_CHANGED, self._kernel(), warnings=tuple(self.warnings))

    def _write(self, data: bytes, rows: tuple[ObjectRow, ...], proofs: Sequence[Proof]) -> BuildReport:
        path = self.request.output / f"{self.name}.ko"
        if self.request.sign_key is not None and self.request.sign_cert is not None:
            from kmend.kernel.sign import sign

            data = sign(self.target, data, self.request.sign_key, self.request.sign_cert)
        write_atomically(path, data)
        return BuildReport(
            self.name,
            Outcome.BUILT,
            self._kernel(),
            module=str(path),
            sha256=hashlib.sha256(data).hexdigest(),
            objects=rows,
            warnings=tuple(dict.fromkeys(self.warnings)),
            verified=Verified(sum(p.functions for p in proofs), sum(p.identical for p in proofs), ()),
        )


def _why(name: str, difference: str, edited: frozenset[str], inlined: list[str]) -> str:
    from kmend.diff.unit import base_name

    if base_name(name) in edited:
        return "edited"
    if inlined:
        return f"inlines {', '.join(inlined)}, edited ({difference})"
    return f"compiled differently: {difference}"


def include_flags() -> tuple[str, ...]:
    """Lets patched code find ``kmend.h``, ``kpatch-macros.h`` and ``kpatch-syscall.h``, after all else."""
    return ("-idirafter", str(Path(__file__).parent / "module" / "include"))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:120]


def check_module(data: bytes, name: str, target: Target, config: Config) -> Checked:
    """Every rule of :mod:`kmend.verify.rules` for a finished module.

    Raises:
        UsageError: no ELF file, no livepatch module.
    """
    from kmend.elf.reader import read
    from kmend.module.layout import modinfo, read_layout
    from kmend.verify.rules import check

    elf = read(data, name)
    view = TargetView(config, target)
    glue = view.glue()
    vermagic = dict(modinfo(glue)).get("vermagic", "")
    return check(elf, view.facts(read_layout(glue), vermagic), name)
