"""What loading a livepatch would do on this machine, told before it is done.

    checks of a load -> the machine as a model -> klp_enable_patch() on it -> looks at all tasks -> forecast

The checks are those of :meth:`kmend.manager.Manager.load`; func stacks, nops, replaced patches, callbacks and
the kernel's answer come from running :mod:`kmend.klp` on a model built from what the running kernel shows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from kmend.core.config import Config
from kmend.core.errors import KmendError, Refusal
from kmend.core.kmsg import KernelMessage
from kmend.core.live import Cause, Check, LiveFunction, LiveObject, LivePatch, Phase, tasks
from kmend.core.plan import (
    Forecast,
    FuncStack,
    Inside,
    Leaves,
    Plan,
    PlannedCallback,
    StackEntry,
    Verdict,
)
from kmend.core.progress import Progress, Silent
from kmend.core.target import VMLINUX
from kmend.examine import Examined, examine
from kmend.klp import line as lines
from kmend.klp.core import klp_enable_patch
from kmend.klp.sched import advance, exit_to_user_mode, new_kernel_tasks, resume, seconds
from kmend.klp.structs import (
    HZ,
    PATCHED,
    UNPATCHED,
    Callbacks,
    Frame,
    Func,
    Function,
    Kernel,
    Kind,
    Module,
    ModuleState,
    Object,
    Patch,
    Sleep,
    Task,
    Wake,
)
from kmend.module.describe import KLP_SYMBOL, Description, FuncRow, ObjectFuncs, klp_symbols
from kmend.runtime import act, answers, blockers, probes
from kmend.runtime.follow import Patience
from kmend.runtime.frames import Seeker
from kmend.runtime.inside import Looks, looks
from kmend.runtime.place import Place, optional
from kmend.runtime.preflight import ModuleFile
from kmend.runtime.symbols import RunningSymbol, SymbolTable

#: So many looks at all tasks unless asked for another number.
SAMPLES = 5
#: A transition that has not ended on the model after so many seconds is not known to end.
HORIZON = 60.0
#: `kmend load` interrupts sleepers so many seconds after it began to follow.
WAKING = Patience().before_waking
#: How many tasks a sentence names.
_SHOWN = 3
#: Where the model lays the code that it makes itself: no kernel address is as low.
_OWN_TEXT = 0x10000
_RELEASE = re.compile(r"(\d+)\.(\d+)")


def plan(
    config: Config, progress: Progress, path: str, *, samples: int = SAMPLES, place: Place | None = None
) -> Plan:
    """Say what loading the module in the file ``path`` would do. Nothing is changed.

    Raises:
        UsageError, Failed: the file cannot be read or is no livepatch module.
        Unable: this user cannot see what is needed, or the kernel cannot be live patched.
    """
    where = place or Place()
    act.require_power(where, "plan")
    examined = examine(config, progress, where, path)
    return Planner(where, progress, examined, samples).plan()


def objections(place: Place, examined: Examined) -> list[Check]:
    """What a plan finds beyond the checks that a load has made already; nothing is changed.

    `kmend load` asks for them, so that both refuse the same.
    """
    try:
        return Planner(place, Silent(), examined).foretell(examined.table or SymbolTable(place))[0]
    except KmendError as error:
        return [Check("model", None, error.what)]


@dataclass(slots=True)
class Planner:
    """Plans one load from what was examined."""

    place: Place
    progress: Progress
    examined: Examined
    samples: int = SAMPLES
    warnings: list[Refusal] = field(default_factory=list)

    def plan(self) -> Plan:
        """The plan.

        Raises:
            Unable: there is no ``/proc``.
        """
        module, seen = self.examined.module, self.examined.seen
        table = self.examined.table or SymbolTable(self.place)
        found, model = self.foretell(table)
        checks = (*self.examined.checks, *found)
        refused = tuple(row.refusal for row in checks if row.refusal is not None)
        out = Plan(
            module.name,
            module.path,
            module.sha256,
            seen.kernel,
            Verdict.REFUSED,
            module.replace,
            checks,
            refused,
            (),
        )
        if model is None:
            return replace(out, refused=(*refused, _unreadable(module.name)))
        self.progress.step(f"looking at all tasks {self.samples} times")
        forecast = self._forecast(model, table, model.number)
        verdict = Verdict.REFUSED if refused or model.number else Verdict.LOADS
        if verdict is Verdict.LOADS and forecast.woken is None and forecast.alone is None:
            verdict = Verdict.STALLS
        return replace(
            out,
            verdict=verdict,
            warnings=(*self.warnings, *_delays(module.name, forecast, verdict)),
            stacks=model.stacks(),
            replaced=model.replaced,
            nops=model.nops,
            callbacks=tuple(model.called),
            late=model.late,
            log=tuple(message.text for message in model.k.log[model.quiet :]),
            number=-model.number,
            forecast=forecast,
            model=model.k.line.name,
        )

    def foretell(self, table: SymbolTable) -> tuple[list[Check], Model | None]:
        """What a plan adds to the checks of a load without looking at tasks, and the model after its load.

        None: the module's descriptors cannot be read, and nothing can be foretold.
        """
        seen = self.examined.seen
        checks = list(self._resolved(table))
        if seen.patches:
            checks.append(
                Check("states", None, "the states of loaded patches are not shown: the kernel compares them")
            )
        objects = _objects(self.examined.description, self.examined.module)
        if objects is None:
            checks.append(Check("model", None, "the module's descriptors cannot be read"))
            return checks, None
        self.progress.step("running klp_enable_patch() on a model of this machine")
        model = Model.of(self.place, table, seen.patches, objects, self.examined)
        self.warnings += model.hooks.warnings
        number = model.enable()
        if not number:
            checks.append(Check("model", True, "klp_enable_patch() on the model of this machine accepts it"))
            return checks, model
        known = [row.refusal for row in (*self.examined.checks, *checks) if row.refusal is not None]
        for refusal in self._answer(-number, model, known):
            checks.append(Check("model", False, refusal.what, refusal))
        return checks, model

    def _answer(self, number: int, model: Model, known: Sequence[Refusal]) -> list[Refusal]:
        """The model's refusal, unless a check has told the same already."""
        messages = [KernelMessage(0.0, int(row.level), row.text) for row in model.k.log[model.quiet :]]
        found = answers.explain(f"{self.examined.module.name} would not be loaded", number, messages)
        # EBUSY has several causes; whoever looked first has named the right one
        return [] if known and (found.rule in {row.rule for row in known} or number == 16) else [found]

    def _resolved(self, table: SymbolTable) -> Iterator[Check]:
        """``klp_find_object_symbol()`` for the symbols of livepatch relocations, on the running kernel."""
        looked, late, bad = 0, set(), []
        for symbol in klp_symbols(self.examined.elf):
            parts = KLP_SYMBOL.match(symbol.name)
            if parts is None:
                continue  # the rules of kmend check say so
            owner, name, position = parts[1], parts[2], int(parts[3])
            if not _loaded(self.place, owner):
                late.add(owner)
                continue
            looked += 1
            count = len([row for row in table.named(name) if row.object == owner])
            if count < max(position, 1) or (count > 1 and not position):
                bad.append(
                    Refusal(
                        "klp-symbol",
                        f"{name} at position {position} of {owner} is not in the running kernel",
                        f"it has {count} of that name",
                        "build the patch anew for this kernel",
                    )
                )
        for refusal in bad:
            yield Check("symbols", False, refusal.what, refusal)
        if not bad:
            text = f"{looked} that the module's code refers to are in the running kernel's kallsyms"
            yield Check("symbols", True, text + (f"; not loaded: {', '.join(sorted(late))}" if late else ""))

    def _forecast(self, model: Model, table: SymbolTable, number: int) -> Forecast:
        seeker, patch = model.seeker(table)
        found = looks(self.place, seeker, patch, self.samples)
        if found.busy:
            shown = ", ".join(f"{tid} ({name})" for tid, name in found.busy[:_SHOWN])
            self.warnings.append(
                Refusal(
                    "thread-running",
                    f"kernel threads that ran on a processor at every look: {shown}",
                    "the stack of a running task is not shown, and the kernel cannot switch it",
                    "if they never sleep the transition does not end: kmend load takes the patch back then",
                )
            )
        if number:
            return Forecast(found.looks, found.inside, None, None, "it would not be loaded")
        cpus = os.cpu_count() or 1
        alone = model.ends(found.inside, cpus, wake=False)
        woken = model.ends(found.inside, cpus, wake=True)
        # a task that is inside at a share p of all moments is met outside after 1/(1-p) retries on average
        share = max(
            (row.seen / self.samples for row in found.inside if row.leaves is Leaves.ITSELF), default=0.0
        )
        wait = 1 / (1 - min(share, 0.95)) if share else 0.0
        return Forecast(
            found.looks,
            found.inside,
            None if alone is None else max(alone, wait),
            None if woken is None else max(woken, wait),
            _why(found, woken, self.samples),
            tuple(
                dict.fromkeys(row.blocker.remedy for row in found.inside if row.leaves is not Leaves.ITSELF)
            ),
        )


