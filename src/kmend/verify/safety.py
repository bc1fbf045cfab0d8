"""What a human should know, or decide, before the replaced functions meet a running kernel.

The other rules say whether the module is right; these say what it does to the machine: whether the
transition can end, who calls a function whose prototype changed, which locks are taken in another order,
and who watches the functions that are replaced. See docs/safety.md.

Whether a transition ends is a matter of stacks: ``klp_check_stack()`` (kernel/livepatch/transition.c)
switches a task when none of the replaced functions is on its stack. So it is the *original* function that
matters when a patch is loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

from kmend.core.errors import Refusal
from kmend.diff.select import Changed, Selection, is_init
from kmend.diff.special import SpecialSections
from kmend.diff.unit import UnitObject, base_name
from kmend.verify import signatures
from kmend.verify.callgraph import CallGraph, Route
from kmend.verify.flow import RETURN, START, Flow
from kmend.verify.hooks import who_hooks
from kmend.verify.types import Prototype, Types

#: What starts a kernel thread with a function of the caller's choice. (include/linux/kthread.h,
#: include/linux/sched/task.h; svc_create_pooled: include/linux/sunrpc/svc.h)
CREATORS = frozenset(
    {
        *("kthread_create_on_node", "kthread_create_on_cpu", "kernel_thread", "user_mode_thread"),
        *("create_io_thread", "vhost_task_create", "kthread_run_worker", "kthread_create_worker"),
        *("kthread_create_worker_on_cpu", "svc_create", "svc_create_pooled", "svc_set_num_threads"),
        *("__kthread_create_on_node", "kthread_run_on_cpu"),
    }
)
#: What the loop of a kernel thread asks, and other functions hardly do.
STOPS = frozenset(
    {
        *("kthread_should_stop", "kthread_should_park", "__kthread_should_park", "kthread_parkme"),
        *("kthread_freezable_should_stop", "kthread_should_stop_or_park", "__refrigerator"),
    }
)
#: Waits that end when somebody does something, however long that takes.
WAITS = frozenset(
    {
        *("schedule", "schedule_timeout", "schedule_timeout_interruptible", "schedule_timeout_killable"),
        *("schedule_timeout_uninterruptible", "schedule_timeout_idle", "schedule_preempt_disabled"),
        *("schedule_hrtimeout", "schedule_hrtimeout_range", "schedule_hrtimeout_range_clock"),
        *("freezable_schedule", "freezable_schedule_timeout", "kthread_parkme", "__refrigerator"),
        *("wait_for_completion", "wait_for_completion_interruptible", "wait_for_completion_killable"),
        *("wait_for_completion_state", "wait_woken", "do_wait", "kernel_wait", "kernel_wait4"),
        *("do_wait_intr", "do_wait_intr_irq", "futex_wait", "futex_wait_queue", "futex_wait_requeue_pi"),
        *("hrtimer_nanosleep", "sk_wait_data", "sk_stream_wait_memory", "sk_stream_wait_connect"),
        *("__skb_wait_for_more_packets", "__skb_recv_datagram", "skb_recv_datagram", "inet_csk_accept"),
        *("inet_stream_connect", "sock_recvmsg", "kernel_recvmsg", "kernel_accept", "svc_recv"),
        *("locks_lock_inode_wait", "__rpc_wait_for_completion_task", "pipe_wait_readable"),
        *("pipe_wait_writable", "wait_for_unix_gc", "percpu_ref_switch_to_atomic_sync", "do_sigtimedwait"),
        *("poll_schedule_timeout", "rpc_wait_bit_killable", "kthread_worker_fn"),
    }
)
#: Waits with a limit: they make a kernel thread's loop one, and say nothing about other functions.
_PAUSES = frozenset(
    {
        *("msleep", "msleep_interruptible", "usleep_range_state", "io_schedule", "io_schedule_timeout"),
        *("wait_for_completion_timeout", "wait_for_completion_interruptible_timeout", "ssleep"),
        *("wait_for_completion_killable_timeout", "prepare_to_wait", "prepare_to_wait_event"),
        *("prepare_to_wait_exclusive", "prepare_to_swait_event", "freezing_slow_path"),
    }
)
_LOOPS = WAITS | STOPS | _PAUSES

_NOT_LOCKS = re.compile(
    r"__SCT__|__traceiter|.*trace_|.*lockdep|.*_locked(_|$)|.*print|.*lock_(?:init|destroy|cache|set_|class)"
    r"|.*_(?:init|destroy|set)_.*lock|.*lock_\w*(?:subclass|cache)$"
)
_LOCK = re.compile(
    r"(?:.*_)?(?:un|try)?lock(?:_.*)?$|(?:__)?(?:down|up)(?:_(?:read|write|killable|interruptible|trylock|"
    r"timeout).*)?$|(?:__)?downgrade_write$|percpu_(?:down|up)_.*|release_sock$|(?:.*_)?(?:un)?lock$"
)
_REFERENCE = re.compile(
    r"refcount_\w+|lockref_\w+|percpu_ref_\w+|[gp]et_device|fput|__fput_sync|fget\w*|__fget_light|__fdget\w*"
    r"|dput|dget_parent|iput|igrab|ihold|mnt(?:put|get)|path_(?:put|get)|(?:module_put|try_module_get|"
    r"__module_get)|put_pid|get_task_pid|get_pid_task|__put_task_struct|get_task_mm|mmput\w*|__mmdrop"
    r"|__put_cred|__put_net|sk_free|__sk_free|sock_gen_put|dst_release\w*|__folio_put|__put_page"
    r"|usb_(?:get|put)_\w+|put_disk|__pm_runtime_(?:resume|idle|suspend)|pm_runtime_get_if_\w+"
    r"|put_task_stack|try_get_task_stack|[a-z]\w*_put"
)
#: A function of this name takes a reference when there is one that gives it back.
_GET = re.compile(r"([a-z]\w*)_get")
_NOT_REFERENCES = re.compile(r"skb_put|nla_put|.*_skb_put|.*_nla_put|sg_\w+")
_FREE = frozenset(
    {
        *(
            "kfree",
            "kfree_sensitive",
            "kvfree",
            "vfree",
            "kmem_cache_free",
            "kfree_skb_reason",
            "consume_skb",
        ),
        *("__kfree_skb", "call_rcu", "kvfree_call_rcu", "kfree_const", "free_pages", "__free_pages"),
        *("free_netdev", "mempool_free"),
    }
)
#: How many names or steps a message lists.
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class ReviewUnit:
    """A unit of the build: what is selected of it, and its types in both objects.

    ``owner`` is ``vmlinux`` or a module's name. Without ``types`` they are read from the objects;
    objects without types (compiled without ``-gbtf``) have no prototypes to compare.
    """

    owner: str
    selection: Selection
    types: tuple[Types, Types] | None = None


@dataclass(frozen=True, slots=True)
class Review:
    """What was found. ``refusals`` may be allowed by a human (:mod:`kmend.verify.allow`)."""

    refusals: tuple[Refusal, ...] = ()
    warnings: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class Reached:
    """Who reaches a function in the kernel as it is, by name: by a direct call, or by its address."""

    calls: tuple[str, ...]
    holders: tuple[str, ...]


class Callers(Protocol):
    """Knows the whole kernel, not only the units of a build."""

    def outside(self, owner: str, name: str) -> Reached | None:
        """Who reaches a global function of the object ``owner``, from all of its units; None: not known."""


def review(
    units: Sequence[ReviewUnit],
    recompiled: Iterable[tuple[str, UnitObject]] = (),
    callers: Callers | None = None,
) -> Review:
    """Look at every function that a build replaces.

    ``recompiled`` are the original objects of all units that were compiled anew for the patch, with their
    owner, those that came out the same among them: what they call, they call rightly. ``callers`` is asked
    only about a function that others can call and whose prototype changed.

    Raises:
        Failed: as :func:`kmend.diff.compare.compare`, and ``bad-btf``.
    """
    known = _Known(tuple(recompiled) or tuple((u.owner, u.selection.diff.old) for u in units), callers)
    refusals: dict[Refusal, None] = {}
    warnings: dict[Refusal, None] = {}
    for unit in units:
        one = _Unit(unit, known)
        for row in unit.selection.changed:
            part = unit.selection.diff.old.parts[row.original]
            if is_init(unit.selection.diff.old.section_of(part)):
                continue  # refused already: it is gone
            refusals.update(dict.fromkeys(one.refusals(row)))
            warnings.update(dict.fromkeys(one.warnings(row)))
    return Review(tuple(refusals), tuple(warnings))


@dataclass(frozen=True, slots=True)
class _Known:
    """The original objects that were compiled anew, and whom to ask about the rest."""

    objects: tuple[tuple[str, UnitObject], ...]
    callers: Callers | None

    def others(self, owner: str, name: str) -> tuple[str, ...] | None:
        """Who reaches a global function and was not compiled anew; None: not known.

        A pointer to it counts wherever it is: who calls through it is not known.
        """
        found = self.callers.outside(owner, name) if self.callers is not None else None
        if found is None:
            return None
        ours = {n for o, unit in self.objects if o == owner for n in (*unit.parts, *unit.aliases)}
        return (*found.holders, *(who for who in found.calls if who not in ours))


class _Unit:
    """The findings of one unit."""

    def __init__(self, unit: ReviewUnit, known: _Known) -> None:
        self.unit, self.known = unit, known
        self.diff = unit.selection.diff
        self.old, self.new = CallGraph(self.diff.old), CallGraph(self.diff.new)
        self._types = unit.types
        self._leaving: set[str] = set()

    @property
    def types(self) -> tuple[Types, Types] | None:
        if self._types is None:
            before = Types.of(self.diff.old.elf, self.diff.old.name)
            after = Types.of(self.diff.new.elf, self.diff.new.name)
            self._types = (before, after) if before is not None and after is not None else None
        return self._types

    def refusals(self, row: Changed) -> Iterable[Refusal]:
        stays = self._never_leaves(row.original)
        if stays is not None:
            self._leaving.add(row.original)
            yield stays
        signature = self._signature(row)
        if signature is not None:
            yield signature

    def warnings(self, row: Changed) -> Iterable[Refusal]:
        if row.original not in self._leaving:
            yield from self._sleeps(row)
        yield from self._locks(row)
        yield from self._hooked(row)

    # -- stacks ----------------------------------------------------------------

    def _never_leaves(self, key: str) -> Refusal | None:
        """A function that stays on the stack of its thread for as long as that lives."""
        direct = {call.callee for call in self.old.calls(key) if not call.inside}
        if not (direct & _LOOPS or self.old.routes(key, WAITS)):
            return None
        name = self.diff.old.parts[key].name
        by = self._creator(key)
        if by is None and not direct & STOPS and not direct & WAITS:
            return None
        flow = Flow(self.old, self.diff.old_special, key)
        loops = [loop for loop in flow.loops() if self._waits_in(loop)]
        if not loops:
            return None
        if by is not None:
            why = f"it is the function of a kernel thread, started by {by}(), and loops until the thread ends"
        elif not flow.leaves():
            why = "it loops without end and never returns"
        elif any(self._until_stopped(key, loop) for loop in loops):
            why = "it loops until its kernel thread is told to stop (kthread_should_stop())"
        else:
            return None
        return Refusal(
            "never-leaves",
            name,
            f"{why}: that thread has it on its stack all the time and never becomes patched, so the "
            "transition would not end, and the thread would not run the new code",
            "move the change into a function that the loop calls; where the thread is not running, or can be "
            "stopped and started again (a module's, a mount's), allow it with --allow never-leaves",
        )

    def _waits_in(self, loop: frozenset[str]) -> bool:
        """Whether a loop waits, itself or in a function of the unit that it calls."""
        if loop & _LOOPS:
            return True
        parts = self.diff.old.parts
        return any(name in parts and self.old.routes(name, WAITS) for name in loop)

    def _until_stopped(self, key: str, loop: frozenset[str]) -> bool:
        """Whether a loop lasts as long as its thread, by what it asks.

        In a function below the thread's own one to ask is not enough: balance_pgdat() asks as well, to break
        off early, and comes back to kswapd(). It has to wait for something to do in that loop.
        """
        if not loop & {"kthread_should_stop", "kthread_freezable_should_stop"}:
            return False
        return self._thread_function(key) or (bool(loop & (WAITS - STOPS)) and self._below_thread(key))

    def _creator(self, key: str) -> str | None:
        """The function of the unit that starts a kernel thread with this one."""
        pointing = self.old.addresses.get(key, ())
        for name in pointing:
            user = self.diff.old.parts.get(name)
            if user is None or user.key not in self.old.functions:
                continue
            if not any(call.callee in CREATORS for call in self.old.calls(user.key)):
                continue
            handed = dict.fromkeys(self.old.pointed(user.key))
            if (key, "rdi") in handed or self._thread_function(key):
                return base_name(name)
        return None

    def _thread_function(self, key: str) -> bool:
        """Whether it has the prototype of a thread's function, ``int f(void *)``."""
        prototype = self._prototype(0, key)
        if prototype is None:
            return False
        return [p.type for p in prototype.parameters] == ["pointer"] and prototype.returns.type.startswith(
            "integer of 4"
        )

    def _below_thread(self, key: str) -> bool:
        """Whether only functions of kernel threads call it, and nobody has its address."""
        seen: set[str] = set()
        waiting = [key]
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            if at != key and self._thread_function(at):
                continue
            callers = self.old.callers.get(at, ())
            if not callers or not self.diff.old.parts[at].local or self.old.addresses.get(at):
                return False
            waiting += callers
        return True

    def _sleeps(self, row: Changed) -> Iterable[Refusal]:
        """Warn of a function that may be on a sleeping task's stack for long."""
        routes = self.old.routes(row.original, WAITS)
        if not routes:
            return
        name = self.diff.old.parts[row.original].name
        thread = self._thread_function(row.original) and self._creator(row.original) is not None
        yield Refusal(
            "may-sleep",
            name,
            f"{_ways(routes)}; a task that waits there keeps the transition from ending until it is woken "
            "and leaves: the kernel signals those of user space after 15 s; a kernel thread"
            + (" (this is one's function)" if thread else "")
            + " or an uninterruptible wait ends when it ends",
            "nothing for short waits; if the transition does not end, `kmend blockers` names the tasks",
        )

    # -- prototypes --------------------------------------------------------------

    def _prototype(self, side: int, key: str) -> Prototype | None:
        types = self.types
        if types is None:
            return None
        unit = self.diff.new if side else self.diff.old
        part = unit.parts[key]
        aliases = [alias for alias, where in unit.aliases.items() if where == key]
        for name in (part.name, base_name(part.name), *aliases):
            if name in types[side].functions:
                return types[side].prototype(name)
        return None

    def _signature(self, row: Changed) -> Refusal | None:
        before, after = self._prototype(0, row.original), self._prototype(1, row.key)
        if before is None or after is None or before == after:
            return None
        what = signatures.changed(before, after)
        if what is None:
            return None
        part = self.diff.old.parts[row.original]
        holders = self.old.addresses.get(row.original, ())
        exported = not part.local and _exported(self.diff.old, part.name)
        if exported:
            who = "it is exported, and modules that are not part of the patch call it as it was"
        elif holders:
            who = f"its address is held by {_some(holders)}, and who calls it that way calls it as it was"
        elif not part.local:
            others = self.known.others(self.unit.owner, part.name)
            if others == ():
                return None
            who = (
                f"{_some(others)} reaches it and was not compiled anew"
                if others
                else "other files can call it, and they call it as it was"
            )
        else:
            return None
        return Refusal(
            "changed-signature",
            part.name,
            f"{what}; {who}",
            "keep the prototype and give the new code a function of another name; or, where every caller is "
            "known to be replaced too, allow it with --allow changed-signature",
        )

    @cached_property
    def _symbols(self) -> frozenset[str]:
        """All names of the two objects."""
        return frozenset(s.name for unit in (self.diff.old, self.diff.new) for s in unit.elf.symbols)

    # -- locks -------------------------------------------------------------------

    def _locks(self, row: Changed) -> Iterable[Refusal]:
        """Warn when locks, references or memory are taken or given up in another order."""
        sides = (
            (self.old, self.diff.old_special, row.original),
            (self.new, self.diff.new_special, row.key),
        )
        counts = [_tally(graph, key, self._symbols) for graph, _, key in sides]
        wanted = frozenset(counts[0] | counts[1])
        if wanted <= _FREE:
            return
        orders = [_order(Flow(graph, special, key), wanted) for graph, special, key in sides]
        if orders[0] == orders[1]:
            return
        locked = [_locked(graph, special, key) for graph, special, key in sides]
        calls = [
            f"{name}() is called at {_places(counts[1][name])} (was {counts[0][name]})"
            for name in sorted(wanted - _FREE)
            if counts[0][name] != counts[1][name]
        ]
        words = [
            *([_some(calls)] if calls else []),
            *_steps("possible now", orders[1] - orders[0]),
            *_steps("no longer possible", orders[0] - orders[1]),
        ]
        if locked[0] != locked[1]:
            words.append(f"it has {locked[1]} instructions with a LOCK prefix (had {locked[0]})")
        yield Refusal(
            "lock-change",
            self.diff.old.parts[row.original].name,
            "; ".join(words),
            "while the transition runs, some tasks take and give up in the old way and some in the new one: "
            "make sure that the two agree",
        )

    # -- tracers -------------------------------------------------------------------

    def _hooked(self, row: Changed) -> Iterable[Refusal]:
        part = self.diff.old.parts[row.original]
        names = [part.name, *(alias for alias, key in self.diff.old.aliases.items() if key == row.original)]
        who = next((found for name in names if (found := who_hooks(base_name(name))) is not None), None)
        if who is None:
            return
        direct = sorted(
            self.new.unit.parts[caller].name
            for caller in self.diff.changed
            if caller != row.key
            and caller in self.new.functions
            and any(call.inside and call.callee == row.key for call in self.new.calls(caller))
        )
        bypass = (
            f"; calls from {_some(direct)}, replaced as well, go straight to the new code and are not "
            "seen there"
            if direct
            else ""
        )
        yield Refusal(
            "commonly-hooked",
            part.name,
            f"tracers attach to it ({who}). Entry probes and BPF trampolines go on to fire; a kprobe with a "
            "post handler and the patch exclude each other (-EBUSY for the second), and a probe inside the "
            f"old code fires no more{bypass}",
            "before loading see /sys/kernel/tracing/enabled_functions and /sys/kernel/debug/kprobes/list; "
            "after it, attach to the function of the module too",
        )


