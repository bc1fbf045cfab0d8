"""One action on the running kernel: lock, journal, its transition followed to its end or back, its report.

    lock -> journal: begin -> steps -> transition followed, a stall dealt with -> journal: end -> report

What the verbs of :mod:`kmend.manager` have in common. One action at a time holds the lock; each is in the
journal before it begins, so that whoever comes after a killed kmend knows what was under way.
"""

from __future__ import annotations

import hashlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from kmend.core import kmsg
from kmend.core.config import Config
from kmend.core.errors import KmendError, Refusal, Unable
from kmend.core.files import read_regular
from kmend.core.kmsg import KernelMessage
from kmend.core.live import ActionReport, Check, End, Followed, Phase, Result, Step, Transition
from kmend.core.progress import Progress
from kmend.examine import MOST
from kmend.runtime import act, blockers, callbacks, journal, klog, refusals
from kmend.runtime.callbacks import Called
from kmend.runtime.follow import Follower, Patience
from kmend.runtime.journal import Action, Journal
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.observe import Seen, observe
from kmend.runtime.patches import read_patch, read_patches
from kmend.runtime.place import Place

#: Taking back after a stall gets at least so many seconds: it is the way out.
WAY_BACK = 60.0
#: Whoever answered "wait on" is asked again after so many seconds at the earliest.
ASK_AGAIN = 10.0


class OnStall(Enum):
    """What to do when a transition has not ended within the limit."""

    REVERSE = "reverse"
    WAIT = "wait"
    ASK = "ask"


class Choice(Enum):
    """What somebody who is asked at a stall may answer."""

    REVERSE = "reverse"
    WAIT = "wait"
    LEAVE = "leave"


Ask = Callable[[Transition | None], Choice]


@dataclass(frozen=True, slots=True)
class Following:
    """How a transition is followed. ``wait=False``: not at all."""

    wait: bool = True
    patience: Patience = field(default_factory=Patience)
    on_stall: OnStall = OnStall.REVERSE


@dataclass(slots=True)
class Run:
    """One action under way: what it has found and done so far."""

    verb: str
    patch: str
    action: Action
    log: klog.KernelLog | None
    called: Called
    began: float
    steps: list[Step] = field(default_factory=list)
    followed: list[Followed] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    checks: tuple[Check, ...] = ()
    #: the patches that it replaces when it comes into force, for one that is cumulative or may be
    below: frozenset[str] = frozenset()
    replaced: tuple[str, ...] = ()
    heard: list[klog.Record] = field(default_factory=list)
    note: Mapping[str, object] = field(default_factory=dict)

    def may_replace(self, cumulative: bool | None, names: Iterable[str]) -> None:
        """Those of the names are the patches that it replaces; none if it is known not to be cumulative."""
        self.below = frozenset() if cumulative is False else frozenset(names) - {self.patch}

    def step(self, text: str, **detail: object) -> None:
        self.steps.append(Step(self.seconds(), text))
        self.action.step(text, **detail)

    def told(self, step: Step) -> None:
        """Write down what was done about tasks when it is done: somebody may be watching."""
        self.steps.append(Step(self.seconds(), step.text, step.tids))
        self.action.step(step.text, tids=list(step.tids))

    def follow(self, follower: Follower) -> Followed:
        """Follow a transition, and keep what came of it."""
        began = self.seconds()
        found = replace(follower.run(), began=began)
        self.followed.append(found)
        return found

    def seconds(self) -> float:
        """Since the action began."""
        return round(time.monotonic() - self.began, 3)

    def messages(self) -> tuple[KernelMessage, ...]:
        """Everything that the kernel has said since the action began, as far as it could be read."""
        if self.log is not None:
            self.heard += self.log.read()
        return tuple(row.message for row in self.heard)


