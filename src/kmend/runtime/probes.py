"""Who else is at a function's entry: kprobes, ftrace users, BPF trampolines; and whether it has one at all.

The tables are the kernel's own: ``/sys/kernel/debug/kprobes/list`` (``report_probe()``, kernel/kprobes.c),
``enabled_functions`` and ``available_filter_functions`` of tracefs (``t_show()``, kernel/trace/ftrace.c).
What follows from them is decided as ``__ftrace_hash_update_ipmodify()`` and
``prepare_direct_functions_for_ipmodify()`` (same file) decide it:

- Two users that change where a function goes (``IPMODIFY``, flag ``I``) exclude each other. A kprobe at the
  entry is one of them when it has a post handler (``arm_kprobe_ftrace()``).
- A user that calls something directly (flag ``D``) excludes a livepatch unless it can share: BPF trampolines
  can since 53cd885bc5c3 "ftrace: Allow IPMODIFY and DIRECT ops on the same function" (6.0).
- All others coexist. A probe further inside of a function is hit by the old code alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kmend.core.errors import Refusal
from kmend.core.live import Check, LivePatch
from kmend.core.target import VMLINUX
from kmend.runtime.place import Place, optional
from kmend.runtime.symbols import RunningSymbol, SymbolTable

#: The folders under ``/sys`` where tracefs may be; the second one is its place inside of debugfs.
_TRACEFS = ("kernel/tracing", "kernel/debug/tracing")
#: A line of ``enabled_functions``: name, module, users, flags, and what is called.
_ENABLED = re.compile(r"^([^\s(]+)(?: \[([^\]]+)\])? \((\d+)\)([^\t]*)(.*)$")
_CALLED = re.compile(r"(?:\(|->)([^\s()+]+)\+0x")
_DIRECT = re.compile(r"^\tdirect-->(\S+)")
#: A line of the table of kprobes; the address is 0 for users that may not see it.
_KPROBE = re.compile(r"^([0-9a-f]+) +([kr]) +([^\s+]+)(?:\+0x([0-9a-f]+))?(?:/0x[0-9a-f]+)?(?:\s+(.*))?$")
#: The prefix of the names that BPF trampolines have in kallsyms (kernel/bpf/trampoline.c).
_BPF = "bpf_trampoline_"
#: The function through which a BPF trampoline learns to share; its presence tells that it can.
_CAN_SHARE = "bpf_tramp_ftrace_ops_func"


@dataclass(frozen=True, slots=True)
class Traced:
    """A line of ``enabled_functions``: an ftrace entry that is in use.

    ``flags`` are the kernel's letters (R saved registers, I changes where it goes, D direct call, O, M);
    ``called`` are the functions named on the line, ``direct`` the target of a direct call, '' for none.
    """

    function: str
    object: str
    users: int
    flags: frozenset[str]
    called: tuple[str, ...] = ()
    direct: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """A kprobe or kretprobe. ``address`` is 0 where the kernel hides it; ``offset`` in bytes.

    ``ftrace``: it sits on the function's ftrace entry instead of an instruction. ``optimized``: it is a jump.
    """

    address: int
    returning: bool
    function: str
    offset: int
    object: str
    disabled: bool
    ftrace: bool
    optimized: bool = False

    def __str__(self) -> str:
        kind = "kretprobe" if self.returning else "kprobe"
        return f"{kind} at {self.function}+{self.offset:#x}" + (" (disabled)" if self.disabled else "")


@dataclass(frozen=True, slots=True)
class Entry:
    """A function of the running kernel whose entry is asked about.

    ``shown`` is the name that the kernel prints for its address, which may be an alias'. ``twins``: how many
    functions of the object have that name; ``livepatched``: a livepatch redirects it already.
    """

    name: str
    object: str
    shown: str
    address: int
    size: int
    twins: int
    livepatched: bool


@dataclass(frozen=True, slots=True)
class Hooks:
    """What was found. ``warnings`` do not stand in the way of loading, but somebody should know.

    ``excluded`` are the addresses of functions to which the kernel would not let a livepatch attach,
    ``entryless`` of those without an ftrace entry.
    """

    checks: tuple[Check, ...]
    warnings: tuple[Refusal, ...]
    excluded: frozenset[int] = frozenset()
    entryless: frozenset[int] = frozenset()


def read_traced(place: Place) -> tuple[Traced, ...] | None:
    """The ftrace entries in use; None: tracefs is not mounted, or not readable."""
    lines = _tracefs(place, "enabled_functions")
    if lines is None:
        return None
    rows: list[Traced] = []
    for line in lines.splitlines():
        if match := _DIRECT.match(line):
            if rows:
                rows[-1] = replace(rows[-1], direct=match[1].partition("+")[0])
        elif match := _ENABLED.match(line):
            rows.append(
                Traced(
                    function=match[1],
                    object=match[2] or VMLINUX,
                    users=int(match[3]),
                    flags=frozenset(match[4].split()),
                    called=tuple(_CALLED.findall(match[5])),
                )
            )
    return tuple(rows)


def read_probes(place: Place) -> tuple[Probe, ...] | None:
    """All kprobes; None: debugfs is not mounted, or not readable (lockdown ``confidentiality``)."""
    lines = optional(place.sys / "kernel/debug/kprobes/list")
    if lines is None:
        return None
    rows = []
    for line in lines.splitlines():
        match = _KPROBE.match(line)
        if match is None:
            continue
        # NAME+OFFSET, a module without brackets, then [FLAG][FLAG]
        module, _, flags = (match[5] or "").partition("[")
        if "GONE]" in flags:  # its module has been unloaded
            continue
        rows.append(
            Probe(
                address=int(match[1], 16),
                returning=match[2] == "r",
                function=match[3],
                offset=int(match[4] or "0", 16),
                object=module.strip() or VMLINUX,
                disabled="DISABLED]" in flags,
                ftrace="FTRACE]" in flags,
                optimized="OPTIMIZED]" in flags,
            )
        )
    return tuple(rows)


def replaced(probes: Iterable[Probe], address: int, size: int) -> frozenset[int]:
    """Offsets of the bytes that kprobes have replaced in the ``size`` bytes at ``address``.

    An ``int3``, or a jump of 5 bytes where the kernel has optimised the probe (arch/x86/kernel/kprobes). By
    the probe's address: of a function's names the table has the first, be it another than the one asked for.
    """
    found: set[int] = set()
    for probe in probes:
        if not probe.disabled:
            start = probe.address - address
            found.update(range(max(start, 0), min(start + (5 if probe.optimized else 1), size)))
    return frozenset(found)


def read_traceable(
    place: Place, functions: Iterable[Entry], table: SymbolTable
) -> frozenset[tuple[str, str]] | None:
    """Those of ``functions`` that have an ftrace entry, as (object, name as the kernel prints it).

    None: not readable. The file has 50,000 lines, so it is searched as text.
    """
    name = "available_filter_functions"
    if name not in table.beside:
        table.beside[name] = _tracefs(place, name)  # the kernel takes 0.1 s to write it
    text = table.beside[name]
    if not text:
        return None
    text = f"\n{text}\n"
    return frozenset(
        (row.object, row.shown)
        for row in functions
        if f"\n{row.shown}{'' if row.object == VMLINUX else f' [{row.object}]'}\n" in text
    )


def entries(
    table: SymbolTable, functions: Iterable[tuple[str, str, int]], patches: Sequence[LivePatch]
) -> tuple[Entry, ...]:
    """The entries of (object, name, sympos) that the running kernel has; what it has not is left out."""
    patched = {
        (obj.name, one.name, max(one.sympos, 1))
        for patch in patches
        for obj in patch.objects
        if obj.patched is not False
        for one in obj.functions
    }
    found = []
    for object_, name, sympos in functions:
        same = [row for row in table.named(name) if row.object == object_]
        if len(same) < max(sympos, 1):
            continue
        symbol = same[max(sympos, 1) - 1]
        shown = shown_name(table, symbol)
        after = table.after(symbol.address)
        found.append(
            Entry(
                name=name,
                object=object_,
                shown=shown,
                address=symbol.address,
                size=after - symbol.address if after is not None else 0,
                twins=len([row for row in table.named(shown) if row.object == object_]),
                livepatched=(object_, name, max(sympos, 1)) in patched,
            )
        )
    return tuple(found)


def shown_name(table: SymbolTable, symbol: RunningSymbol) -> str:
    """How the kernel prints the symbol's address: by the first of its aliases (``get_symbol_pos()``,
    kernel/kallsyms.c; for a module's ``find_kallsyms_symbol()``)."""
    same = [row for row in table.at(symbol.address) if row.object == symbol.object]
    return same[0].name if same else symbol.name


