"""``kernel/livepatch/state.c``: system states that patches declare, and which patch may follow which."""

from __future__ import annotations

from kmend.klp.structs import Kernel, Patch, State


def klp_get_state(patch: Patch, id_: int) -> State | None:
    """The state that the patch declares under the id. The kernel's table ends at the first id 0."""
    for state in patch.states:
        if not state.id:
            break
        if state.id == id_:
            return state
    return None


def klp_get_prev_state(k: Kernel, id_: int) -> State | None:
    """The state of the newest patch before the one in transition; only to be called during a transition."""
    if k.klp_transition_patch is None:
        k.warn_on("klp_get_prev_state: no transition")
        return None
    last = None
    for patch in k.klp_patches:
        if patch is k.klp_transition_patch:
            break
        last = klp_get_state(patch, id_) or last
    return last


def klp_is_state_compatible(patch: Patch, old_state: State) -> bool:
    """A replacing patch must know every state, and at no lower version; another one must not be older."""
    state = klp_get_state(patch, old_state.id)
    if state is None:
        return not patch.replace
    return state.version >= old_state.version


def klp_is_patch_compatible(k: Kernel, patch: Patch) -> bool:
    """Whether the patch can deal with the states of all patches that are installed."""
    return all(
        klp_is_state_compatible(patch, state)
        for old in k.klp_patches
        for state in old.states
        if state.id and klp_get_state(old, state.id)
    )
