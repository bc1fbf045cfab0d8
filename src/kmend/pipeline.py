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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kmend import __version__
from kmend.core.config import Config
from kmend.core.errors import Failed, Refusal, Refused
from kmend.core.progress import Progress, Timings
from kmend.core.report import BuildReport, FunctionRow, ObjectRow, Outcome, UnitCounts, Verified
from kmend.core.target import MAX_MODULE_NAME, VMLINUX, Release, Target, Unit
from kmend.kernel import overlay, prepare, prepared
from kmend.pairs import Compiler, Pair, reached_by
from kmend.patch.apply import Applied, apply
from kmend.patch.intake import parse
from kmend.product import (
    Signing,
    concluded,
    cve_names,
    frame,
    kernel_id,
    modinfo_of,
    module_name,
    note,
    one_line,
    reported,
    written,
)
from kmend.view import TargetView, scratch

if TYPE_CHECKING:
    from kmend.diff.compare import ObjectDiff
    from kmend.diff.select import Selection
    from kmend.module.resolve import Resolution
    from kmend.patch.model import PatchSet
    from kmend.patch.reach import Reach
    from kmend.verify.symbols import Proof, World
    from kmend.verify.types import Types

#: The stages behind the compiler: loaded while it runs.
LATER = (
    "kmend.diff.compare",
    "kmend.diff.select",
    "kmend.verify.rules",
    "kmend.verify.safety",
    "kmend.verify.symbols",
    "kmend.module.assemble",
    "kmend.report.build",
)


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What ``kmend build`` is asked for.

    ``patches`` are (name, contents) in the order of application; ``strip`` is how many leading folders to
    take off the names in them: for all, or by the patch's name (those not named: found out).
    ``allow`` are rules whose refusals a human has decided to overrule (:mod:`kmend.verify.allow`).
    """

    patches: tuple[tuple[str, bytes], ...]
    release: Release
    output: Path
    name: str | None = None
    replace: bool = True
    fuzz: int = 0
    strip: int | Mapping[str, int] | None = None
    signing: Signing | None = None
    allow: frozenset[str] = frozenset()


# -- the stages ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UnitWork:
    """One unit on its way through the stages."""

    unit: Unit
    diff: ObjectDiff
    selection: Selection
    types: tuple[Types, Types]


def name_of(request: BuildRequest) -> str:
    """The module's name: ``-n``, or ``kmend_`` and the first patch file's name.

    Raises:
        UsageError: it is no usable name for a module.
    """
    if request.name is not None:
        return module_name(request.name)
    stem = Path(request.patches[0][0]).name
    for suffix in (".gz", ".patch", ".diff"):
        stem = stem.removesuffix(suffix)
    name = "kmend_" + re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_").lower()
    return module_name(name[:MAX_MODULE_NAME].rstrip("_"))


def build(request: BuildRequest, config: Config, progress: Progress) -> BuildReport:
    """Build, prove and write the module and its report.

    Every KmendError that speaks of the patch becomes a report with ``refused`` or ``failed``.

    Raises:
        KmendError: wrong usage, and a machine or kernel that cannot do it (exit status 2 and 3).
    """
    timings = Timings()
    name = name_of(request)
    with timings.measure("total"):
        patchset = parse(request.patches, strip=request.strip)
        with timings.measure("fetch"):
            target = _target(request.release, config, progress)
        work = _Build(request, name, patchset, target, config, progress, timings)
        report = reported(name, target, work.run)
    return concluded(report, timings)


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
        self.considered = 0
        self.units = UnitCounts()
        self.cves = cve_names(*(text for row in request.patches for text in row))
        self.digest = ""

    def run(self) -> BuildReport:
        measure = self.timings.measure
        with measure("prepare"):
            self._compiler()
            applied = self._apply()
            reached = self._reach(applied)
        with scratch(self.config) as folder:
            compiler = Compiler(self.config, self.target, folder, self.progress)
            with measure("compile"):
                pairs, view = self._compile(compiler, applied, reached)
            with measure("diff"):
                self.progress.step("comparing")
                works = self._diff(pairs, view)
                if not works:
                    return self._nothing()
            with measure("verify"):
                self.progress.step("proving against the kernel's own code")
                proofs = self._prove(view, works, compiler)
                self._review(view, pairs, works)
            self.refusals += [r for w in works for r in w.selection.refusals]
            self.refusals += [r for p in proofs for r in p.refusals]
            self._refuse()
        with measure("link"):
            data, rows = self._assemble(view, works, proofs, applied)
        with measure("verify"):
            self._check(view, data)
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
        reached = reached_by(applied, self.target, self.progress)
        self.warnings += reached.warnings
        self.considered = len(reached.units) + len(reached.candidates)
        return reached

    # -- objects --------------------------------------------------------------------------------

    def _compile(self, compiler: Compiler, applied: Applied, reached: Reach) -> tuple[list[Pair], TargetView]:
        """Original and patched object of every unit; the target is opened while the compilers run."""
        views: list[TargetView] = []
        pairs = compiler.pairs(applied, reached, lambda: views.append(self._open()))
        self.warnings += compiler.warnings
        return pairs, views[0] if views else self._open()

    def _open(self) -> TargetView:
        """The target, and the code of the stages to come: made ready while the compilers run."""
        from kmend.insn.decode import decode

        view = TargetView(self.config, self.target)
        for name in LATER:
            importlib.import_module(name)
        view.glue()
        view.symbols.named("_stext")  # the first question of all lets the table of names be made
        decode(b"\x90")  # the first instruction of all loads the decoder's tables
        return view

    def _diff(self, pairs: Sequence[Pair], view: TargetView) -> list[UnitWork]:
        """The units that the module is made of; none: the patch makes the same code everywhere."""
        from kmend.diff.compare import compare
        from kmend.diff.select import select

        works = []
        for pair in pairs:
            diff = compare(pair.old, pair.new, view.layout.special_sizes())
            selection = select(diff)
            # What is new alone changes nothing here, but another unit may need it.
            if not diff.nothing or diff.new_functions or diff.new_data or selection.refusals:
                types = self._types(pair)
                works.append(UnitWork(pair.unit, diff, selection, types))
            else:
                self.warnings += selection.warnings
        works = self._share(works, view.world())
        self.warnings += [warning for work in works for warning in work.selection.warnings]
        works = [w for w in works if w.selection.included or w.selection.refusals or w.diff.declared.acts]
        changed = [w for w in works if w.selection.changed or w.selection.refusals or w.diff.declared.acts]
        self.units = UnitCounts(self.considered, len(pairs), sum(bool(w.selection.changed) for w in works))
        return works if changed or self.refusals else []

    def _types(self, pair: Pair) -> tuple[Types, Types]:
        """The types of the two objects; what they lay out differently is refused."""
        from kmend.verify.types import Types, changed_layouts

        before, after = Types.of(pair.old.elf, pair.old.name), Types.of(pair.new.elf, pair.new.name)
        if before is None or after is None:
            raise Failed(f"{pair.new.name} was compiled without its types", rule="internal")
        self.refusals += changed_layouts(before, after)
        return before, after

    def _share(self, works: list[UnitWork], world: World) -> list[UnitWork]:
        """Let each unit bring along its new global functions and variables that another unit needs.

        Another unit of the same object, or of one that has it in reach: another module may have a global
        symbol of that name, which is not the one meant.
        """
        from kmend.diff.select import select

        while True:
            wanted = {
                (obj, name)
                for work in works
                for name in work.selection.externs
                for obj in world.in_reach(work.unit.owner)
            }
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

    def _prove(self, view: TargetView, works: Sequence[UnitWork], compiler: Compiler) -> list[Proof]:
        """Prove every unit; each knows what the others in its reach bring and make global."""
        from kmend.module.output import PATCH
        from kmend.verify.symbols import Prover

        world = view.world()
        provers = [Prover(world, w.unit.owner, w.diff.old, w.diff.old_special) for w in works]
        for work, prover in zip(works, provers, strict=True):
            shared: set[str] = {PATCH}
            elsewhere: dict[str, str] = {}
            promoted: dict[str, Callable[[], Resolution | None]] = {}
            reach = world.in_reach(work.unit.owner)
            others = [(w, its) for w, its in zip(works, provers, strict=True) if w.unit.owner in reach]
            for other, its in sorted(others, key=lambda row: reach.index(row[0].unit.owner)):
                for key, part in other.diff.new.parts.items():
                    twin = other.diff.twins.original.get(key)
                    if part.local:
                        continue
                    if twin is not None and other.diff.old.parts[twin].local:
                        promoted.setdefault(part.name, partial(its.reach, other.diff.old.parts[twin]))
                    elif twin is None and key in other.selection.included:
                        if other.unit.owner == work.unit.owner:
                            shared.add(part.name)
                        else:
                            elsewhere.setdefault(part.name, other.unit.owner)
            prover.prove(work.selection, frozenset(shared), promoted, elsewhere)
        proofs = [prover.proof for prover in provers]
        for work, proof in zip(works, proofs, strict=True):
            if proof.mismatches:
                self._second_look(view, work, proof, compiler)
        return proofs

    @staticmethod
    def _second_look(view: TargetView, work: UnitWork, proof: Proof, compiler: Compiler) -> None:
        """Compare once more without ``-ffunction-sections``.

        With it the assembler cannot shorten a jump to another static function of the unit, so a function
        may differ from the kernel's in nothing but the length of such a jump. Compiled as the kernel was,
        it must be the very code.
        """
        from kmend.diff.special import SpecialSections
        from kmend.verify.symbols import Prover

        plain = compiler.as_built(work.unit)
        special = SpecialSections(plain, view.layout.special_sizes())
        prover = Prover(view.world(), work.unit.owner, plain, special)
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

    # -- what a human has to decide ----------------------------------------------------------------

    def _review(self, view: TargetView, pairs: Sequence[Pair], works: Sequence[UnitWork]) -> None:
        """What the replaced functions do to the machine, however right the module is."""
        from kmend.verify.safety import ReviewUnit, review

        found = review(
            [ReviewUnit(work.unit.owner, work.selection, work.types) for work in works],
            [(pair.unit.owner, pair.old) for pair in pairs],
            view.callers(),
        )
        self.refusals += found.refusals
        self.warnings += found.warnings

    def _refuse(self) -> None:
        """Raise what has been refused and not been allowed."""
        from kmend.verify.allow import split

        decided = split(self.refusals, self.request.allow)
        self.warnings += decided.warnings
        if decided.refusals:
            raise Refused(decided.refusals)

    # -- module ---------------------------------------------------------------------------------

    def _assemble(
        self, view: TargetView, works: Sequence[UnitWork], proofs: Sequence[Proof], applied: Applied
    ) -> tuple[bytes, tuple[ObjectRow, ...]]:
        from kmend.module.assemble import UnitPatch, assemble
        from kmend.module.output import ModuleSpec

        rows = self._rows(works, proofs, applied)
        made_from = hashlib.sha256(
            json.dumps([[o.name, [[f.name, f.sympos, f.status] for f in o.functions]] for o in rows]).encode()
        )
        made_from.update(b"".join(text for _, text in self.request.patches))
        self.digest = digest = made_from.hexdigest()
        title, origin = self.patchset.title, self.patchset.origin
        base = frame(view, [work.unit.owner for work in works if work.unit.owner != VMLINUX])
        self.warnings += base.warnings
        assembled = assemble(
            ModuleSpec(
                self.name,
                self.request.replace,
                (
                    ("description", one_line(title) or f"live patch {self.name}"),
                    ("version", __version__),
                    *modinfo_of(self.target, self.name, digest=digest),
                ),
                note(self.target, self.name, title=title, origin=origin, digest=digest, cves=self.cves),
                base.forget,
            ),
            [
                UnitPatch(
                    work.unit.owner, work.unit.obj, work.selection, proof.outer, proof.externs, proof.sympos
                )
                for work, proof in zip(works, proofs, strict=True)
            ],
            base.glue,
            view.layout,
            base.crcs,
        )
        self.warnings += assembled.warnings
        return assembled.data, rows

    def _check(self, view: TargetView, data: bytes) -> None:
        """Hold the finished bytes against every rule, as ``kmend check`` would."""
        checked = view.check(data, self.name)
        self.warnings += checked.warnings
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

    def _nothing(self) -> BuildReport:
        warnings = tuple(dict.fromkeys(self.warnings))
        return BuildReport(
            self.name, Outcome.NOTHING_CHANGED, kernel_id(self.target), warnings=warnings, units=self.units
        )

    def _write(self, data: bytes, rows: tuple[ObjectRow, ...], proofs: Sequence[Proof]) -> BuildReport:
        return written(
            self.target,
            self.name,
            data,
            self.request.output,
            self.request.signing,
            objects=rows,
            warnings=self.warnings,
            verified=Verified(sum(p.functions for p in proofs), sum(p.identical for p in proofs), ()),
            units=self.units,
            cves=self.cves,
            digest=self.digest,
        )


def _why(name: str, difference: str, edited: frozenset[str], inlined: list[str]) -> str:
    from kmend.diff.unit import base_name

    if base_name(name) in edited:
        return "edited"
    if inlined:
        return f"inlines {', '.join(inlined)}, edited ({difference})"
    return f"compiled differently: {difference}"
