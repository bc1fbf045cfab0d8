"""The kernel's livepatch state as a frozen value: for comparing runs, and for showing them."""

from __future__ import annotations

from dataclasses import dataclass

from kmend.klp import sysfs
from kmend.klp.shadow import klp_shadows
from kmend.klp.structs import Kernel


@dataclass(frozen=True, slots=True)
class FuncView:
    """An entry of a func stack: whose it is, whether it is a nop, whether it is in transition."""

    patch: str
    nop: bool
    transition: bool


@dataclass(frozen=True, slots=True)
class StackView:
    """The func stack of a function (top first); ``object`` is ``vmlinux`` or a module."""

    object: str
    function: str
    funcs: tuple[FuncView, ...]


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task: its state (-1, 0, 1), whether it is asked to switch, and the code on its stack.

    A frame is ``FUNCTION [OWNER]``, outermost first.
    """

    name: str
    patch_state: int
    pending: bool
    asleep: bool
    frames: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModuleView:
    """A module that is loaded."""

    name: str
    state: str
    refcnt: int


@dataclass(frozen=True, slots=True)
class StateView:
    """All of it at one moment; ``sysfs`` holds the files that can be read, below /sys/kernel/livepatch."""

    patches: tuple[str, ...]
    transition: str
    target: int
    stacks: tuple[StackView, ...]
    tasks: tuple[TaskView, ...]
    modules: tuple[ModuleView, ...]
    sysfs: tuple[tuple[str, str], ...]
    shadows: tuple[tuple[int, int], ...]


def view(k: Kernel) -> StateView:
    """The state now. Addresses are left out: they differ from one load to the next."""
    return StateView(
        patches=tuple(patch.name for patch in k.klp_patches),
        transition=k.klp_transition_patch.name if k.klp_transition_patch else "",
        target=int(k.klp_target_state),
        stacks=tuple(
            sorted(
                (
                    StackView(
                        ops.old_func.module or "vmlinux",
                        ops.old_func.name,
                        tuple(
                            FuncView(func.patch.name if func.patch else "", func.nop, func.transition)
                            for func in ops.func_stack
                        ),
                    )
                    for ops in k.klp_ops.values()
                ),
                key=lambda row: (row.object, row.function),
            )
        ),
        tasks=tuple(
            TaskView(
                f"{task.comm}:{task.pid}",
                int(task.patch_state),
                task.tif_patch_pending,
                task.sleep.value != "running",
                tuple(f"{frame.function.name} [{frame.code.module or 'vmlinux'}]" for frame in task.stack),
            )
            for task in (*k.tasks, *k.idle)
        ),
        modules=tuple(ModuleView(mod.name, mod.state.value, mod.refcnt) for mod in k.modules.values()),
        sysfs=tuple((path, entry.value) for path, entry in sysfs.view(k).items() if entry.value is not None),
        shadows=tuple(sorted((shadow.obj, shadow.id) for shadow in klp_shadows(k))),
    )
