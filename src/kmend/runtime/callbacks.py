"""Which callbacks of a patch the kernel has called, told from what it does and when.

The kernel logs none of them. When it calls which is fixed (``__klp_enable_patch()``,
``__klp_disable_patch()``: kernel/livepatch/core.c; ``klp_complete_transition()``:
kernel/livepatch/transition.c): the "pre" ones when a transition begins, the "post" ones when it ends, by
where it ended; of every object that is there just then. ``klp_reverse_transition()`` calls none, and a patch
that a cumulative one replaces has none of its own called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kmend.core.live import Phase
from kmend.core.target import VMLINUX
from kmend.runtime.place import Place, optional

#: Objects in their order, each with its callbacks: kind (``pre_patch``, …) to the name of the function.
Callbacks = Sequence[tuple[str, Mapping[str, str]]]


@dataclass(slots=True)
class Called:
    """Collects what is called in one action. ``known`` is None when the module's callbacks are not known."""

    place: Place
    known: Callbacks | None
    rows: list[str] = field(default_factory=list)

    def begins(self, goal: Phase) -> None:
        """The kernel has begun a transition (not: has turned one round)."""
        self._call("pre_patch" if goal is Phase.PATCHING else "pre_unpatch")

    def ends(self, goal: Phase) -> None:
        """The transition is complete."""
        self._call("post_patch" if goal is Phase.PATCHING else "post_unpatch")

    def unknown(self) -> None:
        """Some were called, and which is not known: the kernel has refused the patch half way."""
        if self.known:
            self.known = None

    def told(self) -> tuple[str, ...] | None:
        """``KIND of OBJECT: FUNCTION()`` for each call, in their order; None: not known."""
        return None if self.known is None else tuple(self.rows)

    def _call(self, kind: str) -> None:
        for name, kinds in self.known or ():
            if kind in kinds and self._is_there(name):
                self.rows.append(f"{kind} of {name}: {kinds[kind]}()")

    def _is_there(self, name: str) -> bool:
        return name == VMLINUX or optional(self.place.module(name) / "initstate") == "live"


def parsed(value: object) -> Callbacks | None:
    """What a line of the journal says about a module's callbacks; None for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    try:
        return [
            (str(name), {str(kind): str(called) for kind, called in rows.items()}) for name, rows in value
        ]
    except (AttributeError, TypeError, ValueError):
        return None
