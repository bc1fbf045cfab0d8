"""Original against patched: which functions and variables differ, and in what.

Two parts are the same when their bytes are the same and every relocation means the
same: twins at the same offset, equal strings, equal constants. For a function the
entries of the special sections that it owns count as well, with the replacement code
of alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from kmend.diff.declared import Declarations, declarations, is_declaration
from kmend.diff.runtime_const import module_form
from kmend.diff.special import DISPENSABLE, ORC, SATELLITES, TABLE, Entry, SpecialSections
from kmend.diff.twins import Twins, match, section_class
from kmend.diff.unit import Part, PartKind, Ref, RefKind, UnitObject, base_name
from kmend.elf.model import SHF_ALLOC, Reloc, Section
from kmend.elf.reader import slice_relocs
from kmend.insn.decode import decode

#: Where variables stand that are nothing but memory; the sections differ in where the linker puts them.
_ORDINARY = frozenset(
    {
        *(".data", ".bss", ".data..read_mostly", ".data.unlikely", ".data..unlikely", ".data.once"),
        *(".data..once", ".data.do_once", ".data..do_once", ".data..cacheline_aligned", ".ref.data"),
        *(".data..page_aligned", ".bss..page_aligned"),
    }
)
_NO_IDENTITY = frozenset({"__func__", "__PRETTY_FUNCTION__", "__FUNCTION__", "CSWTCH"})


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing found to differ between twins, for people."""

    what: str


@dataclass(frozen=True, slots=True)
class ObjectDiff:
    """The outcome for one pair of objects. All keys are of the patched object but for ``removed``.

    ``old`` is as it was compiled, ``new`` in the form that its code has in a module
    (:mod:`kmend.diff.runtime_const`).
    """

    old: UnitObject
    new: UnitObject
    old_special: SpecialSections
    new_special: SpecialSections
    twins: Twins
    changed: dict[str, Difference]
    new_functions: tuple[str, ...]
    removed: tuple[str, ...]
    changed_data: dict[str, Difference]
    new_data: tuple[str, ...]
    #: sections without symbols (export tables, …) that differ
    changed_sections: tuple[str, ...]
    #: what the patched object declares beside its code
    declared: Declarations
    #: functions that differ and are to stay as they are all the same (keys of the patched object)
    ignored: tuple[str, ...]

    @property
    def nothing(self) -> bool:
        """Whether the two objects mean the same (a removed function alone changes nothing)."""
        return not (self.changed or self.changed_data or self.changed_sections or self.declared.acts)


def cold_parent(unit: UnitObject, part: Part) -> Part | None:
    """The function that a ``.cold`` part was split from."""
    if ".cold" not in part.name:
        return None
    name = part.name.partition(".cold")[0]
    # GCC names it after one of the function's names, which need not be the one that stands for all.
    return unit.parts.get(unit.aliases.get(name, name))


def without_identity(unit: UnitObject, part: Part) -> bool:
    """Whether nobody can tell one copy of the read-only data from another: tables that GCC makes of a
    ``switch`` (``CSWTCH``), and the name of a function.
    """
    return (
        part.kind is PartKind.DATA
        and part.local
        and not unit.section_of(part).writable
        and base_name(part.name) in _NO_IDENTITY
    )


def moved(old: UnitObject, a: Part, new: UnitObject, b: Part) -> bool:
    """Whether a variable stands in another section that says something of how it is reached or may be used.

    A per-CPU variable is reached by its offset in each CPU's area; one that was read-only after init must not
    be written. Between the sections of ordinary variables nothing changes. What moves to init memory or from
    there is seen where it is used.
    """
    before, after = section_class(old, a), section_class(new, b)
    if before == after or before.startswith(".init") or after.startswith(".init"):
        return False
    if before.startswith(".rodata") and after.startswith(".rodata"):
        return False
    return not (before in _ORDINARY and after in _ORDINARY | {".data..ro_after_init"})


def compare(old: UnitObject, new: UnitObject, sizes: Mapping[str, int] | None = None) -> ObjectDiff:
    """Compare two objects of one unit; ``sizes`` are the target's special-section entry sizes.

    Raises:
        Failed: (rules ``special-section``, ``relocation-type``, ``undecodable``) something in either
            object is not understood.
    """
    plain = module_form(old)
    found = _Comparer(plain, module_form(new), sizes).run()
    return found if plain is old else replace(found, old=old, old_special=SpecialSections(old, sizes))