# -- what follows ----------------------------------------------------------------------------------


def look(place: Place, functions: Sequence[Entry], table: SymbolTable) -> Hooks:
    """Hold the entries that a livepatch wants against everybody else's."""
    traced, probes, traceable = (
        read_traced(place),
        read_probes(place),
        read_traceable(place, functions, table),
    )
    excluded: set[int] = set()
    rows = [
        *_entries(functions, traceable),
        *_redirected(functions, traced, probes, table, excluded),
        *_probed(functions, probes),
    ]
    return Hooks(
        tuple(row for row in rows if isinstance(row, Check)),
        tuple(row for row in rows if isinstance(row, Refusal)),
        frozenset(excluded),
        frozenset(row.address for row in functions if _lacks(row, traceable)),
    )


def _lacks(entry: Entry, traceable: frozenset[tuple[str, str]] | None) -> bool:
    return traceable is not None and (entry.object, entry.shown) not in traceable


def _tracefs(place: Place, name: str) -> str | None:
    for folder in _TRACEFS:
        found = optional(place.sys / folder / name)
        if found is not None:
            return found
    return None


def _entries(functions: Sequence[Entry], traceable: frozenset[tuple[str, str]] | None) -> Iterator[Check]:
    """``klp_get_ftrace_location()``, kernel/livepatch/patch.c: without an entry nothing can be redirected."""
    if traceable is None:
        yield Check("ftrace entries", None, "tracefs is not mounted: which functions have one cannot be seen")
        return
    lacking = [row for row in functions if _lacks(row, traceable)]
    for row in lacking:
        refusal = Refusal(
            "no-ftrace-entry",
            f"{row.name}() cannot be patched",
            f"the running kernel lists no ftrace entry for it in {row.object}: it is notrace, or no function",
            "patch a caller that can be traced",
        )
        yield Check("ftrace entries", False, refusal.what, refusal)
    if not lacking:
        yield Check("ftrace entries", True, f"{len(functions)} functions have one in the running kernel")


