"""How the target lays out the structures that a module is made of: read from compiled code, never assumed."""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from importlib import resources

from kmend.core.errors import Failed
from kmend.diff.declared import CallbackKind
from kmend.elf.model import ElfFile

SECTION = ".kmend.layout"


def glue_source(*, own_init: bool = False, forget: bool = False) -> str:
    """The C text that, compiled for a target, gives the common part of its modules and their layout.

    ``own_init``: for a module that brings ``module_init`` and its descriptors itself. ``forget``: for a
    kernel that does not take back what it relocated for a module that goes (``ModuleSpec.forget``).
    """
    text = resources.files("kmend.module").joinpath("glue.c").read_text()
    words = [word for word, wanted in (("KMEND_OWN_INIT", own_init), ("KMEND_FORGET", forget)) if wanted]
    return "".join(f"#define {word}\n" for word in words) + text


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes and offsets in bytes, in the order of ``kmend_layout[]`` in ``glue.c``."""

    patch_size: int
    patch_mod: int
    patch_objs: int
    patch_replace: int
    object_size: int
    object_name: int
    object_funcs: int
    func_size: int
    func_old_name: int
    func_new_func: int
    func_old_sympos: int
    module_size: int
    module_name: int
    module_name_len: int
    version_size: int
    version_name: int
    ex_table: int
    bug_table: int
    alt_instr: int
    jump_table: int
    static_call_site: int
    orc_entry: int
    callbacks: int
    pre_patch: int
    post_patch: int
    pre_unpatch: int
    post_unpatch: int
    patch_states: int
    state_size: int
    state_id: int
    state_version: int

    def callback(self, kind: CallbackKind) -> int:
        """The offset of a callback's pointer inside ``struct klp_object``."""
        match kind:
            case CallbackKind.PRE_PATCH:
                return self.callbacks + self.pre_patch
            case CallbackKind.POST_PATCH:
                return self.callbacks + self.post_patch
            case CallbackKind.PRE_UNPATCH:
                return self.callbacks + self.pre_unpatch
            case CallbackKind.POST_UNPATCH:
                return self.callbacks + self.post_unpatch

    def special_sizes(self) -> dict[str, int]:
        """Entry sizes of the special sections that the target decides."""
        return {
            "__ex_table": self.ex_table,
            "__bug_table": self.bug_table,
            ".altinstructions": self.alt_instr,
            "__jump_table": self.jump_table,
            ".static_call_sites": self.static_call_site,
        }


def read_layout(glue: ElfFile) -> Layout:
    """The layout out of the compiled glue.

    Raises:
        Failed: (rule ``layout``) the object is not the glue's.
    """
    section = glue.section(SECTION)
    count = len(fields(Layout))
    if section is None or len(section.data) != 4 * count:
        raise Failed("the compiled glue has no layout table", rule="layout")
    return Layout(*struct.unpack(f"<{count}I", section.data))


def modinfo(elf: ElfFile) -> list[tuple[str, str]]:
    """The ``key=value`` strings of ``.modinfo``, in order."""
    section = elf.section(".modinfo")
    if section is None:
        return []
    rows = []
    for text in section.data.split(b"\0"):
        key, mark, value = text.decode(errors="replace").partition("=")
        if mark:
            rows.append((key, value))
    return rows
