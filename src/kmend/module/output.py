"""A livepatch module while it grows: sections, symbols, descriptors, modinfo, versions.

What both roads to a module share: :mod:`kmend.module.assemble` adds selected parts of patched objects,
:mod:`kmend.module.byhand` adds whole objects that somebody wrote. Every relocation goes either into an
ordinary ``.rela`` section or, for a livepatch symbol, into ``.klp.rela.OBJECT.SECTION``
(Documentation/livepatch/module-elf-format.rst).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kmend.core.errors import Failed, Refusal
from kmend.core.target import VMLINUX
from kmend.diff.declared import CallbackKind
from kmend.diff.special import ORC, TABLE
from kmend.elf.model import (
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHF_RELA_LIVEPATCH,
    SHF_WRITE,
    SHN_ABS,
    SHN_LIVEPATCH,
    SHN_UNDEF,
    SHT_NOBITS,
    SHT_NOTE,
    SHT_PROGBITS,
    STB_GLOBAL,
    STT_FILE,
    STT_OBJECT,
    STT_SECTION,
    ElfFile,
    Symbol,
)
from kmend.elf.writer import OutReloc, OutSection, OutSymbol, write
from kmend.elf.x86_64 import R_64
from kmend.elf.x86_64 import row as row_of
from kmend.module.layout import SECTION as LAYOUT_SECTION
from kmend.module.layout import Layout, modinfo
from kmend.module.resolve import Exported, Livepatched, Resolution, Shared

#: Processed while the module is loaded: must not wait for a module that may come later.
EARLY = frozenset({"__jump_table", ".static_call_sites", ".altinstructions", ".parainstructions"})
#: The name of ``struct klp_patch`` in every module of ours (``kmend.h`` declares it).
PATCH = "kmend_patch"
#: What a module says of itself whose author leaves it to us.
OUR_INFO = (("livepatch", "Y"), ("license", "GPL"))


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """What the module is called and says of itself.

    ``forget``: how to reach ``text_poke_set()``, for a kernel that does not itself clear what it relocated
    for a module that goes (before 6.3); the glue must have been compiled for it.
    """

    name: str
    replace: bool
    info: tuple[tuple[str, str], ...] = ()
    note: bytes = b""
    forget: Resolution | None = None


@dataclass(frozen=True, slots=True)
class Assembled:
    """The module's bytes, and what had to be given up on the way (warnings)."""

    data: bytes
    warnings: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class FuncEntry:
    """A row of ``struct klp_func``: ``new`` replaces ``old_name``."""

    old_name: str
    sympos: int
    new: OutSymbol


@dataclass(slots=True)
class ObjectEntry:
    """A row of ``struct klp_object``: what is replaced in it, and what is called around that."""

    funcs: list[FuncEntry] = field(default_factory=list)
    callbacks: dict[CallbackKind, OutSymbol] = field(default_factory=dict)


