"""What is looked at before a module is loaded. Each check says what it found, also when it could not look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kmend.core.errors import Refusal, Unable
from kmend.core.live import Check, KernelState, LivePatch, Phase, tasks
from kmend.core.target import VMLINUX
from kmend.runtime import probes
from kmend.runtime.observe import Seen
from kmend.runtime.place import Place, is_folder, optional
from kmend.runtime.symbols import RunningSymbol, SymbolTable

#: kernel/module_signature.c
SIGNED = b"~Module signature appended~\n"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A function that the module wants to replace."""

    object: str
    name: str
    sympos: int


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """What the module's file says of itself.

    ``build_id`` is that of the kernel which it was built and proved for ('' in modules that kmend did not
    build). ``wanted`` and ``replace`` are None when nothing at hand can read the module's descriptors.
    ``note`` is what kmend wrote into it (empty for others').
    """

    path: str
    name: str
    vermagic: str
    build_id: str
    depends: tuple[str, ...]
    signed: bool
    identity: str
    sha256: str
    wanted: tuple[Wanted, ...] | None
    replace: bool | None
    note: Mapping[str, object] = field(default_factory=dict)

    @property
    def release(self) -> str:
        """The release that it was built for."""
        return self.vermagic.partition(" ")[0]


def look(place: Place, module: ModuleFile, seen: Seen, table: SymbolTable | None = None) -> tuple[Check, ...]:
    """Every check that needs nothing but the running kernel and the file.

    ``table`` is the kernel's symbol table when it has been read already.
    """
    return (
        _release(module, seen.kernel),
        _build(module, seen.kernel),
        _allowed(seen.kernel),
        _signature(module, seen.kernel),
        _ftrace(seen.kernel),
        _name(module, seen),
        _transition(module, seen),
        _needed(place, module),
        *_functions(place, module, seen.patches, table),
    )


def _release(module: ModuleFile, kernel: KernelState) -> Check:
    if module.release == kernel.release:
        return Check("release", True, f"built for {kernel.release}")
    return _no(
        "release",
        Refusal(
            "vermagic",
            f"{module.path} was built for {module.release or 'no kernel'}",
            f"this is {kernel.release}; a livepatch fits one exact kernel",
            f"build the patch with --kernel {kernel.release}",
        ),
    )


def _build(module: ModuleFile, kernel: KernelState) -> Check:
    if not module.build_id:
        return Check("build id", None, "the module does not say which build of the kernel it was made for")
    if not kernel.build_id:
        return Check("build id", None, "the running kernel shows no build id")
    if module.build_id == kernel.build_id:
        return Check("build id", True, f"{kernel.build_id[:12]}…, the running kernel's")
    return _no(
        "build id",
        Refusal(
            "other-build",
            f"{module.path} was built for another build of {kernel.release}",
            f"it was proved against {module.build_id[:12]}…, and {kernel.build_id[:12]}… is running: "
            "the same release, but other code",
            "boot the kernel that is installed, or build the patch for the one that is running",
        ),
    )


def _allowed(kernel: KernelState) -> Check:
    if kernel.modules_disabled:
        return _no(
            "modules allowed",
            Refusal(
                "modules-disabled",
                "no module can be loaded until the next boot",
                "kernel.modules_disabled is 1, which cannot be taken back",
                "have the patch installed at boot, before that is set (KMEND_INITRAMFS=yes where a file in "
                "/etc/sysctl.d sets it)",
            ),
        )
    return Check("modules allowed", True, "modules can be loaded")


def _signature(module: ModuleFile, kernel: KernelState) -> Check:
    enforced = kernel.signatures_enforced or kernel.lockdown in ("integrity", "confidentiality")
    if module.signed:
        text = "the module is signed; the kernel decides whether it trusts the key"
        return Check("signature", None if enforced else True, text)
    if not enforced:
        return Check("signature", True, "unsigned modules are allowed")
    if kernel.signatures_enforced:
        rule, why = "unsigned", "the kernel loads signed modules only (module.sig_enforce)"
    else:
        rule, why = "lockdown", f"the kernel is locked down ({kernel.lockdown})"
    return _no(
        "signature",
        Refusal(
            rule,
            f"{module.path} is not signed",
            why,
            "build it with --sign-key and a key that the kernel trusts",
        ),
    )


