"""``kernel/livepatch/core.c``: enabling and disabling patches, atomic replace, modules coming and going."""

from __future__ import annotations

from kmend.klp.free import klp_free_object_loaded, klp_free_patch_finish, klp_free_patch_start
from kmend.klp.line import Feature
from kmend.klp.patch import klp_patch_object, klp_unpatch_object
from kmend.klp.state import klp_is_patch_compatible
from kmend.klp.structs import (
    EBUSY,
    EEXIST,
    EINVAL,
    ENODEV,
    ENOEXEC,
    KSYM_NAME_LEN,
    MODULE_NAME_LEN,
    PATCHED,
    UNPATCHED,
    Func,
    Function,
    Kernel,
    Level,
    Module,
    ModuleState,
    Object,
    Patch,
    WorkKind,
)
from kmend.klp.transition import (
    klp_cancel_transition,
    klp_init_transition,
    klp_post_patch_callback,
    klp_post_unpatch_callback,
    klp_pre_patch_callback,
    klp_pre_unpatch_callback,
    klp_start_transition,
    klp_transition_work_fn,
    klp_try_complete_transition,
)


def klp_find_func(obj: Object, old_func: Func) -> Func | None:
    """The func of the object for the same function; positions 0 and 1 mean the same."""
    for func in obj.funcs:
        if func.old_name == old_func.old_name and (func.old_sympos or 1) == (old_func.old_sympos or 1):
            return func
    return None


def klp_find_object(patch: Patch, old_obj: Object) -> Object | None:
    """The patch's object of the same name."""
    for obj in patch.objs:
        if obj.name == old_obj.name:
            return obj
    return None


def klp_find_object_symbol(k: Kernel, objname: str | None, name: str, sympos: int) -> Function | None:
    """The symbol of that name (and position among those of that name) in vmlinux or a module.

    None, with a line in the log, when it is not there, or when the name is not unique and no position is
    given. The kernel prints the object's name as ``(null)`` for vmlinux in the second case.
    """
    found = None
    count = 0
    for symbol in k.kallsyms.get(objname, ()):
        if symbol.name != name:
            continue
        found = symbol
        count += 1
        if count == sympos or (not sympos and count > 1):
            break
    if found is None:
        k.pr_err(f"symbol '{name}' not found in symbol table")
    elif count > 1 and not sympos:
        k.pr_err(f"unresolvable ambiguity for symbol '{name}' in object '{objname or '(null)'}'")
    elif sympos and count != sympos:
        k.pr_err(f"symbol position {sympos} for symbol '{name}' in object '{objname or 'vmlinux'}' not found")
    else:
        return found
    return None


def _resolve(k: Kernel, relocs: tuple[tuple[str, str, int], ...]) -> int:
    """``klp_resolve_symbols()`` for the relocations of a module's section."""
    for sym_objname, name, sympos in relocs:
        if sym_objname == "vmlinux":
            k.pr_err(
                f"invalid access to vmlinux symbol '{name}' from module-specific livepatch relocation section"
            )
            return -EINVAL
        if klp_find_object_symbol(k, sym_objname, name, sympos) is None:
            return -EINVAL
    return 0


def klp_apply_object_relocs(k: Kernel, obj: Object) -> int:
    """Write the relocations of ``.klp.rela.OBJECT.*``; a field that is not zero refuses.

    Before 6.3 nothing zeroes the fields again, and a module's second load finds them written
    (``__apply_relocate_add()`` in ``arch/x86/kernel/module.c``).
    """
    if not obj.relocs:
        return 0
    ret = _resolve(k, obj.relocs)
    if ret:
        return ret
    if obj.relocs_written:
        k.printk(
            Level.ERR, "module: x86/modules: Skipping invalid relocation target, existing value is nonzero"
        )
        return -ENOEXEC
    obj.relocs_written = True
    return 0


def klp_clear_object_relocs(k: Kernel, obj: Object) -> None:
    """Zero the fields again when the module goes, in lines that do."""
    if k.line.has(Feature.CLEAR_RELOCS):
        obj.relocs_written = False


def _add_object_nops(patch: Patch, old_obj: Object) -> None:
    """``klp_add_object_nops()``."""
    obj = klp_find_object(patch, old_obj)
    if obj is None:
        obj = Object(old_obj.name, dynamic=True, patch=patch)
        patch.objs.append(obj)
    for old_func in old_obj.funcs:
        if klp_find_func(obj, old_func) is None:
            obj.funcs.append(Func(old_func.old_name, old_sympos=old_func.old_sympos, nop=True, patch=patch))