def _exported(unit: UnitObject, name: str) -> bool:
    wanted = {f"__ksymtab_{name}", f"__export_symbol_{name}"}
    return any(symbol.name in wanted for symbol in unit.elf.symbols)


@lru_cache(maxsize=4096)
def _primitive(name: str) -> bool:
    """Whether a function takes or gives up a lock, a reference or memory."""
    if name in _FREE:
        return True
    if _NOT_LOCKS.match(name):
        return False
    if _LOCK.fullmatch(name):
        return True
    return bool(_REFERENCE.fullmatch(name)) and not _NOT_REFERENCES.fullmatch(name)


def _tally(graph: CallGraph, key: str, symbols: frozenset[str]) -> Counter[str]:
    names = (
        base_name(graph.unit.parts[call.callee].name) if call.inside else call.callee
        for call in graph.calls(key)
    )
    return Counter(
        name
        for name in names
        if _primitive(name) or ((match := _GET.fullmatch(name)) and f"{match[1]}_put" in symbols)
    )


def _locked(graph: CallGraph, special: SpecialSections, key: str) -> int:
    """How many instructions have a LOCK prefix: atomic_t, reference counts and bit operations alike."""
    return sum(len(special.entries(part.key, ".smp_locks")) for part in graph.pieces(key))


def _order(flow: Flow, wanted: frozenset[str]) -> frozenset[tuple[str, str]]:
    """Which lock or reference may come right after which; and what is freed next to which of them.

    Freeing alone is no order of anything: ``if (p) kfree(p)`` instead of ``kfree(p)`` changes nothing here.
    """
    held = wanted - _FREE
    beside = {
        (a, b)
        for a, b in (flow.order(wanted) if held != wanted else ())
        if (a in _FREE and b in held) or (b in _FREE and a in held)
    }
    return (flow.order(held) | beside) - {(START, RETURN)}


def _steps(title: str, pairs: Iterable[tuple[str, str]]) -> Iterable[str]:
    """Steps in words: ``possible now: return after mutex_lock()``; nothing when there are none."""
    words = []
    for before, after in sorted(pairs):
        first = "the return" if after == RETURN else f"{after}()"
        words.append(f"{first} as the first" if before == START else f"{first} right after {before}()")
    if words:
        yield f"{title}: {_some(words)}"


def _places(count: int) -> str:
    return "1 place" if count == 1 else f"{count} places"


def _ways(routes: Sequence[Route]) -> str:
    own = [route.callee for route in routes if not route.via]
    rest = [f"{route.callee}() by way of {' and '.join(route.via)}()" for route in routes if route.via]
    words = ([f"it waits in {_some([f'{name}()' for name in own])}"] if own else []) + (
        [f"it waits in {_some(rest)}"] if rest and not own else []
    )
    return words[0]


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
