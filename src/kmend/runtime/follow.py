"""Following a transition to its end: count what is left, and wake what sleeps in the wrong place.

The kernel retries about once a second (``klp_try_complete_transition()``), and after 15 retries interrupts
what is left. Doing the same by hand right away brings a transition to its end at the next retry.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kmend.core import live
from kmend.core.live import (
    Blocker,
    Cause,
    End,
    Followed,
    Phase,
    Sample,
    Step,
    Transition,
)
from kmend.core.progress import Progress
from kmend.runtime import blockers, tasks
from kmend.runtime.blockers import Explainer
from kmend.runtime.klog import Bell
from kmend.runtime.patches import read_patch, read_patches
from kmend.runtime.place import Place
from kmend.runtime.tasks import Sweep
from kmend.runtime.wake import Woken, interrupt

#: Seconds between two looks at the patch's own files: two small reads.
_TICK = 0.02
#: The same while the kernel is silent, where its log can be listened to: it tells there of every end, and
#: while it works on one (it changes thousands of places in its code) it needs the processor more. What it
#: says comes true a moment later: the looks are close together for :data:`_ALERT` seconds.
_REST = 1.0
_ALERT = 1.0
#: Seconds between two looks at all tasks, at least; never more than a fifth of the time is spent looking.
_SWEEP = 0.2
#: Seconds before a task that was interrupted is interrupted again: the kernel's own retry comes first.
_AGAIN = 1.5
#: Seconds that a task must be left without a patched function seen on its stack before it is woken too.
_UNEXPLAINED = 3.0
#: Seconds between two retries of the kernel's: what is there after one does not go by itself at once.
_RETRY = 1.0
#: Seconds between two looks at all tasks when the last one found none left. Tasks that have switched stay so,
#: and what they fork has; the kernel's next retry, 1.75 s later at most, and what it does then, come first.
#: What a look has missed (a thread whose neighbour ends while they are listed) is seen at the next one.
_SETTLED = 2.5
#: What a task may be in for a moment without being held up.
_PASSING = (Cause.RUNNING, Cause.KTHREAD_RUNNING, Cause.ENDED, Cause.UNRELIABLE, Cause.UNKNOWN)
#: Looks that have found nothing new are kept about so many times in each doubling of the time.
_KEPT = 110.0
#: So many tasks are read, and then woken, at a time; the first of them are what is told.
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds, and what may be done meanwhile.

    ``limit``: until the transition counts as stalled; ``finishing``: until it does when every task has
    switched, and the kernel alone is to be waited for. It then synchronises all processors and, for
    unpatching, waits for a grace period of RCU-tasks for each function (29 functions took 5.3 s); turning it
    round would only wait for the same. ``before_waking``: how long tasks get to leave by themselves;
    not longer, as the kernel's first retry comes a second after it began, and finds what sleeps still there.
    ``wake``: whether tasks may be interrupted at all; ``io_uring``: also those in an ``io_uring_enter()``
    that cannot be restarted unseen: it then returns EINTR, or that it has submitted and not waited.
    """

    limit: float = 60.0
    finishing: float = 300.0
    before_waking: float = 0.05
    wake: bool = True
    io_uring: bool = False


