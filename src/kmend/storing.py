"""One command on the store of installed patches: lock, journal, the end of what it began.

    lock -> what killed runs left open is closed -> begin, for each patch -> the store is changed -> end

What :mod:`kmend.installer` and :mod:`kmend.boot` have in common. Each change is in the journal before it is
made, so that the same command can go on with it after a kill.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kmend.core.errors import Failed, KmendError, Refusal, Unable
from kmend.core.live import Result
from kmend.runtime import journal
from kmend.runtime.journal import Action, Journal
from kmend.runtime.place import Place


@dataclass(frozen=True, slots=True)
class Begun:
    """What a command that holds the lock has begun. Each action is in the journal before it is done."""

    book: Journal
    verb: str
    by: journal.Who
    actions: list[Action] = field(default_factory=list)

    def begin(self, name: str, text: str, **detail: object) -> Action:
        """Write down what is about to be done about one patch."""
        self.actions.append(self.book.begin(self.verb, name, self.by, text, detail))
        return self.actions[-1]

    def end(self, result: str, text: str, **detail: object) -> None:
        """All that has no end yet is over."""
        for action in self.actions:
            action.end(result, text, **detail)

    def broken(self, error: BaseException, names: Sequence[str]) -> None:
        """An error ends it: write down how, where nothing is begun yet for each of ``names``."""
        match error:
            case KmendError() if self.actions:
                self.end(result_of(error).value, error.what, **journal.reasons(error.reasons))
            case KmendError():
                for name in names:
                    self.book.refused(self.verb, name, self.by, error.what, error.reasons)
            case _:
                why = f"stopped by {type(error).__name__}; the same command goes on with it"
                self.end(journal.INTERRUPTED, why)


class Command:
    """A command, as the lock and the journal of the boot ``boot`` show it.

    ``verb`` is what its lines in the journal are filed under; ``words`` is what somebody typed, when that is
    more than the verb.
    """

    def __init__(self, state: Path, place: Place, boot: str, verb: str, words: str = "") -> None:
        self.place, self.verb, self.words = place, verb, words or verb
        self.book = Journal(state, boot)
        self.by = journal.who(place, " ".join(sys.argv[:8]))

    @contextmanager
    def acting(self, names: Sequence[str], limit: float = journal.LOCK_LIMIT) -> Iterator[Begun]:
        """Hold the lock, after ``limit`` seconds of waiting at most; what killed runs left open is closed.

        An error ends what is begun, or is written down for each of ``names``; with the lock held, or the next
        one would take what is begun for killed.

        Raises:
            Refused: (rule ``busy``) another kmend acts. Failed: the lock's file cannot be made.
        """
        begun = Begun(self.book, self.verb, self.by)
        with ExitStack() as held:
            try:
                held.enter_context(journal.acting(self.place, self.words, limit))
                journal.close_killed(self.book, self.place, self.words)
                yield begun
            except BaseException as error:
                begun.broken(error, names)
                raise

    def close_killed(self) -> None:
        """Write down the end of what killed runs began, also where this command has nothing to do or is
        refused. Where another kmend acts it has done so itself, and what is open is its own.
        """
        with suppress(KmendError):
            if journal.unfinished(self.book.records(), self.book.boot) and journal.is_free(self.place):
                with journal.acting(self.place, self.words):
                    journal.close_killed(self.book, self.place, self.words)

    def refused(self, name: str, text: str, refusals: Sequence[Refusal] = ()) -> None:
        """A line in the journal about what was not even begun."""
        self.book.refused(self.verb, name, self.by, text, refusals)

    @contextmanager
    def told(self, names: Sequence[str]) -> Iterator[None]:
        """Write down what is refused inside, for each of ``names``."""
        try:
            yield
        except KmendError as error:
            for name in names:
                self.refused(name, error.what, error.reasons)
            raise


def require_root(verb: str) -> None:
    """Refuse at once what would fail half way. Being root is enough: no capability for loading is needed.

    Raises:
        Unable: rule ``not-root``.
    """
    if os.geteuid() != 0:
        raise Unable(
            f"kmend {verb} needs root",
            why="what is loaded at boot is root's to decide",
            next_step=f"sudo kmend {verb} …",
            rule="not-root",
        )


def result_of(error: KmendError) -> Result:
    """How an action ends that such an error ends."""
    return Result.FAILED if isinstance(error, Failed) else Result.REFUSED
