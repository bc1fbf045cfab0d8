"""The part of ``kernel/livepatch/core.c`` that takes patches down: kobjects, nops, replaced patches."""

from __future__ import annotations

from kmend.klp.patch import klp_unpatch_objects, klp_unpatch_objects_dynamic
from kmend.klp.structs import Kernel, Object, Patch, WorkKind


def klp_free_object_loaded(obj: Object) -> None:
    """Forget what was known of an object's module when that module goes."""
    obj.mod = None
    for func in obj.funcs:
        func.old_func = None
        if func.nop:
            func.new_func = None


def _free_objects(patch: Patch, *, nops_only: bool) -> None:
    """``__klp_free_objects()`` and ``__klp_free_funcs()``: the kobjects go, and with them the folders."""
    for obj in list(patch.objs):
        for func in list(obj.funcs):
            if nops_only and not func.nop:
                continue
            obj.funcs.remove(func)
            func.in_sysfs = False
        if nops_only and not obj.dynamic:
            continue
        patch.objs.remove(obj)
        obj.in_sysfs = False


def klp_free_patch_start(k: Kernel, patch: Patch) -> None:
    """The part of freeing a patch that is done with ``klp_mutex`` held."""
    if patch in k.klp_patches:
        k.klp_patches.remove(patch)
    _free_objects(patch, nops_only=False)


def klp_free_patch_finish(k: Kernel, patch: Patch) -> None:
    """The part without the mutex: the patch's own folder goes; its module may go unless it was forced."""
    patch.in_sysfs = False
    if patch in k.kobjects:
        k.kobjects.remove(patch)
    if not patch.forced:
        patch.mod.refcnt -= 1


def klp_free_patch_async(k: Kernel, patch: Patch) -> None:
    """Start freeing a patch and leave the rest to a work."""
    klp_free_patch_start(k, patch)
    k.schedule(WorkKind.FREE, patch=patch)


def klp_free_replaced_patches_async(k: Kernel, new_patch: Patch) -> None:
    """Free all patches that are older than the one that replaced them."""
    for old_patch in list(k.klp_patches):
        if old_patch is new_patch:
            return
        klp_free_patch_async(k, old_patch)


def klp_unpatch_replaced_patches(k: Kernel, new_patch: Patch) -> None:
    """Take the funcs of all older patches off their stacks. None of their callbacks runs."""
    for old_patch in k.klp_patches:
        if old_patch is new_patch:
            return
        old_patch.enabled = False
        klp_unpatch_objects(k, old_patch)


def klp_discard_nops(k: Kernel) -> None:
    """Remove the nops of the patch in transition, and the objects that only nops had brought."""
    patch = k.klp_transition_patch
    if patch is None:
        return k.warn_on("klp_discard_nops: no transition")
    klp_unpatch_objects_dynamic(k, patch)
    _free_objects(patch, nops_only=True)
    return None
