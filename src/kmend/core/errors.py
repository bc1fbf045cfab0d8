"""The error tree. Library code raises; only the command line turns an error into text.

Every error carries the same four fields (rule, what, why, next step), so that a
person and a JSON reader are told the same. The exit status is the contract's:
1 refused or failed, 2 wrong usage, 3 this machine or kernel cannot do it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason for not doing something, or one warning.

    ``rule`` is a stable kebab-case name (``header-change``, ``provenance-bytes``);
    ``what`` names the thing concerned; ``why`` the fact found; ``next_step`` what
    the user can do about it.
    """

    rule: str
    what: str
    why: str
    next_step: str


class KmendError(Exception):
    """Base of everything kmend raises on purpose."""

    exit_status = 1

    def __init__(
        self, what: str, *, why: str = "", next_step: str = "", rule: str = "failed", artefacts: str = ""
    ) -> None:
        super().__init__(what)
        self.rule = rule
        self.what = what
        self.why = why
        self.next_step = next_step
        self.artefacts = artefacts

    @property
    def reasons(self) -> tuple[Refusal, ...]:
        """The error as the rows of a report."""
        return (Refusal(self.rule, self.what, self.why, self.next_step),)


class Failed(KmendError):
    """Something that should have worked did not (compiler, download, disk)."""


class Refused(KmendError):
    """kmend understood the request and will not do it; carries every reason found."""

    def __init__(self, refusals: tuple[Refusal, ...] | list[Refusal], *, artefacts: str = "") -> None:
        rows = tuple(refusals)
        first = rows[0]
        super().__init__(
            first.what, why=first.why, next_step=first.next_step, rule=first.rule, artefacts=artefacts
        )
        self.refusals = rows

    @property
    def reasons(self) -> tuple[Refusal, ...]:
        return self.refusals


class UsageError(KmendError):
    """The command line or an input file's form is wrong."""

    exit_status = 2


class Unable(KmendError):
    """This machine or kernel cannot do it (missing tool, unknown release, no network)."""

    exit_status = 3
