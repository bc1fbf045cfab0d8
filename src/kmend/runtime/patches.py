"""``/sys/kernel/livepatch`` (Documentation/ABI/testing/sysfs-kernel-livepatch) as values.

Works from the first kernels with livepatch (4.0) on: what a kernel does not show is probed for, file by file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kmend.core.errors import Unable
from kmend.core.live import LiveFunction, LiveModule, LiveObject, LivePatch, Phase
from kmend.runtime.place import Place, data, entries, flag, is_folder, optional

#: Letter of ``TAINT_LIVEPATCH`` in ``/sys/module/NAME/taint`` (kernel/panic.c, taint_flags[]).
LIVEPATCH_TAINT = "K"
#: The note that kmend writes into what it builds, and the notes that tell one file from another.
NOTE = ".note.kmend"
IDENTITY = (NOTE, ".note.gnu.build-id")


def read_patches(place: Place, known: Mapping[str, bool] | None = None) -> tuple[LivePatch, ...]:
    """All livepatches, from the bottom of the stack to its top.

    ``known`` says which patches are cumulative where the kernel does not show ``replace`` (before 6.11).

    Raises:
        Unable: (rule ``not-permitted``) this user may not list them.
    """
    loaded = load_order(place)
    found = []
    for name in entries(place.livepatch):
        patch = _patch(place, name, (known or {}).get(name))
        if patch is not None:
            found.append(patch)
    shown = {name: _stack_order(place, name) for name in (row.name for row in found)}
    if found and all(order is not None for order in shown.values()):
        found.sort(key=lambda row: shown[row.name] or 0)
    else:
        # klp_init_patch_early() adds at the end of klp_patches, from the module's own init function
        found.sort(key=lambda row: loaded.get(row.name, len(loaded)))
    ordered = [
        replace(row, order=at, order_shown=shown[row.name] is not None) for at, row in enumerate(found, 1)
    ]
    return _with_shadows(ordered)


def read_patch(place: Place, name: str, *, objects: bool = True) -> LivePatch | None:
    """One patch by its name, without its place on the stack; None: there is none of that name.

    Without ``objects`` only its phase is read: two or three small files.
    """
    return _patch(place, name, None, objects=objects)


def read_left(place: Place, patches: Iterable[LivePatch] = ()) -> tuple[LivePatch, ...]:
    """Modules of livepatches that are none any more: disabled or replaced, but still loaded.

    ``patches`` are those that are known to be there.
    """
    known = {row.name for row in patches}
    found = []
    for name in load_order(place):
        if name in known or is_folder(place.livepatch / name):
            continue
        module = read_module(place, name)
        if module is not None and LIVEPATCH_TAINT in module.taint:
            phase = Phase.COMING if module.initstate == "coming" else Phase.LEFT
            found.append(LivePatch(name, phase, None, 0, False, (), module))
    return tuple(found)


def load_order(place: Place) -> dict[str, int]:
    """Loaded modules with their place in the order of loading: ``/proc/modules`` has the newest first."""
    names = [line.split(" ", 1)[0] for line in (optional(place.proc / "modules") or "").splitlines() if line]
    return {name: at for at, name in enumerate(reversed(names))}


def _stack_order(place: Place, name: str) -> int | None:
    shown = optional(place.livepatch / name / "stack_order")  # since 6.14
    return int(shown) if shown is not None and shown.isdigit() else None


def _patch(place: Place, name: str, known: bool | None, *, objects: bool = True) -> LivePatch | None:
    folder = place.livepatch / name
    enabled, moving = flag(folder / "enabled"), flag(folder / "transition")
    if enabled is None:  # it went, or it is no patch
        return None
    module = read_module(place, name) if objects or not (moving or enabled) else None
    if moving:
        # klp_reverse_transition() flips `enabled`: it is what the transition leads to
        phase = Phase.PATCHING if enabled else Phase.UNPATCHING
    elif enabled:
        phase = Phase.ENABLED
    elif module is not None and module.initstate == "coming":
        phase = Phase.COMING
    else:
        phase = Phase.DISABLED
    shown = flag(folder / "replace")  # since 6.11
    if not objects:
        return LivePatch(name, phase, known, 0, False, (), module)
    rows = tuple(
        LiveObject(row, flag(folder / row / "patched"), _functions(folder / row))
        for row in entries(folder)
        if is_folder(folder / row) and not (folder / row).is_symlink()
    )
    return LivePatch(name, phase, known if shown is None else shown, 0, False, rows, module)


def _functions(folder: Path) -> tuple[LiveFunction, ...]:
    """A folder each: ``NAME,SYMPOS`` since 444f9e99a840 "livepatch: function,sympos scheme in livepatch sysfs
    directory" (4.5), before that the name alone."""
    rows = []
    for name in entries(folder):
        function, comma, position = name.rpartition(",")
        if not comma:
            if is_folder(folder / name):  # a file is an attribute of the object: `patched`
                rows.append(LiveFunction(name, 0))
        elif function and position.isdigit():
            rows.append(LiveFunction(function, int(position)))
    return tuple(rows)


def read_module(place: Place, name: str) -> LiveModule | None:
    """A loaded module; None when there is none of that name (built-in ones do not count)."""
    folder = place.module(name)
    state = optional(folder / "initstate")
    if state is None:
        return None
    count = optional(folder / "refcnt")
    notes = {row: _note(folder / "notes" / row) for row in _names(folder / "notes") if row in IDENTITY}
    return LiveModule(
        name=name,
        references=int(count) if count is not None and count.lstrip("-").isdigit() else None,
        initstate=state,
        taint=optional(folder / "taint") or "",
        holders=tuple(_names(folder / "holders")),
        note=parse_note(notes.get(NOTE, b"")),
        identity=identity(notes),
    )


def identity(notes: Mapping[str, bytes]) -> str:
    """A digest of the notes that tell one module file from another; '' when there are none."""
    digest = hashlib.sha256()
    chosen = [name for name in IDENTITY if notes.get(name)]
    for name in chosen:
        digest.update(f"{name} {len(notes[name])}\n".encode() + notes[name])
    return digest.hexdigest() if chosen else ""


def parse_note(note: bytes) -> dict[str, object]:
    """What kmend wrote into a module: the JSON object in its ELF note; empty for any other contents."""
    if len(note) < 12:
        return {}
    name_size, size = int.from_bytes(note[:4], "little"), int.from_bytes(note[4:8], "little")
    start = 12 + (name_size + 3) // 4 * 4
    try:
        found = json.loads(note[start : start + size])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _note(path: Path) -> bytes:
    try:
        return data(path) or b""
    except Unable:
        return b""


def _names(folder: Path) -> list[str]:
    try:
        return entries(folder)
    except Unable:
        return []


def _with_shadows(patches: Sequence[LivePatch]) -> tuple[LivePatch, ...]:
    """Add to each function which patch above it has the word (the last on the ``func_stack``).

    A patch that is being taken back counts as there: some tasks still run its code.
    """
    out = []
    for at, patch in enumerate(patches):
        above = [row for row in patches[at + 1 :] if row.phase in (Phase.ENABLED, Phase.PATCHING)]
        over = {
            (obj.name, function.name, function.sympos): row.name
            for row in above
            for obj in row.objects
            for function in obj.functions
        }
        objects = tuple(
            replace(
                obj,
                functions=tuple(
                    replace(f, shadowed_by=over.get((obj.name, f.name, f.sympos), "")) for f in obj.functions
                ),
            )
            for obj in patch.objects
        )
        out.append(replace(patch, objects=objects))
    return tuple(out)