def klp_add_nops(k: Kernel, patch: Patch) -> None:
    """Add a nop for each function that older patches redirect and this one does not: it goes back."""
    for old_patch in k.klp_patches:
        for old_obj in old_patch.objs:
            _add_object_nops(patch, old_obj)


def _duplicate(k: Kernel, path: str) -> int:
    """``sysfs_warn_dup()``: a second folder of one name."""
    k.printk(Level.WARNING, f"sysfs: cannot create duplicate filename '/kernel/livepatch/{path}'")
    return -EEXIST


def klp_init_func(k: Kernel, patch: Patch, obj: Object, func: Func) -> int:
    """Check a func and make its folder in sysfs."""
    if not func.old_name or (func.new_func is None and not func.nop):
        return -EINVAL
    if len(func.old_name) >= KSYM_NAME_LEN:
        return -EINVAL
    func.patched = func.transition = False
    if any(other.in_sysfs and other.sysfs_name == func.sysfs_name for other in obj.funcs):
        return _duplicate(k, f"{patch.name}/{obj.sysfs_name}/{func.sysfs_name}")
    func.in_sysfs = True
    return 0


def klp_init_object_loaded(k: Kernel, obj: Object) -> int:
    """What can only be done once the object is there: relocations, and the addresses of its functions."""
    if obj.name is not None:
        ret = klp_apply_object_relocs(k, obj)
        if ret:
            return ret
    for func in obj.funcs:
        func.old_func = klp_find_object_symbol(k, obj.name, func.old_name, func.old_sympos)
        if func.old_func is None:
            return -EINVAL
        if func.nop:
            func.new_func = func.old_func
    return 0


def klp_init_object(k: Kernel, patch: Patch, obj: Object) -> int:
    """Find the object's module, make the object's folder, check its funcs."""
    if obj.name is not None and len(obj.name) >= MODULE_NAME_LEN:
        return -EINVAL
    obj.patched = False
    obj.mod = None
    if obj.name is not None:
        mod = k.modules.get(obj.name)
        # a module before klp_module_coming() or after klp_module_going() is left to these two
        if mod is not None and mod.klp_alive:
            obj.mod = mod
    if any(other.in_sysfs and other.name == obj.name for other in patch.objs):
        return _duplicate(k, f"{patch.name}/{obj.sysfs_name}")
    obj.in_sysfs = True
    for func in obj.funcs:
        ret = klp_init_func(k, patch, obj, func)
        if ret:
            return ret
    return klp_init_object_loaded(k, obj) if obj.loaded else 0


def klp_init_patch(k: Kernel, patch: Patch) -> int:
    """Make the patch's folder, its nops, its objects; put it at the end of the list of patches."""
    if any(other.name == patch.name for other in k.kobjects):
        return _duplicate(k, patch.name)
    patch.in_sysfs = True
    k.kobjects.append(patch)
    if patch.replace:
        klp_add_nops(k, patch)
    for obj in patch.objs:
        ret = klp_init_object(k, patch, obj)
        if ret:
            return ret
    k.klp_patches.append(patch)
    return 0


def klp_disable_patch(k: Kernel, patch: Patch) -> int:
    """``__klp_disable_patch()``."""
    if not patch.enabled:
        k.warn_on("__klp_disable_patch: not enabled")
        return -EINVAL
    if k.klp_transition_patch is not None:
        return -EBUSY
    klp_init_transition(k, patch, UNPATCHED)
    for obj in patch.objs:
        if obj.patched:
            klp_pre_unpatch_callback(k, obj)
    klp_start_transition(k)
    patch.enabled = False
    klp_try_complete_transition(k)
    return 0


def _enable_patch(k: Kernel, patch: Patch) -> int:
    """``__klp_enable_patch()``."""
    if k.klp_transition_patch is not None:
        return -EBUSY
    if patch.enabled:
        k.warn_on("__klp_enable_patch: enabled")
        return -EINVAL
    k.pr_notice(f"enabling patch '{patch.name}'")
    klp_init_transition(k, patch, PATCHED)
    for obj in patch.objs:
        if not obj.loaded:
            continue
        ret = klp_pre_patch_callback(k, obj)
        if ret:
            k.pr_warn(f"pre-patch callback failed for object '{obj.sysfs_name}'")
            break
        ret = klp_patch_object(k, obj)
        if ret:
            k.pr_warn(f"failed to patch object '{obj.sysfs_name}'")
            break
    else:
        klp_start_transition(k)
        patch.enabled = True
        klp_try_complete_transition(k)
        return 0
    k.pr_warn(f"failed to enable patch '{patch.name}'")
    klp_cancel_transition(k)
    return ret


