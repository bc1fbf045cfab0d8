"""What the acting verbs refuse or give up, and why, in words."""

from __future__ import annotations

from kmend.core.errors import Refusal, UsageError
from kmend.core.live import Check, Followed, LivePatch, Phase, Transition, tasks
from kmend.runtime.observe import Seen

#: So many tasks are named before a transition is forced.
_NAMED = 20
#: What is left when every task has switched.
_IDLE = "(idle processors, or the kernel is finishing)"


def known(seen: Seen, name: str) -> LivePatch:
    """The patch, or what is left of it.

    Raises:
        UsageError: (rule ``unknown-patch``) there is none of that name.
    """
    patch = seen.named(name)
    if patch is None:
        there = ", ".join(row.name for row in (*seen.patches, *seen.left)) or "none at all"
        raise UsageError(
            f"the kernel has no livepatch {name}",
            why=f"loaded: {there}",
            next_step="kmend list",
            rule="unknown-patch",
        )
    return patch


def leftover(row: LivePatch) -> Check:
    """Whether what is left of a former patch of that name is in the way."""
    if row.phase is Phase.COMING:
        refusal = coming(row.name)
    elif not _unused(row):
        references = row.module.references if row.module is not None else None
        refusal = Refusal(
            "module-in-use",
            f"a former {row.name} is still loaded",
            f"its module has {references} references"
            + (
                f"; the forced transition of {row.pinned_by} keeps it until the next boot"
                if row.pinned_by
                else ""
            ),
            "build the patch with another name (-n)",
        )
    else:
        return Check(
            "leftover", True, f"an unused module of a former {row.name} is there: it is removed first"
        )
    return Check("leftover", False, refusal.what, refusal)


def pinned(row: LivePatch) -> Refusal:
    """Its module cannot be unloaded any more."""
    return Refusal(
        "module-in-use",
        f"{row.name} was not unloaded: the forced transition of {row.pinned_by} keeps its module",
        "tasks may still be in its code (klp_force_transition(), kernel/livepatch/transition.c)",
        "leave it until the next boot; it does nothing any more",
    )


def _unused(row: LivePatch) -> bool:
    return row.module is not None and row.module.references == 0


def coming(name: str) -> Refusal:
    """Its module is just being loaded."""
    return Refusal(
        "coming",
        f"{name} is being loaded",
        "its symbols are being looked up; it is not enabled yet",
        "wait a moment (kmend status)",
    )


def other_transition(moving: LivePatch, seen: Seen) -> Refusal:
    """Another patch is in a transition."""
    left = f"; {tasks(seen.transition.left)} left" if seen.transition is not None else ""
    return Refusal(
        "transition-running",
        f"{moving.name} is {moving.phase.value}{left}",
        "the kernel makes one transition at a time",
        "wait for its end (kmend status --watch), or turn that one round first",
    )


def no_transition(patch: LivePatch) -> Refusal:
    """It is in none."""
    return Refusal(
        "no-transition",
        f"{patch.name} is {patch.phase.value}, in no transition",
        "there is nothing to bring to an end",
        "kmend status",
    )


def not_confirmed(name: str, transition: Transition | None) -> Refusal:
    """What forcing would do, for who has not said that it is known."""
    left = transition.left if transition is not None else 0
    functions = sorted({row.function for row in transition.blockers if row.function} if transition else ())
    where = f", in {', '.join(f'{f}()' for f in functions)}" if functions else ""
    return Refusal(
        "not-confirmed",
        f"{name} was not forced: {tasks(left)} left{where}",
        "\n".join(held_by(transition))
        + "\nforcing lets these tasks go on in code that does not fit the data of the new one: if old and "
        "new code differ in locking or in what data means, the kernel may hang or corrupt data. The modules "
        "of the code that they are in can not be unloaded before the next boot",
        f"better: kmend unload {name}. If you know that it is harmless: kmend force {name} --yes-i-know",
    )


def held_by(transition: Transition | None) -> list[str]:
    """Which task waits in which function: a line for each of the first ones."""
    if transition is None:
        return ["which tasks is not known"]
    if not transition.left:
        return [f"no task of user space {_IDLE}"]
    shown = [f"{row.task.tid} ({row.task.name}) {row.why}" for row in transition.blockers[:_NAMED]]
    more = transition.left - len(shown)
    return [*shown, f"… and {more} more (kmend blockers)"] if more > 0 else shown


def left_words(found: Followed) -> str:
    """How many tasks were left, in words."""
    if found.last is None:
        return f"no task of user space left {_IDLE}"
    return f"{found.last.left} of {found.last.tasks} tasks left"


def stalled(name: str, goal: Phase, found: Followed) -> Refusal:
    """What held a transition up."""
    rows = found.last.blockers if found.last is not None else ()
    shown = [f"{row.task.tid} ({row.task.name}) {row.why}: {row.remedy}" for row in rows[:8]]
    if found.last is not None and found.last.left > len(shown):
        shown.append(f"… and {found.last.left - len(shown)} more")
    return Refusal(
        "transition-stalled",
        f"{goal.value} {name} did not end within {found.seconds:.0f} s: {left_words(found)}",
        "\n".join(shown) or "the kernel does not say what it waits for",
        "let these tasks go on and try again; --wait SECONDS or --on-stall wait gives it more time",
    )


def turned(name: str, goal: Phase) -> Refusal:
    """Somebody else turned it round."""
    kept = "is in force as before" if goal is Phase.UNPATCHING else "is not in force"
    return Refusal(
        "turned-round",
        f"somebody else turned the transition of {name} round: it {kept}",
        f"while kmend followed its {goal.value}, something wrote to /sys/kernel/livepatch/{name}/enabled",
        "find out who works on this kernel beside you, then run the command again",
    )


def turned_again(name: str, goal: Phase) -> Refusal:
    """Somebody else turned it round while it was on its way back."""
    return Refusal(
        "turned-round",
        f"while kmend took the stalled transition of {name} back, somebody turned it round again: "
        f"its {goal.value} goes on",
        f"something wrote to /sys/kernel/livepatch/{name}/enabled",
        "find out who works on this kernel beside you; kmend status --watch",
    )


def taken_away(name: str) -> Refusal:
    """Somebody else took the patch back."""
    return Refusal(
        "taken-away",
        f"somebody else took {name} back while kmend followed it: it is not in force",
        f"/sys/kernel/livepatch/{name} is gone, and kmend did not do it",
        "find out who works on this kernel beside you, then run the command again",
    )