# -- the model ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Model:
    """The machine as :mod:`kmend.klp` has it, and the patch that is to come.

    ``quiet`` is the length of the log before the load. The transition is held open by a task of the model
    until :meth:`stacks` has seen the stacks in it.
    """

    k: Kernel
    patch: Patch
    patches: tuple[LivePatch, ...]
    hooks: probes.Hooks
    late: tuple[str, ...]
    positions: dict[int, int]
    build: Callable[[], Model]
    called: list[PlannedCallback] = field(default_factory=list)
    replaced: tuple[str, ...] = ()
    nops: tuple[tuple[str, str], ...] = ()
    quiet: int = 0
    number: int = 0
    before: dict[int, tuple[StackEntry, ...]] = field(default_factory=dict)
    during: dict[int, tuple[StackEntry, ...]] = field(default_factory=dict)
    after: dict[int, tuple[StackEntry, ...]] = field(default_factory=dict)
    old: dict[int, Function] = field(default_factory=dict)
    objects: tuple[LiveObject, ...] = ()

    @classmethod
    def of(
        cls,
        place: Place,
        table: SymbolTable,
        patches: Sequence[LivePatch],
        objects: tuple[ObjectFuncs, ...],
        examined: Examined,
    ) -> Model:
        """The machine with its patches, the new one not loaded yet."""
        functions = [(obj.name, func.old_name, func.sympos) for obj in objects for func in obj.funcs]
        entries = probes.entries(table, functions, patches)
        hooks = probes.look(place, entries, table)
        kernel = examined.seen.kernel
        match = _RELEASE.match(kernel.release)
        version = (int(match[1]), int(match[2])) if match else (6, 1)
        named = {obj.name for obj in objects} | {obj.name for row in patches for obj in row.objects}
        loaded = {name for name in named if _loaded(place, name)}
        symbols = _symbols(table, functions, patches, loaded)

        def build() -> Model:
            k = Kernel(lines.line(*version), ftrace_enabled=kernel.ftrace_enabled is not False)
            k.next_text = _OWN_TEXT
            positions = _fill(k, symbols, loaded, hooks)
            _enable_all(k, patches)
            k.ipmodify |= hooks.excluded
            model = cls(
                k,
                Patch(Module(examined.module.name, livepatch=True), []),
                tuple(patches),
                hooks,
                tuple(sorted({obj.name for obj in objects} - loaded)),
                positions,
                build,
            )
            model.patch.replace = bool(examined.module.replace)
            model.patch.objs = [model._object(obj) for obj in objects]
            return model

        return build()

    def _object(self, obj: ObjectFuncs) -> Object:
        funcs = [
            Func(row.old_name, self.k.text(row.new_func, self.patch.name), row.sympos) for row in obj.funcs
        ]
        names = {kind.value: name for kind, name in obj.callbacks}

        def say(kind: str, when: str) -> Callable[[Kernel, Object], None] | None:
            if kind not in names:
                return None
            return lambda _k, _obj: self.called.append(PlannedCallback(kind, obj.name, names[kind], when))

        pre = say("pre_patch", "before its functions are redirected; an error ends the load")

        def pre_patch(k: Kernel, model_obj: Object) -> int:
            if pre is not None:
                pre(k, model_obj)
            return 0

        return Object(
            None if obj.name == VMLINUX else obj.name,
            funcs,
            Callbacks(pre_patch if pre else None, say("post_patch", "when all tasks have switched")),
        )

    def enable(self) -> int:
        """``klp_enable_patch()``, and the transition to its end: 0 or a negative errno."""
        self.before = self._now()
        self.quiet = len(self.k.log)
        holder = Task(0, "holder", Kind.KTHREAD, cpu=1)
        self.k.tasks.append(holder)
        older = [row.name for row in self.k.klp_patches]
        self.number = klp_enable_patch(self.k, self.patch)
        self.during = self._now()
        self.objects = tuple(
            LiveObject(
                obj.name or VMLINUX,
                True,
                tuple(LiveFunction(func.old_name, max(func.old_sympos, 1)) for func in obj.funcs),
            )
            for obj in self.patch.objs
            if obj.patched
        )
        self.nops = tuple(
            (obj.name or VMLINUX, func.old_name) for obj in self.patch.objs for func in obj.funcs if func.nop
        )
        self.k.tasks.remove(holder)
        if not self.number:
            advance(self.k, seconds(2))
        self.after = self._now()
        left = {row.name for row in self.k.klp_patches}
        self.replaced = tuple(name for name in older if name not in left)
        return self.number

    def _now(self) -> dict[int, tuple[StackEntry, ...]]:
        self.old.update({address: ops.old_func for address, ops in self.k.klp_ops.items()})
        return {
            address: tuple(
                StackEntry(func.patch.name if func.patch else "", func.nop) for func in ops.func_stack
            )
            for address, ops in self.k.klp_ops.items()
        }

    def stacks(self) -> tuple[FuncStack, ...]:
        """Every func stack that there is before, during or after."""
        return tuple(
            FuncStack(
                old.module or VMLINUX,
                old.name,
                self.positions.get(address, 1),
                self.before.get(address, ()),
                self.during.get(address, ()),
                self.after.get(address, ()),
            )
            for address, old in sorted(self.old.items(), key=lambda row: (row[1].module or "", row[1].name))
        )

    def seeker(self, table: SymbolTable) -> tuple[Seeker, LivePatch]:
        """What no stack may hold, and the patch as sysfs would show it in its transition."""
        order = len(self.patches) + 1
        wanted = self.objects or tuple(
            LiveObject(
                obj.name or VMLINUX,
                True,
                tuple(LiveFunction(f.old_name, max(f.old_sympos, 1)) for f in obj.funcs),
            )
            for obj in self.patch.objs
            if (obj.name or VMLINUX) not in self.late
        )
        patch = LivePatch(self.patch.name, Phase.PATCHING, self.patch.replace, order, False, wanted, None)
        rows = blockers.watched(patch, self.patches)
        shown, changing = [], set()
        positions = [f.sympos for obj in wanted for f in obj.functions]
        for row, sympos in zip(rows, positions, strict=True):
            if row.code == row.object:
                same = [one for one in table.named(row.name) if one.object == row.object]
                name = probes.shown_name(table, same[sympos - 1]) if sympos <= len(same) else row.name
                row = replace(row, name=name)  # noqa: PLW2901 - the same row by its printed name
            changing.add((row.code, row.name))
            shown.append(row)
        foreign = {
            other.name: frozenset(
                f.name for obj in other.objects for f in obj.functions if (other.name, f.name) not in changing
            )
            for other in self.patches
            if any(row.code == other.name for row in rows)
        }
        return Seeker(tuple(shown), foreign), patch

    def ends(self, inside: Sequence[Inside], cpus: int, *, wake: bool) -> float | None:
        """Seconds until the transition ends on a fresh model with these tasks; None: not within the horizon.

        A task that only an event brings out stays where it is. With ``wake`` those that an interruption
        brings out get it after :data:`WAKING` seconds.
        """
        model = self.build()
        k = model.k
        new_kernel_tasks(k, cpus)
        sleepers = []
        for row in inside:
            if row.leaves is Leaves.ITSELF:
                continue
            task = Task(row.blocker.task.tid, row.blocker.task.name)
            # the kernel's own signals never free a task in io_uring_enter()
            signal = row.leaves is Leaves.SIGNAL and (wake or row.blocker.cause is not Cause.IO_URING)
            task.kind = Kind.KTHREAD if row.blocker.task.kthread else Kind.USER
            task.sleep = Sleep.INTERRUPTIBLE if signal else Sleep.UNINTERRUPTIBLE
            task.wake = Wake.RETURN if signal else Wake.STAY
            task.stack = [model.frame(row)]
            k.tasks.append(task)
            sleepers += [task] if signal else []
        if klp_enable_patch(k, model.patch):
            return None

        def over() -> bool:
            return k.klp_transition_patch is None

        if not advance(k, seconds(WAKING), over) and wake:
            for task in sleepers:
                task.stack.clear()
                resume(task)
                exit_to_user_mode(k, task)
        return k.jiffies / HZ if over() or advance(k, seconds(HORIZON), over) else None

    def frame(self, row: Inside) -> Frame:
        """The code that the task is in, as the model has it: what the function's top of stack runs now."""
        name, owner = row.blocker.function, row.blocker.object
        for obj in self.patch.objs:
            for func in obj.funcs:
                if not obj.loaded and (obj.name or VMLINUX) in self.late:
                    continue
                old = self._old(obj, func)
                if old is None:
                    continue
                ops = self.k.klp_ops.get(old.addr)
                code = (ops.func_stack[0].new_func if ops else None) or old
                if (obj.name or VMLINUX, func.old_name) == (owner, name) or (code.module or VMLINUX) == owner:
                    return Frame(old, code)
        # known by an alias, or in a function that a nop takes back: the first that changes stands for it
        first = next(iter(self._changing()), None)
        old = first or self.k.text(name, None)
        ops = self.k.klp_ops.get(old.addr)
        return Frame(old, (ops.func_stack[0].new_func if ops else None) or old)

    def _old(self, obj: Object, func: Func) -> Function | None:
        same = [one for one in self.k.kallsyms.get(obj.name, ()) if one.name == func.old_name]
        at = max(func.old_sympos, 1) - 1
        return same[at] if at < len(same) else None

    def _changing(self) -> Iterator[Function]:
        for obj in self.patch.objs:
            for func in obj.funcs:
                old = self._old(obj, func)
                if old is not None:
                    yield old
        if self.patch.replace:
            for ops in self.k.klp_ops.values():
                yield ops.old_func


