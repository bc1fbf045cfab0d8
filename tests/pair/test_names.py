"""Which symbol of the kernel a name means: only what the linker of the kernel would have taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pairs import Pair, compiled

from kmend.core.errors import Failed
from kmend.core.target import VMLINUX
from kmend.diff.unit import UnitObject
from kmend.module.resolve import Exported, Livepatched, Shared
from kmend.verify.provenance import VmlinuxBinary
from kmend.verify.symbols import ExportRow, Proof, Prover, World, module_position


@dataclass(frozen=True)
class Row:
    address: int
    type: str
    name: str


@dataclass
class Kallsyms:
    rows: list[Row]

    def named(self, name: str) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if r.name == name)

    def at(self, address: int) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if r.address == address)


class NoImage:
    def read(self, address: int, size: int) -> bytes:
        raise Failed("nothing lies there", rule="image-range")


@dataclass(frozen=True)
class Export:
    name: str
    owner: str = VMLINUX
    crc: int = 7
    namespace: str = ""


@dataclass
class Exports:
    rows: dict[str, Export] = field(default_factory=dict)

    def get(self, name: str) -> ExportRow | None:
        return self.rows.get(name)


def world(*rows: Row, modules: dict[str, UnitObject] | None = None, needs: tuple[str, ...] = ()) -> World:
    symbols = Kallsyms(
        [
            *rows,
            Row(0x8000, "D", "__init_begin"),
            Row(0x9000, "R", "__init_end"),
            Row(0x10, "T", "__fentry__"),
        ]
    )
    exports = Exports({"outside": Export("outside"), "far": Export("far", "provider")})
    return World(
        symbols, VmlinuxBinary(NoImage(), symbols), exports, (modules or {}).__getitem__, lambda name: needs
    )


def proof(pair: Pair, old: str, new: str, place: World, owner: str = VMLINUX) -> Proof:
    diff, selection = pair(old, new)
    return Prover(place, owner, diff.old, diff.old_special).prove(selection)


OLD = "int f(int x) { return outside(x); }\n"
CALL = "extern int other(int);\nint f(int x) { return outside(other(x)); }\n"


def refused(found: Proof) -> set[tuple[str, str]]:
    return {(r.rule, r.what) for r in found.refusals}


def test_a_global_symbol_is_taken_and_a_static_one_is_not(pair: Pair) -> None:
    """The only ``other`` may be a static function of quite another unit: the kernel's build would fail."""
    found = proof(pair, OLD, CALL, world(Row(0x100, "T", "other")))
    assert found.externs["other"] == Livepatched(VMLINUX, "other", 0)
    assert found.externs["outside"] == Exported("outside", 7)
    found = proof(pair, OLD, CALL, world(Row(0x100, "t", "other")))
    assert refused(found) == {("symbol-missing", "other")}
    found = proof(pair, OLD, CALL, world(Row(0x100, "t", "other"), Row(0x200, "T", "other")))
    assert found.externs["other"] == Livepatched(VMLINUX, "other", 2)


def test_init_memory_is_no_place_to_call(pair: Pair) -> None:
    found = proof(pair, OLD, CALL, world(Row(0x8100, "T", "other")))
    assert refused(found) == {("init-reference", "other")}


def test_a_definition_that_takes_anothers_place_is_refused(pair: Pair) -> None:
    """A strong ``other`` beside the weak one that the rest of the kernel is linked to."""
    new = "noinline int other(int x) { return outside(x + 4); }\n" + CALL.partition("\n")[2]
    found = proof(pair, OLD, new, world(Row(0x100, "W", "other")))
    assert ("defined-elsewhere", "other") in refused(found)
    assert not proof(pair, OLD, new, world()).refusals
    assert not proof(pair, OLD, new, world(Row(0x100, "t", "other"))).refusals


def test_what_another_module_exports_is_reached_through_it(pair: Pair, tmp_path: Path) -> None:
    own = compiled(tmp_path, "own", OLD)
    provider = compiled(tmp_path, "provider", "int far(int x) { return x * 2; }")
    place = world(modules={"m": own, "provider": provider}, needs=("provider",))
    new = OLD.replace("outside(x)", "outside(far(x))")
    old = "extern int far(int);\n" + OLD
    found = proof(pair, old, "extern int far(int);\n" + new, place, "m")
    assert found.externs["far"] == Livepatched("provider", "far", 0)
    without = world(modules={"m": own, "provider": provider})
    assert ("new-dependency", "far") in refused(
        proof(pair, old, "extern int far(int);\n" + new, without, "m")
    )


def test_what_another_object_of_the_patch_brings_is_shared(pair: Pair, tmp_path: Path) -> None:
    """A new global of a vmlinux unit, used by a module: one definition, inside of the livepatch module."""
    new = OLD.replace("outside(x)", "outside(fresh(x))")
    diff, selection = pair(OLD, "extern int fresh(int);\n" + new)
    own = compiled(tmp_path, "own", OLD)
    place = world(modules={"m": own, "provider": own}, needs=("provider",))
    assert place.in_reach("m") == ("m", VMLINUX, "provider")
    assert place.in_reach(VMLINUX) == (VMLINUX,)

    def found(modules: World, elsewhere: dict[str, str] | None = None) -> Proof:
        return Prover(modules, "m", diff.old, diff.old_special).prove(selection, elsewhere=elsewhere)

    assert found(place, elsewhere={"fresh": VMLINUX}).externs["fresh"] == Shared(VMLINUX, "fresh")
    assert ("symbol-missing", "fresh") in refused(found(place))
    # the linker takes a module's own global first
    with_own = compiled(tmp_path, "with_own", OLD + "int fresh(int x) { return x; }")
    place = world(modules={"m": with_own})
    assert found(place, elsewhere={"fresh": VMLINUX}).externs["fresh"] == Livepatched("m", "fresh", 0)


@pytest.mark.parametrize(
    ("order", "expected"),
    [(["text", "init.text"], 1), (["init.text", "text"], None), (["text"], 0)],
)
def test_a_position_in_a_module_holds_before_and_after_its_init(
    tmp_path: Path, order: list[str], expected: int | None
) -> None:
    """While the module is loaded its init symbols are counted, later they are not."""
    here = f'.pushsection .{order[0]},\\"ax\\"\\n.type twice,@function\\n.size twice,1'
    text = f'asm("{here}\\ntwice: ret\\n.popsection");'
    unit = compiled(tmp_path, "m", text)
    # The assembler allows a name once; the second one is put in as a linked module would have it.
    elf, symbols = unit.elf, list(unit.elf.symbols)
    (first,) = [s for s in symbols if s.name == "twice"]
    extra = order[1:]
    if extra:
        init = next(s for s in elf.sections if s.name == f".{order[0]}")
        other = type(init)(
            **{
                **{name: getattr(init, name) for name in init.__slots__},
                "index": len(elf.sections),
                "name": f".{extra[0]}",
            }
        )
        again = type(first)(len(symbols), "twice", 0, 1, first.type, first.bind, 0, other.index)
        elf = type(elf)(elf.machine, elf.type, elf.flags, (*elf.sections, other), (*symbols, again))
        unit = UnitObject(elf, "m")
    lasting = [s.index for s in elf.symbols if s.name == "twice" and elf.sections[s.section].name == ".text"]
    assert module_position(unit, "twice", lasting[0]) == expected