def _redirected(
    functions: Sequence[Entry],
    traced: tuple[Traced, ...] | None,
    probes: tuple[Probe, ...] | None,
    table: SymbolTable,
    excluded: set[int],
) -> Iterator[Check | Refusal]:
    if traced is None:
        yield Check("redirections", None, "tracefs is not mounted: other users of ftrace cannot be seen")
        return
    by_name: dict[tuple[str, str], list[Traced]] = {}
    for row in traced:
        by_name.setdefault((row.object, row.function), []).append(row)
    for entry in functions:
        rows = by_name.get((entry.object, entry.shown), [])
        changing = [row for row in rows if "I" in row.flags]
        if changing and not entry.livepatched:
            if entry.twins > 1:
                yield Refusal(
                    "ftrace-ambiguous",
                    f"one of the {entry.twins} functions {entry.shown}() of {entry.object} is redirected",
                    "the kernel's table has names alone; if it is the one that the patch replaces, the "
                    "kernel answers EBUSY",
                    "look for a kprobe with a post handler, or another livepatch of the name",
                )
            else:
                excluded.add(entry.address)
                refusal = _conflict(entry, changing[0], probes)
                yield Check("redirections", False, refusal.what, refusal)
        for row in rows:
            if "D" in row.flags:
                found = _direct(entry, row, table)
                if found.rule == "ftrace-conflict":
                    excluded.add(entry.address)
                    yield Check("redirections", False, found.what, found)
                else:
                    yield found
    if not excluded:
        yield Check("redirections", True, "nothing that excludes a livepatch redirects these functions")


