"""The control flow of one function: which calls follow which, what lies in a loop, whether it can return.

Decoded from the machine code, so done only where a rule needs it (a millisecond for some hundred
instructions).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from kmend.diff.special import SpecialSections
from kmend.diff.unit import Part, RefKind, UnitObject, base_name
from kmend.elf.model import Reloc
from kmend.elf.reader import slice_relocs
from kmend.insn.decode import decode
from kmend.verify.callgraph import CallGraph

#: Functions that do not come back (tools/objtool/check.c, global_noreturns; objtool/noreturns.h since 6.4).
NORETURN = frozenset(
    {
        *("__fortify_panic", "__module_put_and_kthread_exit", "__reiserfs_panic", "__stack_chk_fail"),
        *("__ubsan_handle_builtin_unreachable", "cpu_startup_entry", "do_exit", "do_group_exit"),
        *(
            "do_task_dead",
            "ex_handler_msr_mce",
            "fortify_panic",
            "hlt_play_dead",
            "kthread_complete_and_exit",
        ),
        *("kthread_exit", "kunit_try_catch_throw", "make_task_dead", "mpt_halt_firmware"),
        *(
            "nmi_panic_self_stop",
            "panic",
            "panic_smp_self_stop",
            "rewind_stack_and_make_dead",
            "stop_this_cpu",
        ),
        *("usercopy_abort", "vpanic", "x86_64_start_kernel", "xen_cpu_bringup_again", "xen_start_kernel"),
    }
)
#: Those of them that end the thread that calls them, and with it its stack (kernel/exit.c, kernel/kthread.c).
ENDS = frozenset(
    {
        *("do_exit", "do_group_exit", "do_task_dead", "make_task_dead", "rewind_stack_and_make_dead"),
        *("kthread_exit", "kthread_complete_and_exit", "__module_put_and_kthread_exit"),
    }
)
#: What comes before the first of the events, and after the last one of a function that returns.
START, RETURN = "", "return"

_THUNK = re.compile(r"__x86_return_thunk$|.*_return_thunk$")
_TARGET = re.compile(r"^(j\w+|loop\w*)\s+(?:\*)?(0x[0-9a-f]+|\d+)$")

Place = tuple[str, int]  # a part's key and an offset from its beginning


@dataclass(slots=True)
class _Block:
    """Instructions without a jump into their middle. ``calls``: what they call, in order."""

    calls: list[str]
    next: list[Place]
    returns: bool = False
    ends: bool = False


class Flow:
    """The control flow of one function with its ``.cold`` part."""

    def __init__(self, graph: CallGraph, special: SpecialSections, key: str) -> None:
        self._unit: UnitObject = graph.unit
        self._special = special
        self._pieces = {part.key: part for part in graph.pieces(key)}
        self._named: dict[Place, str] = {
            (call.part, call.offset): self._unit.parts[call.callee].name if call.inside else call.callee
            for call in graph.calls(key)
        }
        self.entry: Place = (key, 0)
        self.blocks = self._blocks()

    # -- construction ------------------------------------------------------------

    def _blocks(self) -> dict[Place, _Block]:
        insns: dict[str, list[tuple[int, int, str]]] = {}
        jumps: dict[Place, list[Place]] = {}
        leaders: set[Place] = {self.entry}
        for key, part in self._pieces.items():
            rows = [(i.offset, i.length, i.text) for i in decode(self._unit.code(part))]
            insns[key] = rows
            outside = self._relocated(part)
            keyed = self._static_keys(part)
            leaders.add((key, 0))
            for at, length, text in rows:
                targets = list(keyed.get(at, ()))
                if text.startswith(("j", "loop")):
                    targets += self._targets(part, at, length, text, outside)
                if targets:
                    jumps[key, at] = targets
                    leaders.update(targets)
                if targets or text.startswith("j"):
                    leaders.add((key, at + length))
        return self._cut(insns, jumps, leaders)

    def _relocated(self, part: Part) -> Mapping[int, Reloc]:
        """The relocations of a part by their offset from its beginning."""
        return {r.offset - part.start: r for r in self._unit.relocs(part)}

    def _targets(
        self, part: Part, at: int, length: int, text: str, outside: Mapping[int, Reloc]
    ) -> list[Place]:
        """Where a jump leads, as far as it stays in the function."""
        reloc = outside.get(at + length - 4)
        if reloc is not None and length >= 5:
            ref = self._unit.ref(self._unit.section_of(part), reloc)
            if ref.kind is RefKind.PART and ref.name in self._pieces:
                return [(ref.name, ref.addend + 4)]
            if ref.kind is RefKind.OPAQUE:
                return self._aux(ref.section, ref.addend)
            return []
        match = _TARGET.match(text)
        return [(part.key, int(match[2], 0))] if match else []

    def _aux(self, index: int, offset: int) -> list[Place]:
        """Where code beside the function (``.altinstr_aux`` of ``static_cpu_has()``) comes back to it."""
        section = self._unit.elf.sections[index]
        if section.name != ".altinstr_aux":
            return []
        start, end = self._special.aux_block(offset)
        out = []
        for reloc in slice_relocs(section.relocs, start, end):
            ref = self._unit.ref(section, reloc)
            if ref.kind is RefKind.PART and ref.name in self._pieces:
                out.append((ref.name, ref.addend + 4))
        return out

    def _static_keys(self, part: Part) -> Mapping[int, list[Place]]:
        """Where the jump labels of a part may lead, by the offset of their place in it."""
        out: dict[int, list[Place]] = {}
        for entry in self._special.entries(part.key, "__jump_table"):
            if len(entry.relocs) < 2:
                continue
            reloc = entry.relocs[1]
            section = self._unit.elf.sections[entry.section]
            moved = Reloc(reloc.offset + entry.offset, reloc.type, reloc.symbol, reloc.addend)
            ref = self._unit.ref(section, moved)
            if ref.kind is RefKind.PART and ref.name in self._pieces:
                out.setdefault(entry.owner_offset, []).append((ref.name, ref.addend))
        return out

    def _warnings(self, key: str) -> Iterable[Place]:
        """Where a ``ud2`` is a WARN(), behind which the function goes on; after a BUG() it does not.

        ``flags`` ends ``struct bug_entry`` (include/asm-generic/bug.h), with BUGFLAG_WARNING as bit 0.
        """
        for entry in self._special.entries(key, "__bug_table"):
            if int.from_bytes(entry.data[-2:], "little") & 1:
                yield key, entry.owner_offset

    def _cut(
        self,
        insns: Mapping[str, list[tuple[int, int, str]]],
        jumps: Mapping[Place, list[Place]],
        leaders: set[Place],
    ) -> dict[Place, _Block]:
        blocks: dict[Place, _Block] = {}
        warned = {place for key in insns for place in self._warnings(key)}
        for key, rows in insns.items():
            block: _Block | None = None
            for at, length, text in rows:
                place = (key, at)
                if block is None or place in leaders:
                    if block is not None:
                        block.next.append(place)
                    block = blocks[place] = _Block([], [])
                block.next += jumps.get(place, ())
                name = self._named.get((key, at + length - 4))
                op = text.split(" ", 1)[0]
                if op in ("ret", "retq") or (name is not None and _THUNK.match(name) and op == "jmp"):
                    block.returns = True
                    block = None
                elif op == "jmp":
                    if not jumps.get(place):  # into another function, or through a register: a sibling call
                        block.returns = True
                        if name is not None:
                            block.calls.append(name)
                    block = None
                elif op.startswith("ud"):
                    if place not in warned:
                        block = None
                elif op.startswith("call") and name is not None:
                    block.calls.append(name)
                    if name in NORETURN:
                        block.ends = name in ENDS
                        block = None
        for block in blocks.values():
            block.next = [place for place in dict.fromkeys(block.next) if place in blocks]
        return blocks

    # -- questions -----------------------------------------------------------------

    def _reached(self) -> set[Place]:
        seen: set[Place] = set()
        waiting = [self.entry]
        while waiting:
            place = waiting.pop()
            if place not in seen and place in self.blocks:
                seen.add(place)
                waiting += self.blocks[place].next
        return seen

    def leaves(self) -> bool:
        """Whether a way leads to a return, into another function, or to the thread's end."""
        return any(self.blocks[place].returns or self.blocks[place].ends for place in self._reached())

    def looped(self) -> frozenset[str]:
        """Names of what is called inside a loop."""
        return frozenset(name for group in self.loops() for name in group)

    def loops(self) -> tuple[frozenset[str], ...]:
        """For each loop (outermost: a strongly connected component) the names of what it calls."""
        out = []
        for group in _components(self.entry, self.blocks):
            if len(group) > 1 or group[0] in self.blocks[group[0]].next:
                out.append(frozenset(name for place in group for name in self.blocks[place].calls))
        return tuple(out)

    def order(self, wanted: frozenset[str]) -> frozenset[tuple[str, str]]:
        """Which of the ``wanted`` calls may come right after which, on any way through the function.

        Names are those of the source (without the suffixes of the compiler's clones).
        Begins with :data:`START`, ends with :data:`RETURN`. Where the compiler puts a piece of code, or
        how often it repeats it, makes no difference.
        """
        events = {
            place: [name for name in map(base_name, block.calls) if name in wanted]
            for place, block in self.blocks.items()
        }
        first = self._first(events)
        pairs: set[tuple[str, str]] = {(START, name) for name in first.get(self.entry, ())}
        for place in self._reached():
            block, names = self.blocks[place], events[place]
            pairs.update(pairwise(names))
            if names:
                pairs.update((names[-1], name) for name in self._behind(block, first))
        return frozenset(pairs)

    @staticmethod
    def _behind(block: _Block, first: Mapping[Place, set[str]]) -> set[str]:
        found = {name for place in block.next for name in first[place]}
        return found | {RETURN} if block.returns else found

    def _first(self, events: Mapping[Place, list[str]]) -> dict[Place, set[str]]:
        """For each block the events that may come first from its beginning on."""
        first: dict[Place, set[str]] = {p: {names[0]} if names else set() for p, names in events.items()}
        before: dict[Place, list[Place]] = {}
        for place, block in self.blocks.items():
            for following in block.next:
                before.setdefault(following, []).append(place)
        waiting = list(self.blocks)
        while waiting:
            place = waiting.pop()
            if events[place]:
                continue
            found = self._behind(self.blocks[place], first)
            if found != first[place]:
                first[place] = found
                waiting += before.get(place, ())
        for place in self.blocks:
            if not events[place]:
                first[place] = self._behind(self.blocks[place], first)
        return first


def _components(entry: Place, blocks: Mapping[Place, _Block]) -> Iterable[list[Place]]:
    """The strongly connected components of what is reached from ``entry`` (Tarjan, without recursion)."""
    number: dict[Place, int] = {}
    low: dict[Place, int] = {}
    stack: list[Place] = []
    on_stack: set[Place] = set()
    work: list[tuple[Place, int]] = [(entry, 0)]
    while work:
        place, at = work.pop()
        if at == 0:
            number[place] = low[place] = len(number)
            stack.append(place)
            on_stack.add(place)
        following = blocks[place].next
        if at > 0:
            low[place] = min(low[place], low[following[at - 1]])
        while at < len(following):
            other = following[at]
            at += 1
            if other not in number:
                work.append((place, at))
                work.append((other, 0))
                break
            if other in on_stack:
                low[place] = min(low[place], number[other])
        else:
            if low[place] == number[place]:
                group = []
                while True:
                    member = stack.pop()
                    on_stack.discard(member)
                    group.append(member)
                    if member == place:
                        break
                yield group
