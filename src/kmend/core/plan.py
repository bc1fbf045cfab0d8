"""The values of a plan: what loading a livepatch would do on this machine, before it is done.

``kmend.plan`` makes them, ``kmend.report.plan`` renders them. The words are the kernel's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kmend.core.errors import Refusal
from kmend.core.live import Blocker, Check, KernelState


class Verdict(Enum):
    """``LOADS``: it would load, and its transition end. ``STALLS``: load, but not end by itself.

    ``REFUSED``: kmend or the kernel would refuse it.
    """

    LOADS = "would-load"
    STALLS = "would-stall"
    REFUSED = "would-be-refused"


@dataclass(frozen=True, slots=True)
class StackEntry:
    """An entry of a ``func_stack``: whose it is; a nop leads to the original code."""

    patch: str
    nop: bool = False


@dataclass(frozen=True, slots=True)
class FuncStack:
    """The ``func_stack`` of a function, top first: now, during the transition, after it."""

    object: str
    function: str
    sympos: int
    before: tuple[StackEntry, ...]
    during: tuple[StackEntry, ...]
    after: tuple[StackEntry, ...]


@dataclass(frozen=True, slots=True)
class PlannedCallback:
    """A callback of the module that will run, in order. ``function`` is its name in the module."""

    kind: str
    object: str
    function: str
    when: str


class Leaves(Enum):
    """What brings a task out of the function that it is in.

    ``ITSELF``: it was seen to come and go. ``SIGNAL``: an interruption (kmend's, or the kernel's own after 15
    retries). ``EVENT``: only what it waits for. ``NEVER``: it is the thread's own main function.
    """

    ITSELF = "by-itself"
    SIGNAL = "interruption"
    EVENT = "event"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Inside:
    """A task seen inside of a function that changes, in ``seen`` of the looks.

    ``blocker`` has the task as it was last seen there. ``certain``: False when only the patch's module is
    known whose code it is in, not the function.
    """

    blocker: Blocker
    seen: int
    leaves: Leaves
    certain: bool = True


@dataclass(frozen=True, slots=True)
class Look:
    """One look at all tasks: seconds since the first, how many there were, how many inside.

    ``running`` were on a processor and show no stack; ``unreadable`` stacks could not be read.
    """

    seconds: float
    tasks: int
    inside: int
    running: int
    unreadable: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """Whether and when the transition ends, in seconds after the load; None: not known to end.

    ``alone``: with the kernel's own retries and signals. ``woken``: when sleepers are interrupted, as
    `kmend load` does.
    """

    looks: tuple[Look, ...]
    inside: tuple[Inside, ...]
    alone: float | None
    woken: float | None
    why: str
    helps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `kmend plan` has to tell.

    ``number`` is the errno with which the model's ``klp_enable_patch()`` answers, 0 for none; ``log`` are the
    lines that it writes. ``late`` are objects that are not loaded: they are patched when they come.
    """

    name: str
    file: str
    sha256: str
    kernel: KernelState
    verdict: Verdict
    replace: bool | None
    checks: tuple[Check, ...]
    refused: tuple[Refusal, ...]
    warnings: tuple[Refusal, ...]
    stacks: tuple[FuncStack, ...] = ()
    replaced: tuple[str, ...] = ()
    nops: tuple[tuple[str, str], ...] = ()
    callbacks: tuple[PlannedCallback, ...] = ()
    late: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    number: int = 0
    forecast: Forecast | None = None
    model: str = ""
