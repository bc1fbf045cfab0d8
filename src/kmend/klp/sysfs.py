"""``/sys/kernel/livepatch`` as a file system of values: what it shows, and what writing to it does."""

from __future__ import annotations

from dataclasses import dataclass

from kmend.klp.core import klp_disable_patch
from kmend.klp.line import Feature
from kmend.klp.structs import EACCES, EINVAL, ENOENT, Kernel, Object, Patch
from kmend.klp.transition import klp_force_transition, klp_reverse_transition

ROOT = "/sys/kernel/livepatch"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder below :data:`ROOT`: its rights as ``ls -l`` prints them, and what reading it gives."""

    rights: str
    value: str | None = None


FOLDER = Entry("drwxr-xr-x")


def kstrtobool(text: str) -> bool | None:
    """``lib/kstrtox.c``: only the first letter (of ``on``, ``off`` the first two) is looked at."""
    if text[:1] in "yYtT1" and text:
        return True
    if text[:1] in "nNfF0" and text:
        return False
    return {"on": True, "of": False}.get(text[:2].lower())


def view(k: Kernel) -> dict[str, Entry]:
    """Every path below :data:`ROOT`, relative to it."""
    entries: dict[str, Entry] = {}
    for patch in k.kobjects:
        name = patch.name
        entries[name] = FOLDER
        entries[f"{name}/enabled"] = Entry("-rw-r--r--", f"{patch.enabled:d}")
        entries[f"{name}/transition"] = Entry("-r--r--r--", f"{patch is k.klp_transition_patch:d}")
        entries[f"{name}/force"] = Entry("--w-------")
        if k.line.has(Feature.REPLACE_ATTRIBUTE):
            entries[f"{name}/replace"] = Entry("-r--r--r--", f"{patch.replace:d}")
        for obj in patch.objs:
            if obj.in_sysfs:
                entries.update(_object(name, obj))
    return entries


def _object(name: str, obj: Object) -> dict[str, Entry]:
    folder = f"{name}/{obj.sysfs_name}"
    entries = {folder: FOLDER, f"{folder}/patched": Entry("-r--r--r--", f"{obj.patched:d}")}
    entries.update({f"{folder}/{func.sysfs_name}": FOLDER for func in obj.funcs if func.in_sysfs})
    return entries


def _find(k: Kernel, name: str) -> Patch | None:
    return next((patch for patch in k.kobjects if patch.name == name), None)


def write(k: Kernel, path: str, text: str) -> int:
    """Write to ``PATCH/enabled`` or ``PATCH/force``: 0 or a negative errno.

    Files that cannot be written refuse root as well (``kernfs_fop_open()``).
    """
    name, _, attribute = path.partition("/")
    patch = _find(k, name)
    if patch is None or path not in view(k):
        return -ENOENT
    if attribute == "enabled":
        return enabled_store(k, patch, text)
    if attribute == "force":
        return force_store(k, patch, text)
    return -EACCES


def enabled_store(k: Kernel, patch: Patch, text: str) -> int:
    """Disable a patch, or turn its transition round. A patch that is disabled cannot be enabled again."""
    enabled = kstrtobool(text)
    if enabled is None:
        return -EINVAL
    with k.lock():
        if patch.enabled == enabled:
            return -EINVAL
        if patch is k.klp_transition_patch:
            klp_reverse_transition(k)
            return 0
        return -EINVAL if enabled else klp_disable_patch(k, patch)


def force_store(k: Kernel, patch: Patch, text: str) -> int:
    """Force the transition of this patch; anything that means no is ignored."""
    value = kstrtobool(text)
    if value is None:
        return -EINVAL
    if not value:
        return 0
    with k.lock():
        if patch is not k.klp_transition_patch:
            return -EINVAL
        klp_force_transition(k)
    return 0