@dataclass(slots=True)
class Out:
    """An output section while it grows."""

    name: str
    type: int
    flags: int
    align: int
    entry_size: int
    data: bytearray = field(default_factory=bytearray)
    size: int = 0
    plain: list[OutReloc] = field(default_factory=list)
    klp: dict[str, list[OutReloc]] = field(default_factory=dict)
    section: OutSection = field(init=False)
    symbol: OutSymbol = field(init=False)

    def __post_init__(self) -> None:
        self.section = OutSection(self.name, self.type, self.flags, self.align)
        self.symbol = OutSymbol(self.name, self.section, type=STT_SECTION)

    def add(self, data: bytes, align: int) -> int:
        """Append, aligned; returns the offset."""
        align = max(align, 1)
        self.align = max(self.align, align)
        at = -(-self.size // align) * align
        if self.type != SHT_NOBITS:
            fill = b"\x90" if self.flags & SHF_EXECINSTR else b"\0"
            self.data += fill * (at - self.size) + data
        self.size = at + len(data)
        return at

    def relocate(self, row: OutReloc, obj: str | None) -> None:
        """Add a relocation: an ordinary one, or one that the kernel applies when ``obj`` is patched."""
        (self.plain if obj is None else self.klp.setdefault(obj, [])).append(row)

    def finish(self) -> OutSection:
        out = self.section
        out.align, out.size, out.entry_size, out.data = (
            self.align,
            self.size,
            self.entry_size,
            bytes(self.data),
        )
        if self.plain:
            out.relas.append((f".rela{self.name}", 0, self.plain))
        for obj, rows in self.klp.items():
            out.relas.append((f".klp.rela.{obj}.{self.name}", SHF_RELA_LIVEPATCH | SHF_ALLOC, rows))
        return out


#: An object file that was placed: where each of its sections went, and its symbols by index.
@dataclass(frozen=True, slots=True)
class Placed:
    elf: ElfFile
    where: Mapping[int, tuple[Out, int]]
    symbols: Mapping[int, OutSymbol]


#: The output symbol for an undefined one, and the object of its livepatch relocation; None: leave a zero.
Resolve = Callable[[Symbol, Out], tuple[OutSymbol, str | None] | None]


def second_callback(obj: str, kind: CallbackKind, first: str, second: str) -> Refusal:
    """Two callbacks of one kind for one object: ``struct klp_callbacks`` has one pointer for each kind."""
    return Refusal(
        "duplicate-callback",
        f"{kind.words} callback of {obj}",
        f"both {first} and {second} are declared; the kernel calls one function of each kind for an object",
        "call one of them from the other",
    )


def bad_states(states: Sequence[tuple[int, int]]) -> list[Refusal]:
    """What is wrong with rows (id, version) of ``struct klp_state``: ``unsigned long``, ``unsigned int``."""
    out = []
    for number, version in dict.fromkeys(states):
        why = ""
        if not 0 < number < 1 << 64:
            why = "an id is a number from 1 on; 0 ends the list"
        elif not 0 <= version < 1 << 32:
            why = f"{version} is no version: an unsigned int is needed"
        elif [row for row, _ in states].count(number) > 1:
            why = "it is declared more than once"
        if why:
            out.append(
                Refusal("bad-state", f"state {number}", why, "declare each state once, with its version")
            )
    return list(dict.fromkeys(out))


class Output:
    """The output file; the two roads are its subclasses."""

    def __init__(self, spec: ModuleSpec, glue: ElfFile, layout: Layout, crcs: Mapping[str, int]) -> None:
        self.spec, self.glue, self.layout = spec, glue, layout
        self.crcs: dict[str, int] = dict(crcs)
        self.out: dict[str, Out] = {}
        self.symbols: list[OutSymbol] = []
        self.undefined: dict[str, OutSymbol] = {}
        self.livepatched: dict[Livepatched, OutSymbol] = {}
        self.namespaces: set[str] = set()
        self.strings: dict[bytes, int] = {}
        #: ``struct klp_patch``; it gets its place when the descriptors are written
        self.patch = OutSymbol(PATCH, SHN_UNDEF)
        #: what ``kmend_forget()`` of the glue reads
        self.spots, self.afters = OutSymbol("kmend_spots", SHN_UNDEF), OutSymbol("kmend_afters", SHN_UNDEF)
        #: post-unpatch callbacks that it calls for their objects
        self.after: dict[str, OutSymbol] = {}

    # -- sections and symbols ------------------------------------------------

    def _section(self, name: str, kind: int, flags: int, align: int = 1, entry_size: int = 0) -> Out:
        out = self.out.get(name)
        if out is None:
            out = self.out[name] = Out(name, kind, flags, align, entry_size)
        elif out.flags != flags:
            out.flags |= flags
            out.section.flags |= flags
        if kind != SHT_NOBITS and out.type == SHT_NOBITS:
            raise Failed(f"section {name} would be both empty and filled", rule="internal")
        return out

    def _symbol(self, name: str, section: OutSection | int, **more: int) -> OutSymbol:
        symbol = OutSymbol(name, section, **more)
        self.symbols.append(symbol)
        return symbol

    def _reach(self, resolution: Resolution) -> tuple[OutSymbol, str | None]:
        """The output symbol of something outside, and the object of its livepatch relocation."""
        match resolution:
            case Exported(name, crc, namespace):
                self.crcs[name] = crc
                if namespace:
                    self.namespaces.add(namespace)
                return self._undefined(name), None
            case Livepatched():
                symbol = self.livepatched.get(resolution)
                if symbol is None:
                    symbol = self._symbol(resolution.symbol, SHN_LIVEPATCH, bind=STB_GLOBAL)
                    self.livepatched[resolution] = symbol
                return symbol, resolution.obj
            case Shared():
                raise Failed(f"{resolution.name} is no symbol of the kernel's", rule="internal")

    def _undefined(self, name: str) -> OutSymbol:
        symbol = self.undefined.get(name)
        if symbol is None:
            symbol = self.undefined[name] = self._symbol(name, SHN_UNDEF, bind=STB_GLOBAL)
        return symbol

    def _text(self, text: str) -> int:
        out = self._section(".rodata.str", SHT_PROGBITS, SHF_ALLOC)
        content = text.encode() + b"\0"
        key = b"s" + content
        if key not in self.strings:
            self.strings[key] = out.add(content, 1)
        return self.strings[key]

    # -- descriptors ------------------------------------------------------------------

    def _descriptors(
        self, objects: Mapping[str, ObjectEntry], states: Sequence[tuple[int, int]] = ()
    ) -> OutSymbol:
        """``struct klp_patch`` with its objects, functions, callbacks and states (rows of id and version).

        include/linux/livepatch.h. Ends of arrays are zero entries: klp_for_each_object_static() stops where
        funcs and name are NULL, klp_for_each_func_static() where old_name, new_func and old_sympos are,
        klp_for_each_state() (kernel/livepatch/state.c) where id is. An object without functions has an empty
        array all the same: klp_init_patch() refuses one that has none.
        """
        lay = self.layout
        texts = self._section(".rodata.str", SHT_PROGBITS, SHF_ALLOC).symbol
        data = self._section(".data", SHT_PROGBITS, SHF_ALLOC | SHF_WRITE)
        names = sorted(objects, key=lambda n: (n != VMLINUX, n))
        base = data.add(bytes(lay.object_size * (len(names) + 1)), 8)
        for index, name in enumerate(names):
            row_at = base + index * lay.object_size
            if name != VMLINUX:
                data.plain.append(OutReloc(row_at + lay.object_name, R_64, texts, self._text(name)))
            callbacks = dict(objects[name].callbacks)
            if name != VMLINUX and self.spec.forget is not None:
                own = callbacks.get(CallbackKind.POST_UNPATCH)
                if own is not None:
                    self.after[name] = own
                callbacks[CallbackKind.POST_UNPATCH] = self._named_symbol("kmend_forget")
            for kind, callback in callbacks.items():
                data.plain.append(OutReloc(row_at + lay.callback(kind), R_64, callback, 0))
            functions = objects[name].funcs
            table = bytearray(lay.func_size * (len(functions) + 1))
            for k, func in enumerate(functions):
                at = k * lay.func_size + lay.func_old_sympos
                table[at : at + 8] = func.sympos.to_bytes(8, "little")
            start = data.add(bytes(table), 8)
            data.plain.append(OutReloc(row_at + lay.object_funcs, R_64, data.symbol, start))
            for k, func in enumerate(functions):
                at = start + k * lay.func_size
                data.plain.append(OutReloc(at + lay.func_old_name, R_64, texts, self._text(func.old_name)))
                data.plain.append(OutReloc(at + lay.func_new_func, R_64, func.new, 0))
        patch = bytearray(lay.patch_size)
        patch[lay.patch_replace] = self.spec.replace
        at = data.add(bytes(patch), 8)
        data.plain.append(OutReloc(at + lay.patch_objs, R_64, data.symbol, base))
        data.plain.append(OutReloc(at + lay.patch_mod, R_64, self._this_module(), 0))
        if states:
            data.plain.append(OutReloc(at + lay.patch_states, R_64, data.symbol, self._states(data, states)))
        self.patch.section, self.patch.value = data.section, at
        self.patch.size, self.patch.type = lay.patch_size, STT_OBJECT
        self.symbols.append(self.patch)
        return self.patch

    def _states(self, data: Out, states: Sequence[tuple[int, int]]) -> int:
        lay = self.layout
        rows = bytearray(lay.state_size * (len(states) + 1))
        for index, (number, version) in enumerate(states):
            at = index * lay.state_size
            rows[at + lay.state_id : at + lay.state_id + 8] = number.to_bytes(8, "little")
            rows[at + lay.state_version : at + lay.state_version + 4] = version.to_bytes(4, "little")
        return data.add(bytes(rows), 8)

    def _this_module(self) -> OutSymbol:
        return self._named_symbol("__this_module")

    def _named_symbol(self, name: str) -> OutSymbol:
        """A symbol of the glue, which was placed already."""
        found = next((s for s in self.symbols if s.name == name), None)
        if found is None:
            raise Failed(f"the glue has no {name}", rule="internal")
        return found

    def _forgetting(self) -> None:
        """The tables of ``kmend_forget()``: every field that the kernel relocates when a module comes."""
        texts = self._section(".rodata.str", SHT_PROGBITS, SHF_ALLOC).symbol
        data = self._section(".data", SHT_PROGBITS, SHF_ALLOC | SHF_WRITE)
        spots = [
            (obj, out.symbol, row.offset, row_of(row.type).size)
            for out in self.out.values()
            for obj, rows in out.klp.items()
            if obj != VMLINUX
            for row in rows
        ]
        at = data.add(bytes(24 * (len(spots) + 1)), 8)
        self.spots.section, self.spots.value, self.spots.type = data.section, at, STT_OBJECT
        for obj, symbol, offset, size in spots:
            data.plain.append(OutReloc(at, R_64, texts, self._text(obj)))
            data.plain.append(OutReloc(at + 8, R_64, symbol, offset))
            data.data[at + 16 : at + 24] = size.to_bytes(8, "little")
            at += 24
        at = data.add(bytes(16 * (len(self.after) + 1)), 8)
        self.afters.section, self.afters.value, self.afters.type = data.section, at, STT_OBJECT
        for obj, callback in self.after.items():
            data.plain.append(OutReloc(at, R_64, texts, self._text(obj)))
            data.plain.append(OutReloc(at + 8, R_64, callback, 0))
            at += 16
        self.symbols += [self.spots, self.afters]

    # -- whole objects -----------------------------------------------------------------

    def _place(self, elf: ElfFile, leave: Container[str] = ()) -> Placed:
        """Append every loaded section of an object but those named in ``leave``, and the symbols in them."""
        where: dict[int, tuple[Out, int]] = {}
        for section in elf.sections:
            if not section.alloc or not section.size or section.name.startswith((".discard", ".note")):
                continue
            if section.name in leave or section.type not in (SHT_PROGBITS, SHT_NOBITS):
                continue
            flags = section.flags & (SHF_ALLOC | SHF_WRITE | SHF_EXECINSTR)
            out = self._section(section.name, section.type, flags, section.align)
            data = section.data if section.type == SHT_PROGBITS else bytes(section.size)
            if section.name == ".gnu.linkonce.this_module":
                data = self._named(data)
            # A table goes on without a gap: its entries are no multiple of its alignment.
            table = section.name in TABLE or section.name == ORC
            where[section.index] = (out, out.add(data, 1 if table else section.align))
        symbols: dict[int, OutSymbol] = {0: OutSymbol("", SHN_UNDEF)}
        for symbol in elf.symbols[1:]:
            if symbol.type in (STT_SECTION, STT_FILE):
                continue
            if symbol.section == SHN_ABS:
                symbols[symbol.index] = self._symbol(symbol.name, SHN_ABS, value=symbol.value)
            elif symbol.section in where:
                out, at = where[symbol.section]
                symbols[symbol.index] = self._symbol(
                    symbol.name,
                    out.section,
                    value=at + symbol.value,
                    size=symbol.size,
                    type=symbol.type,
                    bind=symbol.bind,
                )
        return Placed(elf, where, symbols)

    def _join(self, placed: Placed, resolve: Resolve) -> None:
        """Carry the relocations of a placed object over; ``resolve`` answers for its undefined symbols."""
        for index, (out, at) in placed.where.items():
            for reloc in placed.elf.sections[index].relocs:
                symbol = placed.elf.symbols[reloc.symbol]
                if symbol.type == STT_SECTION:
                    if symbol.section not in placed.where:
                        name = placed.elf.sections[symbol.section].name
                        raise Failed(f"{out.name} refers to {name}, which is left out", rule="internal")
                    target, base = placed.where[symbol.section]
                    out.plain.append(
                        OutReloc(at + reloc.offset, reloc.type, target.symbol, base + reloc.addend)
                    )
                    continue
                if symbol.index in placed.symbols:
                    found: tuple[OutSymbol, str | None] | None = (placed.symbols[symbol.index], None)
                else:
                    found = resolve(symbol, out)
                if found is not None:
                    row = OutReloc(at + reloc.offset, reloc.type, found[0], reloc.addend)
                    out.relocate(row, found[1])

    # -- the common part -----------------------------------------------------------------

    def _place_glue(self) -> Placed:
        """Every loaded section of the glue, and its symbols."""
        return self._place(self.glue, (".modinfo", "__versions", LAYOUT_SECTION))

    def _from_glue(self, symbol: Symbol, _out: Out) -> tuple[OutSymbol, str | None]:
        """What the glue does not define: our descriptor, or an exported symbol."""
        own = {PATCH: self.patch, self.spots.name: self.spots, self.afters.name: self.afters}
        if symbol.name in own:
            return own[symbol.name], None
        if symbol.name == "text_poke_set" and self.spec.forget is not None:
            return self._reach(self.spec.forget)
        return self._undefined(symbol.name), None

    def _named(self, data: bytes) -> bytes:
        """``struct module`` with our name in it."""
        lay = self.layout
        name = self.spec.name.encode()
        if len(name) >= lay.module_name_len:
            raise Failed(f"the module name {self.spec.name} is too long", rule="module-name")
        out = bytearray(data)
        out[lay.module_name : lay.module_name + lay.module_name_len] = name.ljust(lay.module_name_len, b"\0")
        return bytes(out)

    def _information(self, rows: Iterable[tuple[str, str]] = OUR_INFO) -> None:
        """``.modinfo``: the name, ``rows``, what the glue says of the kernel, what the spec adds; a note."""
        all_rows = [("name", self.spec.name), *rows, ("depends", "")]
        all_rows += [(key, value) for key, value in modinfo(self.glue) if key in ("vermagic", "retpoline")]
        all_rows += [("import_ns", namespace) for namespace in sorted(self.namespaces)]
        all_rows += list(self.spec.info)
        info = self._section(".modinfo", SHT_PROGBITS, SHF_ALLOC)
        for key, value in all_rows:
            info.add(f"{key}={value}".encode() + b"\0", 1)
        if self.spec.note:
            # struct elf_note: three words, then name and descriptor, each padded to 4 bytes.
            name = b"kmend\0"
            body = self.spec.note
            head = b"".join(n.to_bytes(4, "little") for n in (len(name), len(body), 1))
            data = head + name + bytes(-len(name) % 4) + body + bytes(-len(body) % 4)
            self._section(".note.kmend", SHT_NOTE, SHF_ALLOC, 4).add(data, 4)

    def _versions(self) -> None:
        """``__versions``: the CRC of every exported symbol used (kernel/module/version.c)."""
        missing = sorted(name for name in self.undefined if name not in self.crcs)
        if missing:
            raise Failed(
                f"no CRC for {', '.join(missing)}",
                why="the target's Module.symvers lacks it",
                rule="internal",
            )
        out = self._section("__versions", SHT_PROGBITS, SHF_ALLOC, 32)
        lay = self.layout
        for name in sorted({"module_layout", *self.undefined}):
            row = bytearray(lay.version_size)
            row[0:8] = self.crcs[name].to_bytes(8, "little")
            text = name.encode()
            if len(text) >= lay.version_size - lay.version_name:
                raise Failed(f"the symbol name {name} is too long for __versions", rule="internal")
            row[lay.version_name : lay.version_name + len(text)] = text
            out.add(bytes(row), 1)

    def _bytes(self) -> bytes:
        """The finished file."""
        if self.spec.forget is not None:
            self._forgetting()
        sections = [out.finish() for out in self.out.values() if out.size]
        return write(sections, [o.symbol for o in self.out.values() if o.size] + self.symbols)