class Actor:
    """Acts on one machine. ``ask`` is asked at a stall when the policy is to ask."""

    def __init__(
        self, config: Config, progress: Progress, *, place: Place | None = None, ask: Ask | None = None
    ) -> None:
        self.config, self.progress, self.ask = config, progress, ask
        self.place = place or Place()

    @contextmanager
    def _acting(self, verb: str, name: str) -> Iterator[None]:
        """Hold the lock. What is refused by an error before an action has begun is in the journal as well."""
        try:
            with journal.acting(self.place, f"{verb} {name}"):
                yield
        except Unable:
            raise  # this machine or user cannot do it: so it cannot write that down either
        except KmendError as error:
            patch = Path(name).name.removesuffix(".ko")
            with suppress(KmendError):
                book = self._journal(read_kernel(self.place).boot_id)
                book.refused(verb, patch, self._who(), error.what, error.reasons)
            raise

    def _who(self) -> journal.Who:
        return journal.who(self.place, " ".join(sys.argv[:8]))

    def _observe(self, limit: int = 0, *, holding: bool = True) -> Seen:
        """A look; by default as who holds the lock: what has no end in the journal is a killed run's."""
        return observe(self.place, self.config.state, limit=limit or blockers.SHOWN, holding=holding)

    def _journal(self, boot: str) -> Journal:
        return Journal(self.config.state, boot)

    def _loads(self, boot: str) -> dict[str, journal.Record]:
        """What kmend loaded in this boot, as far as its journal can be read."""
        try:
            return journal.loads(self._journal(boot).records(), boot)
        except KmendError:
            return {}

    def _perform(
        self,
        verb: str,
        name: str,
        text: str,
        detail: dict[str, object],
        seen: Seen,
        work: Callable[[Run], ActionReport],
    ) -> ActionReport:
        """An action with its entries in the journal, however it ends; a refusal becomes its report."""
        boot = seen.kernel.boot_id
        book = self._journal(boot)
        journal.close_killed(book, self.place, f"{verb} {name}")
        if "callbacks" not in detail and (loaded := self._loads(boot).get(name)) is not None:
            detail = {**detail, "callbacks": loaded.detail.get("callbacks")}  # as the module's file had them
        action = book.begin(verb, name, self._who(), text, detail)
        try:
            log: klog.KernelLog | None = klog.KernelLog(self.place, new_only=True)
        except Unable:
            log = None
        called = Called(self.place, callbacks.parsed(detail.get("callbacks")))
        run = Run(verb, name, action, log, called, time.monotonic())
        there = seen.named(name)
        run.note = there.module.note if there is not None and there.module is not None else {}
        try:
            return work(run)
        except Unable as error:  # this machine cannot do it: another exit status
            action.end(Result.FAILED.value, error.what, **journal.reasons(error.reasons))
            raise
        except KmendError as error:
            return self._report(run, Result.REFUSED, error.what, refused=error.reasons)
        except BaseException as error:  # Ctrl-C, SIGTERM: the kernel goes on with what was begun
            action.end(
                journal.INTERRUPTED, f"stopped by {type(error).__name__}; the kernel was left as it is"
            )
            raise
        finally:
            if log is not None:
                log.close()

    def _refused(self, verb: str, name: str, seen: Seen, *refused: Refusal, what: str = "") -> ActionReport:
        """The report of an action that was not even begun; the journal has one line of it."""
        what = what or refused[0].what
        book = self._journal(seen.kernel.boot_id)
        journal.close_killed(book, self.place, f"{verb} {name}")
        book.refused(verb, name, self._who(), what, refused)
        return ActionReport(verb, name, Result.REFUSED, what, refused=refused)

    def _report(
        self, run: Run, result: Result, why: str, next_step: str = "", refused: tuple[Refusal, ...] = ()
    ) -> ActionReport:
        """The report of an action, which ends here in the journal too."""
        messages = run.messages()
        heard = [run.heard[0].number, run.heard[-1].number] if run.heard else None
        run.action.end(result.value, why, heard=heard, **journal.reasons(refused))
        seconds = run.seconds()
        drift = 0.0
        if messages:
            ended = run.began + seconds
            drift = klog.drift(messages[0].seconds, messages[-1].seconds, run.began, ended)
        return ActionReport(
            verb=run.verb,
            patch=run.patch,
            result=result,
            why=why,
            next_step=next_step,
            checks=run.checks,
            steps=tuple(run.steps),
            followed=tuple(run.followed),
            replaced=run.replaced,
            refused=refused,
            callbacks=run.called.told(),
            removed=tuple(run.removed),
            warnings=tuple(_warnings(messages, run.log is not None and run.log.lost, run.action.journal)),
            messages=tuple(row for row in messages if row.livepatch),
            seconds=seconds,
            note=run.note,
            began=run.began,
            drift=drift,
        )

    # -- following ----------------------------------------------------------------------------------

    def _follower(self, run: Run, goal: Phase, patience: Patience) -> Follower:
        return Follower(self.place, run.patch, goal, patience, self.progress, told=run.told)

    def _follow(self, run: Run, goal: Phase, following: Following) -> ActionReport | None:
        """Follow the transition; None: it has reached its goal. Otherwise the report of how it ended."""
        patience = following.patience
        while True:
            found = run.follow(self._follower(run, goal, patience))
            match found.end:
                case End.COMPLETE:
                    run.step(f"{goal.value} is complete after {found.seconds:.1f} s")
                    run.called.ends(goal)
                    return None
                case End.REVERSED:
                    report = self._turned_round(run, goal, following)
                    if report is not None:
                        return report
                    continue  # and round again: it goes where it was to go
                case End.GONE:
                    return self._interfered(run, refusals.taken_away(run.patch))
                case End.STALLED:
                    choice = self._choice(following.on_stall, found.last)
            run.step(
                f"stalled after {found.seconds:.0f} s with {refusals.left_words(found)}; now: {choice.value}"
            )
            match choice:
                case Choice.WAIT:
                    asked = following.on_stall is OnStall.ASK
                    patience = replace(patience, limit=max(patience.limit, ASK_AGAIN) if asked else math.inf)
                case Choice.LEAVE:
                    return self._report(
                        run,
                        Result.PENDING,
                        f"the transition of {run.patch} goes on",
                        "kmend status --watch",
                    )
                case Choice.REVERSE:
                    now = read_patch(self.place, run.patch, objects=False)
                    if now is not None and now.phase is goal:
                        return self._reverse(run, goal, following, found)
                    run.step("it ended just then")  # the next round says how

    def _choice(self, on_stall: OnStall, last: Transition | None) -> Choice:
        match on_stall:
            case OnStall.REVERSE:
                return Choice.REVERSE
            case OnStall.WAIT:
                return Choice.WAIT
            case OnStall.ASK:
                return Choice.REVERSE if self.ask is None else self.ask(last)

    def _turned_round(self, run: Run, goal: Phase, following: Following) -> ActionReport | None:
        """Somebody else turned the transition round: it is followed to where it goes now.

        Not turned again: whoever did it may know why. None: they turned it a second time.
        """
        back = _other_way(goal)
        run.step("somebody turned it round; it is followed to its end")
        found = run.follow(self._follower(run, back, following.patience))
        refusal = refusals.turned(run.patch, goal)
        match found.end:
            case End.REVERSED:
                return None
            case End.STALLED:
                why = f"{run.patch} was turned round and has not ended"
                stalled = refusals.stalled(run.patch, back, found)
                return self._report(run, Result.STALLED, why, "kmend blockers", refused=(refusal, stalled))
            case End.COMPLETE:
                run.step(f"{back.value} is complete after {found.seconds:.1f} s")
                run.called.ends(back)
                return self._interfered(run, refusal)
            case End.GONE:
                return self._interfered(run, refusals.taken_away(run.patch))

    def _interfered(self, run: Run, refusal: Refusal) -> ActionReport:
        """Somebody else took the patch back, or kept it: what this load brought goes with it."""
        if run.verb == "load" and read_patch(self.place, run.patch, objects=False) is None:
            self._remove_quietly(run, run.patch)
        return self._report(run, Result.FAILED, refusal.what, refused=(refusal,))

    def _reverse(self, run: Run, goal: Phase, following: Following, stalled: Followed) -> ActionReport | None:
        """Go back to how it was before: the stall's reason is what is reported.

        None: there was no way back any more, as the transition had reached its goal.
        """
        refusal = refusals.stalled(run.patch, goal, stalled)
        back = _other_way(goal)
        found = None
        if act.set_enabled(self.place, run.patch, back is Phase.PATCHING, run.messages):
            patience = replace(following.patience, limit=max(following.patience.limit, WAY_BACK))
            found = run.follow(self._follower(run, back, patience))
        if found is None or found.end is End.GONE:
            if goal is Phase.PATCHING:
                return self._interfered(run, refusals.taken_away(run.patch))
            run.step("it ended just then")
            run.called.ends(goal)
            return None
        if found.end is End.REVERSED:
            turned = refusals.turned_again(run.patch, goal)
            return self._report(
                run, Result.STALLED, turned.what, "kmend status --watch", refused=(refusal, turned)
            )
        if found.end is End.STALLED:
            why = f"{run.patch} does not come to an end in either direction"
            stuck = refusals.stalled(run.patch, back, found)
            next_step = "kmend blockers says what it waits for"
            return self._report(run, Result.STALLED, why, next_step, refused=(refusal, stuck))
        run.step(f"{back.value} is complete after {found.seconds:.1f} s")
        run.called.ends(back)
        if back is Phase.PATCHING:
            why = f"{run.patch} could not be taken back, and is in force as before"
        else:
            lost = self._lost(run)
            if run.verb == "load":  # what cannot be removed is not to hide why it stalled
                self._remove_quietly(run, run.patch)
            if lost:
                run.replaced = lost
                why = (
                    f"{run.patch} came into force at the last moment, replaced {', '.join(lost)}, and was "
                    "taken back: none of them is in force any more"
                )
                way_back = self._way_back(run, read_kernel(self.place).boot_id, unload="")
                return self._report(run, Result.REVERSED, why, way_back or "kmend status", refused=(refusal,))
            why = f"{run.patch} could not be brought into force, and was taken back"
        return self._report(run, Result.REVERSED, why, refused=(refusal,))

    def _lost(self, run: Run) -> tuple[str, ...]:
        """What is gone although the patch that was to replace it has been taken back.

        A patch whose transition has ended meanwhile is not turned round but disabled (``enabled_store()``,
        kernel/livepatch/core.c, takes the lock that the end of a transition holds): what it has replaced does
        not come back.
        """
        there = {row.name for row in read_patches(self.place) if row.phase is not Phase.DISABLED}
        return tuple(sorted(run.below - there))

    def _way_back(self, run: Run, boot: str, *, unload: str) -> str:
        """How to return to the patches that this one replaced, where their files are still what they were.

        ``unload`` is the patch that has to go before, if any.
        """
        loads = self._loads(boot)
        former = sorted((loads[name] for name in run.replaced if name in loads), key=lambda row: row.time)
        files = [shlex.quote(str(row.detail.get("file", ""))) for row in former if _is_still(row)]
        if not files or len(files) < len(run.replaced):
            return ""
        if former[0].detail.get("replace") is True:  # it replaces this one in its turn
            return f"to go back to {former[0].patch}: kmend load {' '.join(files)}"
        names = ", ".join(row.patch for row in former)
        first = f"kmend unload {unload} && " if unload else ""
        return f"to go back to {names}: {first}kmend load {' '.join(files)}"

    def _remove_quietly(self, run: Run, name: str) -> None:
        try:
            removed = act.remove(self.place, name, limit=3.0)
        except KmendError as error:
            run.step(f"the module of {name} stays: {error.why}")
            return
        if removed:
            run.removed.append(name)
            run.step(f"unloaded {name}")


def _other_way(goal: Phase) -> Phase:
    return Phase.UNPATCHING if goal is Phase.PATCHING else Phase.PATCHING


def _warnings(messages: Sequence[KernelMessage], lost: bool, book: Journal) -> Iterator[Refusal]:
    if lost:
        yield Refusal(
            "log-overwritten",
            "a part of what the kernel said meanwhile is not known",
            "its log was overwritten before kmend had read it: something else fills it",
            "a larger log (log_buf_len= on the kernel's command line) keeps more",
        )
    for report in kmsg.reports(messages):
        yield Refusal(
            "kernel-complained",
            f"the kernel reported meanwhile: {report.headline}",
            f"in {report.where}" if report.where else "see the kernel log",
            "look at dmesg; if it is the patch, take it back",
        )
    if book.trouble:
        yield Refusal(
            "journal-unwritable",
            "what was done could not be written down",
            book.trouble,
            "free space or mend the folder: without the journal a killed kmend leaves no trace",
        )


def _is_still(row: journal.Record) -> bool:
    """Whether the file that a load named has the contents that it had."""
    try:
        data = read_regular(str(row.detail.get("file", "")), MOST)
    except OSError:
        return False
    return hashlib.sha256(data).hexdigest() == row.detail.get("sha256")