def _ftrace(kernel: KernelState) -> Check:
    if kernel.ftrace_enabled is False:
        return _no(
            "ftrace",
            Refusal(
                "ftrace-off",
                "nothing can be patched: ftrace is off",
                "it has shut itself down after a fault (see dmesg)"
                if kernel.ftrace_dead
                else "kernel.ftrace_enabled is 0",
                "reboot" if kernel.ftrace_dead else "sysctl kernel.ftrace_enabled=1",
            ),
        )
    return Check("ftrace", True if kernel.ftrace_enabled else None, "ftrace is on")


def _name(module: ModuleFile, seen: Seen) -> Check:
    there = seen.named(module.name)
    if there is None:
        return Check("name", True, f"no module {module.name} is loaded")
    same = bool(module.identity) and there.module is not None and there.module.identity == module.identity
    kind = "this very module" if same else "a module of that name"
    return _no(
        "name",
        Refusal(
            "already-loaded",
            f"{module.name} is loaded already: {kind}, {there.phase.value}",
            "the kernel loads one module of a name",
            f"kmend unload {module.name}, or build the patch with another name (-n)",
        ),
    )


def _transition(module: ModuleFile, seen: Seen) -> Check:
    moving = next((row for row in seen.patches if row.phase.moving or row.phase is Phase.COMING), None)
    if moving is None or moving.name == module.name:
        return Check("transition", True, "no other transition is under way")
    left = f"; {tasks(seen.transition.left)} left" if seen.transition is not None else ""
    return _no(
        "transition",
        Refusal(
            "transition-running",
            f"{moving.name} is {moving.phase.value}{left}",
            "the kernel makes one transition at a time",
            "wait for its end (kmend status --watch; kmend blockers says what it waits for)",
        ),
    )


def _needed(place: Place, module: ModuleFile) -> Check:
    missing = [name for name in module.depends if not is_folder(place.module(name))]
    if not missing:
        return Check("needed modules", True, ", ".join(module.depends) or "none")
    return _no(
        "needed modules",
        Refusal(
            "missing-module",
            f"{module.name} needs {', '.join(missing)}, not loaded",
            "it uses symbols that they export",
            f"modprobe -a {' '.join(missing)}",
        ),
    )


def _functions(
    place: Place, module: ModuleFile, patches: Sequence[LivePatch], table: SymbolTable | None
) -> Iterator[Check]:
    if module.wanted is None:
        yield Check(
            "functions", None, "which functions it replaces cannot be read without its kernel's target"
        )
        return
    try:
        table = table or SymbolTable(place)
    except Unable as error:
        yield Check("functions", None, error.what)
        return
    refusals = [refusal for row in module.wanted if (refusal := _missing(place, row, table.named(row.name)))]
    late = sorted({row.object for row in module.wanted if not _is_loaded(place, row.object)})
    text = f"{len(module.wanted)} are where the module expects them" + (
        f"; not loaded yet, so not looked at: {', '.join(late)}" if late else ""
    )
    if refusals:
        for refusal in refusals:
            yield _no("functions", refusal)
    else:
        yield Check("functions", True, text)
    wanted = [(row.object, row.name, row.sympos) for row in module.wanted]
    yield from probes.look(place, probes.entries(table, wanted, patches), table).checks


def _is_loaded(place: Place, name: str) -> bool:
    return name == VMLINUX or optional(place.module(name) / "initstate") is not None


def _missing(place: Place, row: Wanted, found: Sequence[RunningSymbol]) -> Refusal | None:
    """``klp_find_object_symbol()``, kernel/livepatch/core.c: position 0 wants one symbol, n the n-th."""
    if not _is_loaded(place, row.object):
        return None
    same = [one for one in found if one.object == row.object]
    if row.sympos == 0 and len(same) > 1:
        return Refusal(
            "ambiguous-symbol",
            f"{row.object} has {len(same)} functions {row.name}()",
            "the module does not say which is meant (sympos is 0)",
            "build it with kmend, or give the sympos",
        )
    if len(same) < max(row.sympos, 1):
        return Refusal(
            "old-function",
            f"{row.object} has no {row.name}()" + (f" at position {row.sympos}" if row.sympos > 1 else ""),
            "the module was made for another build of the kernel",
            "build the patch anew for this kernel",
        )
    return None


def _no(name: str, refusal: Refusal) -> Check:
    return Check(name, False, refusal.what, refusal)
