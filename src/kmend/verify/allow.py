"""Which refusals a human may overrule (``--allow RULE``), and why exactly these.

A rule stands here when two things hold: a person can know what kmend cannot (that a thread will be
stopped, that a structure is never shared between old and new code), and the module is a right one
all the same: it links to what it says, and the kernel loads it as it would any other. Rules about
provenance, symbols, ambiguity, formats and the kernel's own livepatch rules never stand here: nobody can
know better than the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kmend.core.errors import Refusal, UsageError

#: Rule -> what the one who allows it answers for.
REASONS: dict[str, str] = {
    "never-leaves": "the transition stays open until the thread leaves the function; nothing breaks",
    "changed-signature": "every caller that stays in use is known to be replaced too, or to agree",
    "layout-changed": "objects laid out by old code are never read by new code, nor the other way round",
    "enum-changed": "no value that old code has stored, or that user space hands in, has the changed number",
    "changed-data": "the running kernel keeps its own contents, and the new code is right with them",
    "renamed-variable": "the two variables are two things; the new one starts from its initial value",
}
#: The rules that ``--allow`` takes.
ALLOWABLE: frozenset[str] = frozenset(REASONS)


@dataclass(frozen=True, slots=True)
class Split:
    """What is left of the refusals, and those that were allowed, as warnings."""

    refusals: tuple[Refusal, ...]
    warnings: tuple[Refusal, ...]


def checked(rules: Iterable[str]) -> frozenset[str]:
    """The rules as a set.

    Raises:
        UsageError: (``not-allowable``) one of them cannot be allowed, or is no rule.
    """
    wanted = frozenset(rules)
    for rule in sorted(wanted - ALLOWABLE):
        raise UsageError(
            f"--allow {rule}: it cannot be allowed",
            why="only what a human can know better than kmend: " + ", ".join(sorted(ALLOWABLE)),
            next_step="docs/refusals.md says what each rule means and what can be done",
            rule="not-allowable",
        )
    return wanted


def split(refusals: Iterable[Refusal], allowed: Iterable[str]) -> Split:
    """Make warnings of the refusals whose rule is allowed.

    Raises:
        UsageError: as :func:`checked`.
    """
    wanted = checked(allowed)
    left: dict[Refusal, None] = {}
    passed: dict[Refusal, None] = {}
    for refusal in refusals:
        if refusal.rule not in wanted:
            left[refusal] = None
            continue
        row = Refusal(
            refusal.rule,
            refusal.what,
            f"{refusal.why} (allowed by --allow)",
            f"you answer for this: {REASONS[refusal.rule]}",
        )
        passed[row] = None
    return Split(tuple(left), tuple(passed))