Symbols = dict[str, dict[str, tuple[RunningSymbol, ...]]]


def _symbols(
    table: SymbolTable,
    functions: Sequence[tuple[str, str, int]],
    patches: Sequence[LivePatch],
    loaded: set[str],
) -> Symbols:
    """The running kernel's symbols of every name that a patch names, by object."""
    names = {(owner, name) for owner, name, _ in functions}
    names |= {(obj.name, one.name) for row in patches for obj in row.objects for one in obj.functions}
    out: Symbols = {owner: {} for owner in loaded}
    for owner, name in sorted(names):
        if owner in loaded:
            out[owner][name] = tuple(row for row in table.named(name) if row.object == owner)
    return out


def _fill(k: Kernel, symbols: Symbols, loaded: set[str], hooks: probes.Hooks) -> dict[int, int]:
    """The model's ``kallsyms`` and modules; returns the position of each address among its namesakes."""
    positions = {}
    for owner, names in symbols.items():
        rows = []
        for name, found in names.items():
            for at, row in enumerate(found, 1):
                positions[row.address] = at
                module = None if owner == VMLINUX else owner
                # a frame of the model is one byte into its function
                rows.append(Function(name, module, row.address, 2, row.address not in hooks.entryless))
        k.kallsyms[None if owner == VMLINUX else owner] = rows
    for name in loaded - {VMLINUX}:
        k.modules[name] = Module(name, state=ModuleState.LIVE, klp_alive=True)
    return positions