class _Comparer:
    def __init__(self, old: UnitObject, new: UnitObject, sizes: Mapping[str, int] | None) -> None:
        self.old, self.new = old, new
        self.old_special = SpecialSections(old, sizes)
        self.new_special = SpecialSections(new, sizes)
        self.twins = match(old, new)
        #: What is being compared right now: data without a name of its own may refer to itself, directly
        #: or through others. Such a pair is the same unless a difference is found somewhere on the round.
        self._open: set[tuple[str | int, str | int]] = set()

    def run(self) -> ObjectDiff:
        changed: dict[str, Difference] = {}
        changed_data: dict[str, Difference] = {}
        new_functions: list[str] = []
        new_data: list[str] = []
        for key, part in self.new.parts.items():
            twin = self.twins.original.get(key)
            function = part.kind is PartKind.FUNCTION
            if twin is None:
                (new_functions if function else new_data).append(key)
                continue
            difference = self._parts(self.old.parts[twin], part)
            if difference is not None:
                (changed if function else changed_data)[key] = difference
        self._join_cold(changed, new_functions)
        declared = declarations(self.new.elf)
        ignored = self._ignored(declared)
        left_out = tuple(key for key in ignored if changed.pop(key, None) is not None)
        kept = set(self.twins.original.values())
        removed = tuple(p.key for p in self.old.functions() if p.key not in kept)
        return ObjectDiff(
            self.old,
            self.new,
            self.old_special,
            self.new_special,
            self.twins,
            changed,
            tuple(new_functions),
            removed,
            changed_data,
            tuple(new_data),
            self._sections(),
            declared,
            left_out,
        )

    def _ignored(self, declared: Declarations) -> list[str]:
        """The functions that the patch's author wants left alone, with their cold parts."""
        named = {
            part.key
            for place in declared.ignored_functions
            if (part := self.new.covering(place.section, place.offset)) is not None
        }
        parents = {part.key: cold_parent(self.new, part) for part in self.new.functions()}
        return [key for key, parent in parents.items() if key in named or (parent and parent.key in named)]

    def _join_cold(self, changed: dict[str, Difference], new_functions: list[str]) -> None:
        """A function and its cold part jump into each other: when one differs both are replaced."""
        fresh = set(new_functions)
        for part in self.new.functions():
            parent = cold_parent(self.new, part)
            if parent is None:
                continue
            if (part.key in changed or part.key in fresh) and parent.key not in fresh:
                changed.setdefault(parent.key, Difference(f"its cold part {part.name} differs"))
            if parent.key in changed and part.key not in fresh:
                changed.setdefault(part.key, Difference(f"the function {parent.name} differs"))

    # -- one pair ---------------------------------------------------------

    def _parts(self, a: Part, b: Part) -> Difference | None:
        if a.size != b.size:
            return Difference(f"its size was {a.size} and is {b.size} bytes")
        code_a, code_b = self.old.code(a), self.new.code(b)
        if code_a != code_b:
            at = next(i for i in range(a.size) if code_a[i] != code_b[i])
            return Difference(f"its bytes differ from +{at:#x} on")
        difference = self._rows(
            self.old.section_of(a),
            self.old.relocs(a),
            a.start,
            self.new.section_of(b),
            self.new.relocs(b),
            b.start,
        )
        if difference is not None or b.kind is PartKind.DATA:
            if difference is None and self.old.section_of(a).flags != self.new.section_of(b).flags:
                return Difference("its section's flags differ")
            if difference is None and b.kind is PartKind.DATA and moved(self.old, a, self.new, b):
                was, now = section_class(self.old, a), section_class(self.new, b)
                return Difference(f"it stood in {was} and now stands in {now}")
            return difference
        for name, table_row in TABLE.items():
            if not table_row.compared:
                continue
            before = self.old_special.entries(a.key, name)
            after = self.new_special.entries(b.key, name)
            if len(before) != len(after):
                return Difference(f"it had {len(before)} entries in {name} and has {len(after)}")
            for x, y in zip(before, after, strict=True):
                difference = self._entries(name, x, y)
                if difference is not None:
                    return difference
        return None

    def _rows(
        self,
        section_a: Section,
        relocs_a: tuple[Reloc, ...],
        start_a: int,
        section_b: Section,
        relocs_b: tuple[Reloc, ...],
        start_b: int,
    ) -> Difference | None:
        if len(relocs_a) != len(relocs_b):
            return Difference(f"it had {len(relocs_a)} relocations and has {len(relocs_b)}")
        for x, y in zip(relocs_a, relocs_b, strict=True):
            at = y.offset - start_b
            if x.offset - start_a != at or x.type != y.type:
                return Difference(f"its relocation at +{at:#x} is of another kind or elsewhere")
            ref_a, ref_b = self.old.ref(section_a, x), self.new.ref(section_b, y)
            if not self._same(ref_a, ref_b):
                return Difference(
                    f"at +{at:#x} it referred to {_words(ref_a)} and now refers to {_words(ref_b)}"
                )
        return None

    def _entries(self, name: str, x: Entry, y: Entry) -> Difference | None:
        where = f"its entry in {name} for +{y.owner_offset:#x}"
        if x.owner_offset != y.owner_offset or x.data != y.data:
            return Difference(f"{where} differs")
        sections = self.old.elf.sections[x.section], self.new.elf.sections[y.section]
        # The fields that lead to satellites are compared by what lies there, not by where it lies.
        skip = 2 if name == ".altinstructions" else 1
        if len(x.relocs) != len(y.relocs):
            return Difference(f"{where} differs")
        for p, q in zip(x.relocs[skip:], y.relocs[skip:], strict=True):
            if p.offset != q.offset or p.type != q.type:
                return Difference(f"{where} differs")
            ref_p = self.old.ref(sections[0], _moved(p, x.offset))
            ref_q = self.new.ref(sections[1], _moved(q, y.offset))
            if not self._same(ref_p, ref_q):
                return Difference(f"{where} referred to {_words(ref_p)} and now refers to {_words(ref_q)}")
        if name == ".altinstructions":
            a, b = self.old_special.replacement(x), self.new_special.replacement(y)
            if a is not None and b is not None:
                return self._satellite(a, b, where)
            if a != b:
                return Difference(f"{where} differs")
        return None

    def _satellite(self, a: tuple[int, int, int], b: tuple[int, int, int], where: str) -> Difference | None:
        section_a, section_b = self.old.elf.sections[a[0]], self.new.elf.sections[b[0]]
        if section_a.data[a[1] : a[1] + a[2]] != section_b.data[b[1] : b[1] + b[2]]:
            return Difference(f"the replacement of {where} differs")
        return self._rows(
            section_a,
            slice_relocs(section_a.relocs, a[1], a[1] + a[2]),
            a[1],
            section_b,
            slice_relocs(section_b.relocs, b[1], b[1] + b[2]),
            b[1],
        )

    def _same(self, a: Ref, b: Ref) -> bool:
        """Whether two references mean the same thing."""
        if a.kind is not b.kind:
            return False
        match a.kind:
            case RefKind.PART:
                if a.addend != b.addend:
                    return False
                x, y = self.old.parts[a.name], self.new.parts[b.name]
                if without_identity(self.old, x) and without_identity(self.new, y):
                    # The code may stay the same to the byte while the values of its table change.
                    return base_name(x.name) == base_name(y.name) and self._round(
                        (x.key, y.key), lambda: self._parts(x, y)
                    )
                return self.twins.original.get(b.name) == a.name
            case RefKind.EXTERN:
                return a.name == b.name and a.addend == b.addend
            case RefKind.STRING:
                return a.content == b.content
            case RefKind.CONST:
                size = len(a.content)
                return a.content == b.content and a.addend % size == b.addend % size
            case RefKind.EMPTY:
                return base_name(a.name) == base_name(b.name) and a.addend == b.addend
            case RefKind.OPAQUE:
                return self._same_opaque(a, b)

    def _same_opaque(self, a: Ref, b: Ref) -> bool:
        section_a, section_b = self.old.elf.sections[a.section], self.new.elf.sections[b.section]
        if section_a.name != section_b.name:
            return False
        if section_a.name == ".altinstr_aux":
            start_a, end_a = self.old_special.aux_block(a.addend)
            start_b, end_b = self.new_special.aux_block(b.addend)
            return (
                self._satellite(
                    (a.section, start_a, end_a - start_a), (b.section, start_b, end_b - start_b), "aux"
                )
                is None
            )
        return (
            a.addend == b.addend
            and section_a.data == section_b.data
            and self._round(
                (a.section, b.section),
                lambda: self._rows(section_a, section_a.relocs, 0, section_b, section_b.relocs, 0),
            )
        )

    def _round(self, pair: tuple[str | int, str | int], look: Callable[[], Difference | None]) -> bool:
        """Whether ``look`` finds no difference, where it may come by this very pair again."""
        if pair in self._open:
            return True
        self._open.add(pair)
        try:
            return look() is None
        finally:
            self._open.remove(pair)

    # -- whole sections ----------------------------------------------------

    def _sections(self) -> tuple[str, ...]:
        """Names of loaded sections without symbols of their own whose contents differ."""

        def loose(unit: UnitObject) -> dict[str, list[Section]]:
            out: dict[str, list[Section]] = {}
            for section in unit.elf.sections:
                if (
                    section.flags & SHF_ALLOC
                    and section.size
                    and not section.strings
                    and section.name not in TABLE
                    and section.name not in SATELLITES | DISPENSABLE
                    and section.name != ORC
                    and not section.name.startswith((".rodata.cst", ".note.", ".discard"))
                    and not unit.parts_in(section.index)
                    and not is_declaration(section.name)
                ):
                    out.setdefault(section.name, []).append(section)
            return out

        before, after = loose(self.old), loose(self.new)
        out = []
        for name in sorted(set(before) | set(after)):
            xs, ys = before.get(name, []), after.get(name, [])
            same = len(xs) == len(ys) and all(
                x.data == y.data and x.size == y.size and self._rows(x, x.relocs, 0, y, y.relocs, 0) is None
                for x, y in zip(xs, ys, strict=True)
            )
            if not same:
                out.append(name)
        return tuple(dict.fromkeys([*out, *self._gaps()]))

    def _gaps(self) -> Iterator[str]:
        """Names of sections whose bytes between functions or variables differ: assembler text."""

        def gaps(unit: UnitObject) -> dict[str, list[tuple[Section, int, int]]]:
            out: dict[str, list[tuple[Section, int, int]]] = {}
            for section in unit.elf.sections:
                at = 0
                parts = unit.parts_in(section.index)
                for start, end in [(p.start, p.end) for p in parts] + [(section.size, section.size)]:
                    if parts and at < start and not _padding(section, at, start):
                        out.setdefault(section.name, []).append((section, at, start))
                    at = max(at, end)
            return out

        before, after = gaps(self.old), gaps(self.new)
        for name in sorted(before.keys() | after.keys()):
            xs, ys = before.get(name, []), after.get(name, [])
            if len(xs) != len(ys) or any(
                self._satellite(
                    (a.index, a_start, a_end - a_start), (b.index, b_start, b_end - b_start), name
                )
                for (a, a_start, a_end), (b, b_start, b_end) in zip(xs, ys, strict=True)
            ):
                yield name


def _padding(section: Section, start: int, end: int) -> bool:
    """Whether nothing but what fills up to an alignment stands there."""
    data = section.data[start:end]
    if not section.relocs and not data.strip(b"\0"):
        return True  # also without contents
    if slice_relocs(section.relocs, start, end):
        return False
    if not section.executable:
        return not data.strip(b"\0")
    insns = decode(data)
    return sum(i.length for i in insns) == len(data) and all(
        i.text.startswith(("nop", "int3", "xchgw %ax, %ax", "data16")) for i in insns
    )


def _moved(reloc: Reloc, by: int) -> Reloc:
    return Reloc(reloc.offset + by, reloc.type, reloc.symbol, reloc.addend)


def _words(ref: Ref) -> str:
    if ref.kind is RefKind.STRING:
        text = ref.content[:-1].decode(errors="replace")
        return f'"{text[:40]}"'
    return ref.name or "?"
