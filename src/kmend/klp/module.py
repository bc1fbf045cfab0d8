"""The module loader as far as livepatching sees it: ``kernel/module/main.c``."""

from __future__ import annotations

from kmend.klp.core import klp_module_coming, klp_module_going
from kmend.klp.structs import (
    EAGAIN,
    EBUSY,
    EEXIST,
    ENOENT,
    TAINT_LIVEPATCH,
    Kernel,
    Module,
    ModuleState,
)


def load_module(k: Kernel, mod: Module) -> int:
    """``init_module(2)``: 0, or a negative errno and the module is gone.

    The kernel is tainted as soon as a livepatch module is looked at, whether its load succeeds or not
    (``check_modinfo_livepatch()``).
    """
    if mod.name in k.modules:
        return -EEXIST
    if mod.livepatch:
        k.taint |= 1 << TAINT_LIVEPATCH
    k.modules[mod.name] = mod
    k.kallsyms[mod.name] = sorted(mod.symbols, key=lambda symbol: symbol.addr)
    mod.state = ModuleState.COMING
    mod.refcnt = 1  # held during the initialisation
    ret = klp_module_coming(k, mod)
    if ret:
        mod.state = ModuleState.GOING
        _free(k, mod)
        return ret
    ret = mod.init(k, mod) if mod.init else 0
    if ret < 0:
        mod.state = ModuleState.GOING
        klp_module_going(k, mod)
        _free(k, mod)
        return ret
    mod.state = ModuleState.LIVE
    mod.refcnt -= 1
    return 0


def delete_module(k: Kernel, name: str) -> int:
    """``delete_module(2)`` as ``rmmod`` calls it: -EAGAIN while the module is referred to."""
    mod = k.modules.get(name)
    if mod is None:
        return -ENOENT
    if mod.state is not ModuleState.LIVE:
        return -EBUSY
    if mod.init and not mod.exit:
        return -EBUSY
    if mod.refcnt:
        return -EAGAIN
    mod.state = ModuleState.GOING
    if mod.exit:
        mod.exit(k, mod)
    klp_module_going(k, mod)
    _free(k, mod)
    return 0


def _free(k: Kernel, mod: Module) -> None:
    """``free_module()``: its memory is given back."""
    del k.modules[mod.name]
    del k.kallsyms[mod.name]
    k.freed.update(symbol.addr for symbol in mod.symbols)