@dataclass(slots=True)
class Follower:
    """Follows one patch's transition towards ``goal`` (PATCHING or UNPATCHING)."""

    place: Place
    name: str
    goal: Phase
    patience: Patience
    progress: Progress
    wake: Callable[[list[int]], Woken] = interrupt
    clock: Callable[[], float] = time.monotonic
    #: waits so many seconds, or until the kernel speaks of livepatching; whether it has. None: its log's bell
    wait: Callable[[float], bool] | None = None
    #: told of each step when it is done, so that whoever watches can see it
    told: Callable[[Step], None] | None = None
    samples: list[Sample] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    woken: dict[int, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    _began: float = 0.0
    _first_seen: dict[int, float] = field(default_factory=dict)
    _explainer: Explainer | None = None
    _first: Transition | None = None
    _last: Transition | None = None
    _said: str = ""
    _waits_for: set[Cause] = field(default_factory=set)

    def run(self) -> Followed:
        """Follow it to its end, or to the limit. Nothing is undone when the limit is reached."""
        with Bell(self.place) as bell:
            return self._run(self.wait or bell.wait)

    def _run(self, wait: Callable[[float], bool]) -> Followed:
        self._began = self.clock()
        # the sooner what sleeps is woken, the sooner the kernel's next retry finds nothing in its way
        next_look = self._began + min(_SWEEP, self.patience.before_waking)
        deadline, extended = self._began + self.patience.limit, False
        next_count = min(next_look, deadline)
        spoken = -math.inf
        self.progress.step(f"{self.goal.value} {self.name}: waiting for tasks to switch")
        while True:
            end = self._end()
            now = self.clock()
            if end is not None:
                return self._followed(end, now)
            self._prepare()  # before the first look, while tasks get their time to leave by themselves
            if now >= next_count:
                over = now >= deadline
                seen = self._count()
                counted = self.clock()
                pause = _SWEEP if seen is None or seen.pending else _SETTLED
                next_count = counted + max(pause, 4 * (counted - now))
                if seen is not None and seen.pending and (over or now >= next_look):
                    knew = self._knows_aliases()
                    # at the limit: what holds it up now is what the user is told
                    woken = self._look(seen, over)
                    # reading all symbols comes once
                    took = self.clock() - counted if knew is self._knows_aliases() else 0.0
                    next_look = self.clock() + max(_SWEEP, 4 * took)
                    if over and woken and not extended:  # the kernel finds that out at its next retry
                        deadline, extended, over = self.clock() + _AGAIN, True, False
                if over and (self._last is not None or self._seconds() >= self._longest()):
                    return self._followed(End.STALLED, self.clock())
                next_count = min(next_count, self._began + self._longest() if over else deadline)
            alert = self.clock() - spoken < _ALERT
            if wait(_TICK if alert else min(_REST, max(_TICK, next_count - self.clock()))):
                spoken = self.clock()

    def _knows_aliases(self) -> bool:
        return self._explainer is not None and self._explainer.knows_aliases

    def _longest(self) -> float:
        """The limit when no task is left; without a look at the tasks (old kernels) there is only one."""
        seen = bool(self.samples)
        return max(self.patience.limit, self.patience.finishing) if seen else self.patience.limit

    def _seconds(self) -> float:
        return self.clock() - self._began

    def _followed(self, end: End, now: float) -> Followed:
        return Followed(
            end=end,
            seconds=now - self._began,
            samples=tuple(self.samples),
            steps=tuple(self.steps),
            woken=tuple(self.woken),
            first=self._first,
            last=self._last,
            goal=self.goal,
        )

    def _end(self) -> End | None:
        """Whether it is over, by the patch's own two files."""
        patch = read_patch(self.place, self.name, objects=False)
        if patch is None:
            return End.COMPLETE if self.goal is Phase.UNPATCHING else End.GONE
        if patch.phase is self.goal:
            return None
        match patch.phase:
            case Phase.PATCHING | Phase.UNPATCHING:
                return End.REVERSED
            case Phase.ENABLED:
                return End.COMPLETE if self.goal is Phase.PATCHING else End.REVERSED
            case Phase.DISABLED | Phase.COMING | Phase.LEFT:
                return End.COMPLETE if self.goal is Phase.UNPATCHING else End.GONE

    def _prepare(self) -> None:
        """Read, once, what the patch changes, on kernels that show which tasks are left."""
        if self._explainer is None and tasks.supported(self.place):
            patches = read_patches(self.place)
            patch = next((row for row in patches if row.name == self.name), None)
            self._explainer = Explainer.of(self.place, patch, patches) if patch is not None else None

    def _count(self) -> Sweep | None:
        """Count the tasks that are left; None: this kernel does not show which, or the patch has gone."""
        if self._explainer is None:
            return None
        seen = tasks.sweep(self.place, self._target())
        at, left = round(self._seconds(), 3), len(seen.pending)
        former = self.samples[-1] if self.samples else None
        # of a day's waiting not every look is kept
        if former is None or former.left != left or at - former.seconds >= at / _KEPT:
            self.samples.append(Sample(at, left, seen.tasks))
        self.progress.amount(seen.tasks - left, seen.tasks)
        if not seen.pending:
            self._last = None
        return seen

    def _target(self) -> int:
        return blockers.UNPATCHED if self.goal is Phase.UNPATCHING else blockers.PATCHED

    def _look(self, seen: Sweep, late: bool) -> bool:
        """Find out what each task waits for, wake what may be woken; whether one was for the first time."""
        assert self._explainer is not None
        now, before = self.clock(), len(self.woken)
        here = {tid for _, tid in seen.pending}
        self._first_seen = {tid: self._first_seen.get(tid, now) for tid in here}
        # Reading takes longest: a task that is about to be woken is read in brief, unless waking it has
        # failed before; at the limit, when what holds the transition up is told, all are read in full.
        waking = self.patience.wake and now >= self._began + self.patience.before_waking
        found: tuple[Blocker, ...] = ()
        undecided: list[tuple[int, int]] = []
        for at in range(0, len(seen.pending) if waking else _CHUNK, _CHUNK):
            rows = self._explained(seen.pending[at : at + _CHUNK], late, aliases=not waking)
            if waking:
                self._wake([row for row in rows if self._may_wake(row, now)], now)
                undecided += [(row.task.pid, row.task.tid) for row in rows if self._explainer.undecided(row)]
            found = found or rows
        if undecided:
            # reading all symbols may take longer than the kernel's next retry is away: those that are known
            # without them are on their way by now
            self._explainer.read_aliases()
            again = {row.task.tid: row for row in self._explained(undecided, late)}
            self._wake([row for row in again.values() if self._may_wake(row, now)], now)
            found = tuple(again.get(row.task.tid, row) for row in found)
        self._last = Transition(
            self.name, self.goal, self._target(), seen.tasks, len(seen.pending), found, seen.unreadable
        )
        self._first = self._first or self._last
        self._tell_what_it_waits_for(found, now)
        return len(self.woken) > before

    def _explained(
        self, pending: Sequence[tuple[int, int]], late: bool, *, aliases: bool = True
    ) -> tuple[Blocker, ...]:
        assert self._explainer is not None
        return blockers.explained(
            self.place,
            self._explainer,
            pending,
            lambda tid: not late and tid not in self.failed,
            aliases=aliases,
        )

    def _tell_what_it_waits_for(self, rows: Sequence[Blocker], now: float) -> None:
        """A step for each cause, once: what is left although everything that can be done about it is done."""
        held: dict[Cause, list[Blocker]] = {}
        for row in rows:
            long = _UNEXPLAINED if row.cause in _PASSING else _RETRY
            if not self._can_wake(row) and now - self._first_seen[row.task.tid] >= long:
                held.setdefault(row.cause, []).append(row)
        for cause in held.keys() - self._waits_for:
            self._waits_for.add(cause)
            first = held[cause][0]
            who = f"{first.task.tid} ({first.task.name}) {first.why}: {first.remedy}"
            self._step(f"waits for {live.tasks(len(held[cause]))}: {who}")

    def _can_wake(self, row: Blocker) -> bool:
        """Whether interrupting it is worth a try."""
        if not self.patience.wake or row.task.tid in self.failed:
            return False
        return row.cause is Cause.IN_FUNCTION or (
            row.cause is Cause.IO_URING and (row.wakeable or self.patience.io_uring)
        )

    def _may_wake(self, row: Blocker, now: float) -> bool:
        tid = row.task.tid
        if now - self.woken.get(tid, now - _AGAIN) < _AGAIN:
            return False
        match row.cause:
            case Cause.IN_FUNCTION:
                return True
            case Cause.IO_URING:
                return self._can_wake(row)
            case Cause.UNRELIABLE | Cause.UNKNOWN:
                return row.task.state == "S" and now - self._first_seen.get(tid, now) >= _UNEXPLAINED
            case _:
                return False

    def _wake(self, rows: list[Blocker], now: float) -> None:
        if not rows:
            return
        first = rows[0]
        functions = list(dict.fromkeys(row.function for row in rows if row.function))
        more = f" and {len(functions) - 1} more" if len(functions) > 1 else ""
        where = f" in {functions[0]}(){more}" if functions else ""
        names = f"{first.task.tid} ({first.task.name})" + (
            f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        )
        text = f"interrupted {live.tasks(len(rows))} that slept{where}: {names}"
        woken = self.wake([row.task.tid for row in rows])
        for row in rows:
            self.woken[row.task.tid] = now
        if woken.restarted:
            number = len(woken.restarted)
            text += f"; {number} system call{'s' if number > 1 else ''} begun anew"
        if woken.failed:
            text += f"; {len(woken.failed)} could not be: {next(iter(woken.failed.values()))}"
        self.failed.update(woken.failed)
        if text != self._said:
            self._said = text
            self._step(text, [row.task.tid for row in rows])

    def _step(self, text: str, tids: Sequence[int] = ()) -> None:
        """``tids``: those that were interrupted."""
        self.steps.append(Step(round(self._seconds(), 3), text, tuple(tids)))
        if self.told is not None:
            self.told(self.steps[-1])
        self.progress.step(f"{self.goal.value} {self.name}: {text}")
