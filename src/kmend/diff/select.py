"""What goes into the module: the changed functions and all that they need and the kernel lacks.

The closure starts at the changed functions. A reference from something included leads

- to a function of the patched object that is new: it is included as well;
- to a changed function: a direct call goes to the new code; a pointer goes to the *original*
  (ftrace redirects it), since a pointer may outlive the module;
- to an unchanged function or variable: to the one in the running kernel, whose state is the
  truth. Read-only text whose identity nobody can see (``__func__``) is copied instead;
- to a new variable: included.

Everything that cannot be carried over faithfully becomes a refusal; all of them are
collected before anyone is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from kmend.core.errors import Refusal
from kmend.diff.compare import ObjectDiff, cold_parent, moved, without_identity
from kmend.diff.declared import CallbackKind
from kmend.diff.exports import exports_of, is_export_table
from kmend.diff.special import DISPENSABLE, ORC, PER_CPU, SATELLITES, TABLE, Entry
from kmend.diff.twins import section_class
from kmend.diff.unit import Part, PartKind, Ref, RefKind, UnitObject, base_name
from kmend.elf.model import Reloc, Section
from kmend.elf.reader import slice_relocs
from kmend.elf.x86_64 import R_PC32, R_PLT32
from kmend.insn.decode import containing

#: Sections whose memory is gone (or never runs again) once the kernel or module is up.
_INIT = (".init", ".exit", ".meminit", ".devinit", ".cpuinit")
#: Sections that new variables may stand in: the module loader gives each of them its meaning.
#: (``.data..once`` is the name of ``.data.once`` since dbefa1f31a91, 6.13, and in stable kernels.) See
#: docs/special-sections.md.
_PLAIN_DATA = (
    *(".data", ".bss", ".rodata", ".data.once", ".data..once", ".data.do_once", ".data..do_once"),
    *(".data..read_mostly", ".data.unlikely", ".data..unlikely", ".data..cacheline_aligned"),
    *(".data..ro_after_init", "__trace_printk_fmt"),
    *(PER_CPU, PER_CPU + "..shared_aligned", PER_CPU + "..read_mostly", PER_CPU + "..page_aligned"),
)
#: The per-CPU part of a DEFINE_SRCU() in code of vmlinux (include/linux/srcutree.h).
_SRCU = "_srcu_data"
#: Descriptors of pr_debug(); those of whole classes of messages (``__dyndbg_classes``) are another thing.
_DYNDBG = "__dyndbg"
#: Sections whose variables nobody looks for: one may go when the code that used it goes.
_TAKEN_AWAY = (".data", ".bss", ".rodata", ".init.data", ".init.rodata", ".exit.data", ".discard")
#: New rows here change nothing that runs: information about the module or the printk formats.
_PRINTK_INDEX = ".printk_index"
_INFORMATION = (".modinfo", _PRINTK_INDEX)
#: Static locals that only say whether, or how often, a message was printed: where their twin cannot be told,
#: a fresh one does (include/linux/once_lite.h, include/linux/ratelimit.h). Not those of DO_ONCE()
#: (include/linux/once.h): get_random_once() would seed a table anew that is in use.
_FRESH = frozenset({"_rs", "__already_done", "__warned", "__print_once"})


class LinkKind(Enum):
    """Where a relocation of the module has to lead."""

    LOCAL = "local"  # a part that the module carries
    OUTER = "outer"  # a part of the original object, as it is in the running kernel
    EXTERN = "extern"  # a symbol that neither object defines
    STRING = "string"
    CONST = "const"
    EMPTY = "empty"  # a variable of size 0
    SATELLITE = "satellite"  # replacement code of an alternative


@dataclass(frozen=True, slots=True)
class Link:
    """``name``: key of the patched part (LOCAL), key of the original part (OUTER), symbol (EXTERN)."""

    kind: LinkKind
    name: str
    ref: Ref


@dataclass(frozen=True, slots=True)
class Changed:
    """A function to be replaced: its key in the patched and in the original object, and what differs."""

    key: str
    original: str
    difference: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The outcome for one unit. ``included`` are keys of the patched object, in its order."""

    diff: ObjectDiff
    changed: tuple[Changed, ...]
    new_functions: tuple[str, ...]
    included: tuple[str, ...]
    #: original parts that the module reaches, by key
    outer: tuple[str, ...]
    #: symbols of other units that the module reaches
    externs: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    warnings: tuple[Refusal, ...]
    #: functions of the patched object (keys) that the kernel calls around patching its object
    callbacks: tuple[tuple[CallbackKind, str], ...]
    #: ``struct klp_state`` rows: id and version
    states: tuple[tuple[int, int], ...]