def klp_enable_patch(k: Kernel, patch: Patch) -> int:
    """What a livepatch module's init function calls: 0, or a negative errno and nothing is left behind.

    Raises:
        KernelHang: it was called from a callback.
    """
    mod = patch.mod
    if not mod.livepatch:
        k.pr_err(f"module {mod.name} is not marked as a livepatch module")
        return -EINVAL
    with k.lock():
        if not klp_is_patch_compatible(k, patch):
            k.pr_err(
                f"Livepatch patch ({mod.name}) is not compatible with the already installed livepatches."
            )
            return -EINVAL
        if mod.state is ModuleState.GOING:  # try_module_get()
            return -ENODEV
        mod.refcnt += 1
        patch.enabled = patch.forced = False
        for obj in patch.objs:
            obj.patch = patch
            for func in obj.funcs:
                func.patch = patch
        ret = klp_init_patch(k, patch) or _enable_patch(k, patch)
        if not ret:
            return 0
        klp_free_patch_start(k, patch)
    klp_free_patch_finish(k, patch)
    return ret


def klp_cleanup_module_patches_limited(k: Kernel, mod: Module, limit: Patch | None) -> None:
    """Take off the patches of a module, those before ``limit`` only (None: all)."""
    for patch in k.klp_patches:
        if patch is limit:
            break
        for obj in patch.objs:
            if obj.name != mod.name:
                continue
            if patch is not k.klp_transition_patch:
                klp_pre_unpatch_callback(k, obj)
            k.pr_notice(f"reverting patch '{patch.name}' on unloading module '{mod.name}'")
            klp_unpatch_object(k, obj)
            klp_post_unpatch_callback(k, obj)
            klp_clear_object_relocs(k, obj)
            klp_free_object_loaded(obj)
            break


def klp_module_coming(k: Kernel, mod: Module) -> int:
    """A module is about to run its init function: apply all patches of it, in the order they were loaded.

    On an error the module is refused, and the patches that were applied to it are taken off again.
    """
    if mod.state is not ModuleState.COMING:
        k.warn_on("klp_module_coming: state")
        return -EINVAL
    if mod.name == "vmlinux":
        k.pr_err("vmlinux.ko: invalid module name")
        return -EINVAL
    with k.lock():
        mod.klp_alive = True
        for patch in k.klp_patches:
            for obj in patch.objs:
                if obj.name != mod.name:
                    continue
                ret = _module_coming(k, mod, patch, obj)
                if ret:
                    k.pr_warn(
                        f"patch '{patch.name}' failed for module '{mod.name}', "
                        f"refusing to load module '{mod.name}'"
                    )
                    mod.klp_alive = False
                    obj.mod = None
                    klp_cleanup_module_patches_limited(k, mod, patch)
                    return ret
                break
    return 0


def _module_coming(k: Kernel, mod: Module, patch: Patch, obj: Object) -> int:
    """One patch of the module that comes."""
    obj.mod = mod
    ret = klp_init_object_loaded(k, obj)
    if ret:
        k.pr_warn(f"failed to initialize patch '{patch.name}' for module '{mod.name}' ({ret})")
        return ret
    k.pr_notice(f"applying patch '{patch.name}' to loading module '{mod.name}'")
    ret = klp_pre_patch_callback(k, obj)
    if ret:
        k.pr_warn(f"pre-patch callback failed for object '{obj.name}'")
        return ret
    ret = klp_patch_object(k, obj)
    if ret:
        k.pr_warn(f"failed to apply patch '{patch.name}' to module '{mod.name}' ({ret})")
        klp_post_unpatch_callback(k, obj)
        return ret
    if patch is not k.klp_transition_patch:
        klp_post_patch_callback(k, obj)
    return 0


def klp_module_going(k: Kernel, mod: Module) -> None:
    """A module has run its exit function: take all patches of it off."""
    if mod.state not in (ModuleState.GOING, ModuleState.COMING):
        return k.warn_on("klp_module_going: state")
    with k.lock():
        mod.klp_alive = False
        klp_cleanup_module_patches_limited(k, mod, None)
    return None


def run_works(k: Kernel) -> bool:
    """Run the works that are due, in the order they were scheduled; whether there was one."""
    due = [work for work in k.works if work.due <= k.jiffies]
    for work in due:
        k.works.remove(work)
        match work.kind:
            case WorkKind.TRANSITION:
                klp_transition_work_fn(k)
            case WorkKind.FREE:
                assert work.patch is not None, "klp_free_patch_async() names the patch"
                klp_free_patch_finish(k, work.patch)
    return bool(due)