def _enable_all(k: Kernel, patches: Sequence[LivePatch]) -> None:
    """Bring the patches that are there into force on the model, from the bottom of the stack to the top.

    What they replaced is gone already, so each is enabled as one that replaces nothing.
    """
    was, k.ftrace_enabled = k.ftrace_enabled, True
    made = []
    for row in patches:
        if row.phase is Phase.DISABLED:
            continue
        objs = [
            Object(
                None if obj.name == VMLINUX else obj.name,
                [Func(f.name, k.text(f.name, row.name), f.sympos) for f in obj.functions],
            )
            for obj in row.objects
        ]
        patch = Patch(Module(row.name, livepatch=True), objs)
        if klp_enable_patch(k, patch) == 0:
            made.append((row, patch))
    k.ftrace_enabled = was
    for row, patch in made:
        patch.replace = bool(row.replace)
        if row.phase.moving:
            k.klp_transition_patch = patch
            k.klp_target_state = PATCHED if row.phase is Phase.PATCHING else UNPATCHED
            for obj in patch.objs:
                for func in obj.funcs:
                    func.transition = True


def _objects(description: Description, module: ModuleFile) -> tuple[ObjectFuncs, ...] | None:
    """The module's objects; from its build report (without callbacks) where its descriptors are not read."""
    if description.objects is not None or module.wanted is None:
        return description.objects
    names = dict.fromkeys(row.object for row in module.wanted)
    return tuple(
        ObjectFuncs(
            name,
            tuple(FuncRow(row.name, row.sympos, row.name) for row in module.wanted if row.object == name),
        )
        for name in names
    )