def is_init(section: Section) -> bool:
    """Whether the section's code or data exists only while the kernel or the module starts or leaves."""
    return section.name.startswith(_INIT)


def is_branch(section: Section, reloc: Reloc) -> bool:
    """Whether the relocation is the operand of a direct ``call``, ``jmp`` or conditional jump.

    Of the PC-relative operands only these have such a byte before them: with any other instruction it is
    a ModRM byte of the form 00xxx101.
    """
    code, at = section.data, reloc.offset
    if not section.executable or reloc.type not in (R_PC32, R_PLT32):
        return False
    if at >= 1 and code[at - 1] in (0xE8, 0xE9):
        return True
    return at >= 2 and code[at - 2] == 0x0F and 0x80 <= code[at - 1] <= 0x8F


class Linker:
    """Decides for each relocation of an included part where it leads."""

    def __init__(self, diff: ObjectDiff) -> None:
        self.diff = diff
        self.new = diff.new

    def family(self, part: Part) -> str:
        """The function that the part is or was split from."""
        parent = cold_parent(self.new, part)
        return parent.key if parent else part.key

    def replaced(self, key: str) -> bool:
        """Whether the part of the patched object goes into the module in place of an original function."""
        return key in self.diff.changed

    def of_code(self, part: Part, section: Section, reloc: Reloc) -> Link:
        """The link of a relocation inside ``part``."""
        ref = self.new.ref(section, reloc)
        if ref.kind is not RefKind.PART:
            return self._other(ref)
        target = self.new.parts[ref.name]
        if self.family(target) == self.family(part):
            return Link(LinkKind.LOCAL, target.key, ref)
        if target.kind is PartKind.DATA:
            return self._data(target, ref)
        twin = self.diff.twins.original.get(target.key)
        if twin is None:
            return Link(LinkKind.LOCAL, target.key, ref)
        if not self.replaced(target.key):
            return Link(LinkKind.OUTER, twin, ref)
        if is_branch(section, reloc):
            return Link(LinkKind.LOCAL, target.key, ref)
        return Link(LinkKind.OUTER, twin, ref)

    def of_entry(self, entry: Entry, reloc: Reloc) -> Link:
        """The link of a relocation of a special section's entry: code it names is the module's own."""
        section = self.new.elf.sections[entry.section]
        ref = self.new.ref(
            section, Reloc(reloc.offset + entry.offset, reloc.type, reloc.symbol, reloc.addend)
        )
        if ref.kind is not RefKind.PART:
            return self._other(ref)
        target = self.new.parts[ref.name]
        if target.kind is PartKind.DATA:
            return self._data(target, ref)
        return Link(LinkKind.LOCAL, target.key, ref)

    def of_satellite(self, owner: Part, section: Section, reloc: Reloc) -> Link:
        """The link of a relocation inside replacement code that belongs to ``owner``."""
        ref = self.new.ref(section, reloc)
        if ref.kind is RefKind.PART and self.family(self.new.parts[ref.name]) == self.family(owner):
            return Link(LinkKind.LOCAL, ref.name, ref)
        return self.of_code(owner, section, reloc)

    def _data(self, target: Part, ref: Ref) -> Link:
        twin = self.diff.twins.original.get(target.key)
        if twin is None or self.copied(target):
            return Link(LinkKind.LOCAL, target.key, ref)
        return Link(LinkKind.OUTER, twin, ref)

    def copied(self, target: Part) -> bool:
        """Whether the module gets a copy of its own although the kernel has the variable.

        Dynamic debug descriptors: the static key inside would else belong to the patched module, whose
        address is not known while it is not loaded; the copy starts with its message off
        (lib/dynamic_debug.c registers the copies of a module when it is loaded).
        """
        section = self.new.section_of(target)
        if section.name == _DYNDBG:
            return True
        return without_identity(self.new, target)

    def _other(self, ref: Ref) -> Link:
        match ref.kind:
            case RefKind.EXTERN:
                return Link(LinkKind.EXTERN, ref.name, ref)
            case RefKind.STRING:
                return Link(LinkKind.STRING, "", ref)
            case RefKind.CONST:
                return Link(LinkKind.CONST, "", ref)
            case RefKind.EMPTY:
                return Link(LinkKind.EMPTY, ref.name, ref)
            case RefKind.OPAQUE | RefKind.PART:
                return Link(LinkKind.SATELLITE, self.new.elf.sections[ref.section].name, ref)