def _conflict(entry: Entry, row: Traced, probes: tuple[Probe, ...] | None) -> Refusal:
    """Somebody else's ``IPMODIFY``; a kprobe on the entry is known to be its owner by the two tables."""
    at_entry = [one for one in probes or () if one.ftrace and not one.disabled and _on(one, entry)]
    if at_entry:
        owner = "a kprobe with a post handler"
        next_step = (
            "remove the probe: it is in /sys/kernel/debug/kprobes/list, and belongs to a module or to a "
            "tracing tool"
        )
    else:
        names = ", ".join(f"{name}()" for name in row.called)
        owner = f"something that is no livepatch{f' ({names})' if names else ''}"
        next_step = "find it in /sys/kernel/tracing/enabled_functions and take it away first"
    return Refusal(
        "ftrace-conflict",
        f"{entry.name}() is redirected by {owner}",
        "the kernel lets one at a time change where a function goes (IPMODIFY): the second gets EBUSY",
        next_step,
    )


def _direct(entry: Entry, row: Traced, table: SymbolTable) -> Refusal:
    """A direct call: a BPF trampoline that can share, or a refusal (rule ``ftrace-conflict``)."""
    if row.direct.startswith(_BPF) and table.named(_CAN_SHARE):
        return Refusal(
            "bpf-trampoline",
            f"a BPF program is attached to {entry.name}() ({row.direct})",
            "the kernel lets it share the function with a livepatch: the program goes on to run, around the "
            "new code",
            "make sure that what it reads of the function still means the same",
        )
    what = f"a BPF trampoline ({row.direct})" if row.direct.startswith(_BPF) else row.direct or "something"
    return Refusal(
        "ftrace-conflict",
        f"{entry.name}() is called through {what}",
        "it has a direct call at its entry that cannot share the function with a livepatch: the kernel "
        "answers EBUSY",
        "detach it (bpftool link; or the module that registered it) and load the patch then",
    )


def _on(probe: Probe, entry: Entry) -> bool:
    """Whether the probe is in the function: by its address, else by name."""
    if probe.address:
        return entry.address <= probe.address < entry.address + max(entry.size, 1)
    return (probe.object, probe.function) == (entry.object, entry.shown)


def _probed(functions: Sequence[Entry], probes: tuple[Probe, ...] | None) -> Iterator[Check | Refusal]:
    if probes is None:
        yield Check("probes", None, "debugfs is not mounted: kprobes cannot be seen")
        return
    found = []
    for entry in functions:
        for probe in probes:
            if not _on(probe, entry):
                continue
            found.append(f"{probe} [{probe.object}]" if probe.object != VMLINUX else str(probe))
            if probe.ftrace and probe.disabled:
                yield Refusal(
                    "probe-disabled",
                    f"{entry.name}() has a disabled {probe}",
                    "if it has a post handler it cannot be enabled any more while the patch is in force",
                    "remove it, or leave it disabled",
                )
            elif not probe.ftrace:
                yield Refusal(
                    "probe-bypassed",
                    f"{entry.name}() has a {probe}",
                    "it is on an instruction of the old code: tasks that run the new code do not hit it",
                    "expect no events from it, and set it anew afterwards if they are needed",
                )
    text = f"on these functions: {', '.join(found)}" if found else "no kprobe is on these functions"
    yield Check("probes", True, text)