def _loaded(place: Place, name: str) -> bool:
    return name == VMLINUX or optional(place.module(name) / "initstate") is not None


# -- words -------------------------------------------------------------------------------------------


def _unreadable(name: str) -> Refusal:
    """Without its descriptors no promise is made about a module."""
    return Refusal(
        "unreadable-descriptors",
        f"what {name} replaces cannot be read",
        "they are made by code, or this kernel shows no BTF and its target is not in the cache",
        "kmend kernel fetch, or load it without a plan: kmend load",
    )


def _why(found: Looks, woken: float | None, number: int) -> str:
    still = [row for row in found.inside if row.leaves is not Leaves.ITSELF]
    come_and_go = len(found.inside) - len(still)
    passing = f"; {tasks(come_and_go)} seen to come and go" if come_and_go else ""
    if not still:
        return f"no task stays inside of a function that changes (looked {number} times){passing}"
    never = [row for row in still if row.leaves is not Leaves.SIGNAL]
    if never:
        names = _names(never)
        return f"{tasks(len(never))} inside that no interruption brings out: {names}{passing}"
    when = "" if woken is None else "; an interruption brings them out"
    return f"{tasks(len(still))} asleep inside: {_names(still)}{when}{passing}"


def _names(rows: Sequence[Inside]) -> str:
    shown = [f"{row.blocker.task.tid} ({row.blocker.task.name})" for row in rows[:_SHOWN]]
    more = len(rows) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _delays(name: str, forecast: Forecast, verdict: Verdict) -> Iterator[Refusal]:
    """What may hold the transition up, as a warning; when it would not end, as its reason."""
    held = [row for row in forecast.inside if row.leaves in (Leaves.EVENT, Leaves.NEVER)]
    if verdict is Verdict.STALLS:
        lines_ = [f"{row.blocker.task.tid} ({row.blocker.task.name}) {row.blocker.why}" for row in held]
        yield Refusal(
            "transition-would-stall",
            f"the transition of {name} is not seen to end: {tasks(len(held))} inside functions that change",
            "\n".join(lines_[:8]) or "the model's transition does not end",
            "; ".join(dict.fromkeys(row.blocker.remedy for row in held)) or "kmend load --wait SECONDS",
        )