def select(diff: ObjectDiff, extra_roots: Iterable[str] = ()) -> Selection:
    """Choose what the module carries of one unit.

    ``extra_roots`` are new global functions or variables that other units of the patch refer to.
    """
    return _Selector(diff, tuple(extra_roots)).run()


def _unknown_tables(unit: UnitObject) -> dict[str, tuple[str, ...]]:
    """For each function the tables, unknown to kmend, that name a place inside of it.

    ``runtime_shift_d_hash_shift`` (arch/x86/include/asm/runtime-const.h, since 6.11) is one: the kernel puts
    the real number in place of the 12 in ``shrl $12,%eax``, and does so for itself alone. (For
    ``runtime_ptr_…`` see :mod:`kmend.diff.runtime_const`.) What names only a function's beginning (exports)
    does not change its code.
    """
    known = TABLE.keys() | SATELLITES | DISPENSABLE | {ORC}
    found: dict[str, dict[str, None]] = {}
    for section in unit.elf.sections:
        if not section.alloc or section.executable or section.name in known or unit.parts_in(section.index):
            continue
        if section.name.startswith((".discard", ".note")):
            continue
        for reloc in section.relocs:
            ref = unit.ref(section, reloc)
            part = unit.parts[ref.name] if ref.kind is RefKind.PART else None
            if part is not None and part.kind is PartKind.FUNCTION and ref.addend:
                found.setdefault(part.key, {})[section.name] = None
    return {key: tuple(names) for key, names in found.items()}


def _index_only(unit: UnitObject) -> frozenset[str]:
    """Variables that only the printk index refers to: descriptions of messages, which no code reads.

    ``_entry`` of pr_info() and its like with ``CONFIG_PRINTK_INDEX`` (include/linux/printk.h).
    """
    named: set[str] = set()
    used: set[str] = set()
    if not any(s.name.startswith(_PRINTK_INDEX) for s in unit.elf.sections):
        return frozenset()
    for section in unit.elf.sections:
        for reloc in section.relocs if section.alloc else ():
            ref = unit.ref(section, reloc)
            if ref.kind is RefKind.PART:
                (named if section.name.startswith(_PRINTK_INDEX) else used).add(ref.name)
    return frozenset(named - used)


