"""Finding frames of code that changes on the stacks of tasks: one implementation for all who look.

The question is the kernel's own (``klp_check_stack_func()``, kernel/livepatch/transition.c), asked of the
names in ``/proc/PID/stack`` instead of addresses. A name there may be an alias of the one that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kmend.core.errors import Unable
from kmend.core.live import Frame
from kmend.core.target import VMLINUX
from kmend.runtime.place import Place
from kmend.runtime.symbols import SymbolTable


@dataclass(frozen=True, slots=True)
class Watched:
    """A function that must not be on a stack: its name, the object that it belongs to for livepatch, and
    where its present code lies (``vmlinux``, its module, or the module of the patch whose code runs).
    """

    name: str
    object: str
    code: str


@dataclass(frozen=True, slots=True)
class Seeker:
    """Finds frames of code that changes.

    ``foreign`` are modules of livepatches whose functions' names are not known (a replacement may have any),
    with the old names that they replace and that do not change now: a frame of any other name there may be
    one that changes. ``aliases`` are further names of the ``watched`` rows' functions, by object and name.
    """

    watched: tuple[Watched, ...]
    foreign: Mapping[str, frozenset[str]] = field(default_factory=dict)
    aliases: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    #: The rows by what a frame shows: where its code lies, and its name.
    _rows: dict[tuple[str, str], Watched] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows: dict[tuple[str, str], Watched] = {}
        for row in self.watched:
            rows.setdefault((row.code, row.name), row)
        for row in self.watched:
            for name in self.aliases.get((row.object, row.name), ()):
                rows.setdefault((row.code, name), row)
        object.__setattr__(self, "_rows", rows)  # the class is frozen for others

    def pattern(self) -> re.Pattern[str] | None:
        """What a stack must match to be worth reading; None: nothing can be found."""
        names = [re.escape(name) for name in sorted({name for _, name in self._rows})]
        modules = [re.escape(name) for name in self.foreign]
        parts = [rf"\] (?:{'|'.join(names)})\+0x"] if names else []
        parts += [rf"\[(?:{'|'.join(modules)})\]"] if modules else []
        return re.compile("|".join(parts)) if parts else None

    def find(self, stack: Sequence[Frame]) -> tuple[Watched, int, bool] | None:
        """The outermost frame in such code: the row, its place in the stack, whether it is certain.

        What it called is on the way; what called it waits for it to come back.
        """
        for at in range(len(stack) - 1, -1, -1):
            frame = stack[at]
            row = self._rows.get((frame.module or VMLINUX, frame.function))
            if row is not None:
                return row, at, True
            if frame.module in self.foreign and frame.function not in self.foreign[frame.module]:
                return Watched(frame.function, frame.module, frame.module), at, False
        return None

    def with_aliases(self, place: Place) -> Seeker:
        """One that knows the other names of the same addresses: ``__x64_sys_getppid`` is ``__do_sys_getppid``
        in stacks. Reads all of ``/proc/kallsyms``, which takes a while; where that shows no addresses, none
        are found."""
        try:
            table = SymbolTable(place)
        except Unable:
            return self
        found = {}
        for row in self.watched:
            if row.code != row.object:  # a patch's own code: its names are not the kernel's
                continue
            same = [one for one in table.named(row.name) if one.object == row.object]
            names = {
                other.name for one in same for other in table.at(one.address) if other.object == row.object
            }
            found[row.object, row.name] = frozenset(names - {row.name})
        return replace(self, aliases=found)
