"""What ``/proc/sys/kernel/tainted`` means, bit by bit.

The table follows ``Documentation/admin-guide/tainted-kernels.rst`` and ``taint_flags[]`` in
``kernel/panic.c``; livepatch sets its bit for every patch that is enabled (``kernel/livepatch/core.c``,
``klp_enable_patch`` by way of ``add_taint_module`` in ``kernel/module/main.c``). No bit is ever
cleared before the next boot.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TaintFlag:
    """A row: bit number, the letter that an oops shows for it, what happened."""

    bit: int
    letter: str
    meaning: str


TAINT_FLAGS = (
    TaintFlag(0, "P", "a module with a proprietary licence was loaded"),
    TaintFlag(1, "F", "a module was loaded by force"),
    TaintFlag(2, "S", "the kernel runs on hardware outside of its specification"),
    TaintFlag(3, "R", "a module was unloaded by force"),
    TaintFlag(4, "M", "the processor reported a machine check"),
    TaintFlag(5, "B", "a bad page was referenced or had unexpected flags"),
    TaintFlag(6, "U", "user space asked for the taint"),
    TaintFlag(7, "D", "the kernel died recently (oops or BUG)"),
    TaintFlag(8, "A", "an ACPI table was overridden by the user"),
    TaintFlag(9, "W", "the kernel issued a warning"),
    TaintFlag(10, "C", "a staging driver was loaded"),
    TaintFlag(11, "I", "a firmware bug was worked around"),
    TaintFlag(12, "O", "a module built outside of the kernel tree was loaded"),
    TaintFlag(13, "E", "an unsigned module was loaded"),
    TaintFlag(14, "L", "a soft lockup occurred"),
    TaintFlag(15, "K", "the kernel has been live patched"),
    TaintFlag(16, "X", "auxiliary taint, used by distributions"),
    TaintFlag(17, "T", "the kernel was built with randomised structures"),
    TaintFlag(18, "N", "an in-kernel test has run"),
    TaintFlag(19, "J", "user space changed firmware state through fwctl"),
)


def decode(value: int) -> tuple[TaintFlag, ...]:
    """The flags that are set in ``value``, lowest bit first; bits newer than the table are named so."""
    known = {flag.bit: flag for flag in TAINT_FLAGS}
    return tuple(
        known.get(bit, TaintFlag(bit, "?", "a flag that this version of kmend does not know"))
        for bit in range(value.bit_length())
        if value >> bit & 1
    )