class _Selector:
    def __init__(self, diff: ObjectDiff, extra_roots: tuple[str, ...]) -> None:
        self.diff = diff
        self.old, self.new = diff.old, diff.new
        self.linker = Linker(diff)
        self.roots = extra_roots
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.warnings: dict[tuple[str, str], Refusal] = {}
        #: sections that the patch's author wants left alone, as far as they differ
        self._asked = frozenset(diff.declared.ignored_sections)
        self._skipped: set[str] = set()
        self._tables = _unknown_tables(self.new)
        self._index = _index_only(self.new)

    def refuse(self, rule: str, what: str, why: str, next_step: str) -> None:
        self.refusals.setdefault((rule, what), Refusal(rule, what, why, next_step))

    def warn(self, rule: str, what: str, why: str, next_step: str) -> None:
        self.warnings.setdefault((rule, what), Refusal(rule, what, why, next_step))

    def run(self) -> Selection:
        diff, new = self.diff, self.new
        changed = tuple(
            Changed(key, diff.twins.original[key], difference.what)
            for key, difference in diff.changed.items()
            if cold_parent(new, new.parts[key]) is None
        )
        for row in changed:
            self._replaceable(row)
        self._data_rules()
        self._section_rules()
        living = [key for key in diff.changed if not is_init(new.section_of(new.parts[key]))]
        callbacks = self._declared()
        called = [key for _, key in callbacks]
        included, outer, externs = self._closure([*living, *called, *self.roots])
        self._renamed(included)
        order = [key for key in new.parts if key in included]
        new_functions = tuple(
            key
            for key in order
            if new.parts[key].kind is PartKind.FUNCTION
            and key not in diff.changed
            and cold_parent(new, new.parts[key]) is None
        )
        return Selection(
            diff,
            changed,
            new_functions,
            tuple(order),
            tuple(sorted(outer)),
            tuple(sorted(externs)),
            tuple(self.refusals.values()),
            tuple(self.warnings.values()),
            callbacks,
            diff.declared.states,
        )

    def _declared(self) -> tuple[tuple[CallbackKind, str], ...]:
        """The callbacks; and what else the patch declares is told or refused."""
        declared = self.diff.declared
        for refusal in declared.refusals:
            self.refuse(refusal.rule, refusal.what, refusal.why, refusal.next_step)
        callbacks = []
        for kind, place in declared.callbacks:
            part = self.new.covering(place.section, place.offset) if place.section else None
            if part is None or part.kind is not PartKind.FUNCTION or part.start != place.offset:
                self.refuse(
                    "callback-elsewhere",
                    place.symbol or f"the {kind.words} callback",
                    f"it is declared as {kind.words} callback in {self.new.name}, which does not define it",
                    "declare the callback in the file that defines it",
                )
                continue
            callbacks.append((kind, part.key))
        for key in self.diff.ignored:
            self.warn(
                "ignored-by-patch",
                self.new.parts[key].name,
                "the function comes out differently, and the patch asks to leave it as it is",
                "make sure that old and new code agree without it",
            )
        for name in sorted(self._skipped):
            self.warn(
                "ignored-by-patch",
                f"section {name}",
                "the patch asks to leave its data as it is",
                "make sure that the change does not need it",
            )
        for place in declared.forced:
            self.warn(
                "force-unsafe",
                place.symbol or "a function",
                "the patch asks for it to be replaced while it runs (KPATCH_FORCE_UNSAFE); the kernel "
                "switches each task when the function is not on its stack, and knows no exception",
                "nothing is to be done; if the transition does not end, see which task stands in it",
            )
        return tuple(callbacks)

    # -- rules ---------------------------------------------------------------

    def _replaceable(self, row: Changed) -> None:
        part = self.old.parts[row.original]
        section = self.old.section_of(part)
        if is_init(section):
            self.refuse(
                "init-code",
                part.name,
                f"it stands in {section.name}: it has run already and its memory is gone",
                "leave the change to the next reboot, or split it off the patch",
            )
            return
        if not self.diff.old_special.entries(part.key, "__mcount_loc"):
            self.refuse(
                "no-ftrace-entry",
                part.name,
                f"it differs ({row.difference}) but does not begin with a call of __fentry__ "
                "(notrace, noinstr, or an object without -pg), so ftrace cannot redirect it",
                "change a traceable caller of it instead, or leave the change to the next reboot",
            )

    def _data_rules(self) -> None:
        for key, difference in self.diff.changed_data.items():
            part = self.new.parts[key]
            section = self.new.section_of(part)
            if section.name.startswith(_INFORMATION) or self.linker.copied(part):
                continue
            if section.name in TABLE or key in self._index:
                continue
            if self._wanted_as_it_is(section.name, section_class(self.new, part)):
                continue
            before = self.old.parts[self.diff.twins.original[key]]
            if not is_init(section) and (
                before.size != part.size
                or self.old.section_of(before).flags != section.flags
                or moved(self.old, before, self.new, part)
            ):
                # Nobody may allow this: new code would read or write beyond the old variable, or into
                # memory that is read-only.
                self.refuse(
                    "reshaped-data",
                    part.name,
                    f"{difference.what}; the running kernel has it as it was, and the new code would go by "
                    "its new shape",
                    "keep the variable as it is and define another one for the new code",
                )
                continue
            self.refuse(
                "init-data" if is_init(section) else "changed-data",
                part.name,
                f"the patch changes the contents of a variable in {section.name} ({difference.what}); "
                "the running kernel has its own copy, possibly modified since",
                "leave the initializer as it is and set the variable in a callback: KMEND_PRE_PATCH() or "
                "KMEND_POST_PATCH() of kmend.h, taken back in the matching unpatch callback",
            )
        for key in self.diff.new_data:
            part = self.new.parts[key]
            name = section_class(self.new, part)
            if name.startswith((*_INFORMATION, ".discard")) or name == _DYNDBG or self._plain(name):
                continue
            if name in TABLE or self._wanted_as_it_is(name):
                continue
            self.refuse(
                "init-data" if name.startswith(_INIT) else "special-data",
                f"section {name}" if name == ".BTF_ids" else part.name,
                f"the patch adds a variable to the section {name}, which only the kernel's or the "
                "module's own start looks at",
                "leave this part of the change to the next reboot",
            )

        kept = set(self.diff.twins.original.values())
        for part in self.old.variables():
            name = section_class(self.old, part)
            if part.key in kept or name == _DYNDBG or name.startswith((*_INFORMATION, *_TAKEN_AWAY)):
                continue
            if name in TABLE or self._wanted_as_it_is(name):
                continue
            self.refuse(
                "init-data" if name.startswith(_INIT) else "special-data",
                f"section {name}" if name == ".BTF_ids" else part.name,
                f"the patch takes a variable away from the section {name}, which the kernel or the module "
                "has looked at when it started",
                "leave this part of the change to the next reboot",
            )

    def _wanted_as_it_is(self, *names: str) -> bool:
        """Whether the patch asks to leave a section of one of these names alone; notes that it mattered."""
        found = self._asked.intersection(names)
        self._skipped |= found
        return bool(found)

    def _renamed(self, included: set[str]) -> None:
        """A variable that goes and one that comes, of one size: the same by another name?"""
        kept = set(self.diff.twins.original.values())
        gone = {
            (section_class(self.old, part), part.size): part.name
            for part in self.old.variables()
            if part.key not in kept and self._has_state(self.old, part)
        }
        for key in self.diff.new_data:
            part = self.new.parts[key]
            before = gone.get((section_class(self.new, part), part.size))
            if before is None or key not in included or not self._has_state(self.new, part):
                continue
            if key in self.diff.twins.ambiguous:
                continue
            self.refuse(
                "renamed-variable",
                part.name,
                f"the patch takes {before} away and brings a variable of the same size: if it is the same "
                f"one by another name, the running kernel has its state under {before}",
                "keep the old name; or, if they are two things, keep the old variable in place",
            )

    @staticmethod
    def _has_state(unit: UnitObject, part: Part) -> bool:
        name = unit.section_of(part).name
        return (
            unit.section_of(part).writable
            and name != _DYNDBG
            and not name.startswith(_INIT)
            and base_name(part.name) not in _FRESH
        )

    @staticmethod
    def _plain(name: str) -> bool:
        return name in _PLAIN_DATA or name.startswith((".rodata.", ".data..read_mostly"))

    def _section_rules(self) -> None:
        for name in self.diff.changed_sections:
            if name.startswith(_INFORMATION) or self._wanted_as_it_is(name):
                continue
            if is_export_table(name):
                continue
            self.refuse(
                "init-data" if name.startswith(_INIT) else "changed-section",
                f"section {name}",
                "the patch changes a table that kmend does not carry over",
                "leave this part of the change to the next reboot",
            )
        self._exports()
        before, after = Counter(self.diff.old_special.orphans), Counter(self.diff.new_special.orphans)
        for table, where in (before - after) | (after - before):
            self.refuse(
                "special-section",
                f"section {table}",
                f"its entries about {where}, which no function symbol covers, changed",
                "leave the change to the next reboot",
            )

    def _exports(self) -> None:
        """The kernel's own table decides which modules may load; replaced code does not depend on it."""
        old, new = exports_of(self.old), exports_of(self.new)
        for name in sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
            verb = (
                "exports"
                if name not in old
                else "stops exporting"
                if name not in new
                else "otherwise exports"
            )
            self.warn(
                "export-changed",
                name,
                f"the patch {verb} it; what the running kernel exports is fixed, and stays as it is",
                "nothing, unless a module that is yet to be built shall use it"
                if name not in old
                else "nothing, unless a module must be kept from using it",
            )

    # -- closure ---------------------------------------------------------------

    def _closure(self, roots: list[str]) -> tuple[set[str], set[str], set[str]]:
        included: set[str] = set()
        outer: set[str] = set()
        externs: set[str] = set()
        waiting = list(roots)
        while waiting:
            key = waiting.pop()
            if key in included:
                continue
            included.add(key)
            part = self.new.parts[key]
            self._carried(part)
            self._places(part)
            for link, pointer in self._links(part):
                match link.kind:
                    case LinkKind.LOCAL:
                        target = self.new.parts[link.name]
                        if link.name not in included:
                            waiting.append(link.name)
                        if (
                            pointer
                            and target.kind is PartKind.FUNCTION
                            and not self.linker.replaced(link.name)
                            and cold_parent(self.new, target) is None
                        ):
                            self._pointer(part, target)
                    case LinkKind.OUTER:
                        outer.add(link.name)
                        self._reachable(part, link)
                    case LinkKind.EXTERN:
                        externs.add(link.name)
                    case LinkKind.STRING | LinkKind.CONST | LinkKind.EMPTY:
                        pass
                    case LinkKind.SATELLITE:
                        if link.name not in SATELLITES:
                            self.refuse(
                                "opaque-reference",
                                part.name,
                                f"it refers to {link.name}+{link.ref.addend:#x}, where no symbol says what "
                                "lies there",
                                "report the function: kmend does not understand its code",
                            )
            for other in self.new.functions():
                parent = cold_parent(self.new, other)
                if parent is not None and parent.key == key and other.key not in included:
                    waiting.append(other.key)
        return included, outer, externs

    def _links(self, part: Part) -> Iterable[tuple[Link, bool]]:
        """All links of a part, each with whether it hands out an address (and is no direct branch)."""
        section = self.new.section_of(part)
        for reloc in self.new.relocs(part):
            link = self.linker.of_code(part, section, reloc)
            branch = is_branch(section, reloc)
            own = link.kind is LinkKind.LOCAL and link.name == part.key
            yield link, not branch and not own
            yield from ((row, False) for row in self._satellite_links(part, link))
        for name in TABLE:
            for entry in self.diff.new_special.entries(part.key, name):
                for reloc in entry.relocs[1:]:
                    link = self.linker.of_entry(entry, reloc)
                    self._own(part, name, link)
                    yield link, False
                if name == ".altinstructions":
                    spot = self.diff.new_special.replacement(entry)
                    if spot is not None:
                        yield from ((row, False) for row in self._spot_links(part, *spot))

    def _own(self, part: Part, table: str, link: Link) -> None:
        """An entry leads to its own function; to another one it would bring a second copy of that along."""
        if link.kind is not LinkKind.LOCAL:
            return
        target = self.new.parts[link.name]
        if target.kind is PartKind.FUNCTION and self.linker.family(target) != self.linker.family(part):
            self.refuse(
                "special-section",
                part.name,
                f"its entry in {table} leads to another function, {target.name}",
                "report the function: kmend does not understand its code",
            )

    def _satellite_links(self, part: Part, link: Link) -> Iterable[Link]:
        if link.kind is LinkKind.SATELLITE and link.name == ".altinstr_aux":
            start, end = self.diff.new_special.aux_block(link.ref.addend)
            yield from self._spot_links(part, link.ref.section, start, end - start)

    def _spot_links(self, part: Part, index: int, start: int, length: int) -> Iterable[Link]:
        section = self.new.elf.sections[index]
        for reloc in slice_relocs(section.relocs, start, start + length):
            link = self.linker.of_satellite(part, section, reloc)
            yield link
            if link.kind is LinkKind.SATELLITE and link.name == ".altinstr_aux" and section.name != link.name:
                yield from self._satellite_links(part, link)

    def _carried(self, part: Part) -> None:
        section = self.new.section_of(part)
        if is_init(section):
            self.refuse(
                "init-reference",
                part.name,
                f"patched code needs it, but it stands in {section.name}",
                "leave the change to the next reboot",
            )
            return
        if section.name.startswith(PER_CPU):
            self._per_cpu(part)
        for table in self._tables.get(part.key, ()):
            self.refuse(
                "special-section",
                part.name,
                f"the table {table} names places in its code, which the kernel changes when it starts; kmend "
                "does not carry it over: in the module the code would run unchanged",
                "leave the change to the next reboot, or change another function",
            )
        if part.kind is PartKind.FUNCTION and not self.new.alone(part):
            self.refuse(
                "shared-section",
                part.name,
                f"its section {section.name} is chosen by an attribute and shared with other functions, "
                "so calls between them carry no relocation",
                "leave the change to the next reboot",
            )
        elif (
            part.kind is PartKind.DATA
            and part.key in self.diff.twins.ambiguous
            and base_name(part.name) not in _FRESH
            and not self.linker.copied(part)
        ):
            self.refuse(
                "static-local-ambiguous",
                part.name,
                "the original has static local variables of this name, and which of them it is "
                "cannot be told",
                "give the new variable another name, or keep the number of variables of this name",
            )

    def _per_cpu(self, part: Part) -> None:
        """A new per-CPU variable, which the module loader allocates and copies for each CPU."""
        if base_name(part.name).endswith(_SRCU):
            self.refuse(
                "special-data",
                part.name.removesuffix(_SRCU),
                "the patch defines an SRCU domain; nobody would clean it up when the module goes, and a "
                "grace period that is still under way would end in freed memory",
                "define a struct srcu_struct, init_srcu_struct() it in a pre-patch callback (kmend.h), and "
                "cleanup_srcu_struct() it in a post-unpatch callback",
            )
        elif self.new.relocs(part):
            self.refuse(
                "special-data",
                part.name,
                "the patch adds a per-CPU variable that begins with an address; the module loader relocates "
                "nothing in per-CPU data (kernel/module/main.c, apply_relocations)",
                "set it in a pre-patch callback (kmend.h)",
            )

    def _places(self, part: Part) -> None:
        """Addresses that only an offset into a section of several variables gives.

            cmp    $0x0,%rbx        R_X86_64_32S  .data..read_mostly+0x20

        may be the end of one array or the start of the next variable; ``table-8(,%rax,8)`` looks like the
        end of the variable before. Both mean the same place as long as the same variables lie side by
        side as in the original. An operand that is read or written at once is no end.
        """
        section = self.new.section_of(part)
        for reloc in self.new.relocs(part):
            if not self.new.by_place(reloc):
                continue
            ref = self.new.ref(section, reloc)
            target = self.new.parts.get(ref.name) if ref.kind is RefKind.PART else None
            if target is None or target.kind is PartKind.FUNCTION or self._accessed(part, section, reloc):
                continue
            if self.linker.copied(target) or base_name(target.name) in _FRESH or self._in_place(target):
                continue
            self.refuse(
                "ambiguous-place",
                part.name,
                f"it takes an address in {section_class(self.new, target)} at {target.name}, where the patch "
                "changes which variables lie side by side: it may be the end of the one before",
                "define the new variable without an attribute that chooses its section",
            )

    def _accessed(self, part: Part, section: Section, reloc: Reloc) -> bool:
        if not section.executable or reloc.type != R_PC32:
            return False
        insn = containing(self.new.code(part), reloc.offset - part.start)
        return insn is not None and not insn.text.startswith("lea")

    def _in_place(self, target: Part) -> bool:
        """Whether the variable and those beside it lie to each other as in the original."""
        twin = self.diff.twins.original.get(target.key)
        row = self.new.parts_in(target.section)
        at = row.index(target)
        before = [p for p in row[max(at - 1, 0) : at] if p.end == target.start]
        for beside in before + row[at + 1 : at + 2]:
            other = self.diff.twins.original.get(beside.key)
            if twin is None or other is None:
                return False
            a, b = self.old.parts[twin], self.old.parts[other]
            if a.section != b.section or b.start - a.start != beside.start - target.start:
                return False
        return True

    def _reachable(self, part: Part, link: Link) -> None:
        target = self.old.parts[link.name]
        section = self.old.section_of(target)
        if is_init(section):
            self.refuse(
                "init-reference",
                part.name,
                f"it refers to {target.name} in {section.name}, whose memory is gone",
                "leave the change to the next reboot",
            )
        if target.kind is PartKind.FUNCTION and link.ref.addend not in (0, -4):
            self.refuse(
                "opaque-reference",
                part.name,
                f"it refers to {target.name}{link.ref.addend:+#x}, the middle of a function that stays "
                "as it is",
                "report the function: kmend does not understand its code",
            )

    def _pointer(self, part: Part, target: Part) -> None:
        self.warn(
            "pointer-to-new-function",
            target.name,
            f"{part.name} hands out the address of a function that exists only in the module",
            "make sure that nothing keeps the address when the patch is taken back",
        )
