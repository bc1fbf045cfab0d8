"""``kmend doctor``: what this machine lacks for each verb, and the command that mends it.

The list of packages is ``needs.txt`` beside this file; the Makefile reads the same one. What acts on the
running kernel needs no package but a kernel that can do it, which no command brings: without verbs named,
that is shown and does not decide the exit status, since most patches are built on one machine and loaded on
others.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kmend.cli.context import Context
from kmend.core.errors import Failed, KmendError, UsageError
from kmend.core.live import KernelState
from kmend.installer import UNIT, UNIT_FOLDERS
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.place import Place

NEEDS = Path(__file__).with_name("needs.txt")

#: Verbs that work with what Python alone brings, so that they are reported too.
PURE_VERBS = ("diff", "check", "info")
#: Verbs that act on the running kernel or look at it.
LIVE_VERBS = ("plan", "load", "unload", "disable", "enable", "signal", "force", "status", "list", "blockers")
#: Those that change what it runs.
ACTING_VERBS = ("load", "unload", "disable", "enable", "signal", "force")
#: Verbs about what is loaded at boot.
BOOT_VERBS = ("install", "uninstall", "healthy")
#: Rows of the list that only somebody who works on kmend itself needs; not asked about where it is installed.
DEVELOPER_VERBS = ("test", "deb", "setup")
CHECKOUT = NEEDS.parents[3]
#: What the library imports from elsewhere: module name, distribution name.
LIBRARIES = (
    ("capstone", "capstone"),
    ("debian", "python-debian"),
    ("jinja2", "Jinja2"),
    ("lz4", "lz4"),
    ("qemu.qmp", "qemu.qmp"),
    ("rich", "rich"),
    ("vmlinux_to_elf", "vmlinux-to-elf"),
    ("zstandard", "zstandard"),
)
#: The package lists that apt has fetched; a bare system has none, and apt knows no package then.
APT_LISTS = "/var/lib/apt/lists/*_Packages*"
#: Bytes that fetching and preparing one target takes at its peak (packages, source, objects).
ROOM_PER_TARGET = 3_000_000_000
#: Where programs live that are not always on a user's PATH.
SYSTEM_PATHS = ("/usr/local/sbin", "/usr/sbin", "/sbin")


@dataclass(frozen=True, slots=True)
class Need:
    """A row of ``needs.txt``: ``proof`` is a program's name or a file's absolute path (``*`` allowed)."""

    package: str
    proof: str
    verbs: tuple[str, ...]
    purpose: str


@dataclass(frozen=True, slots=True)
class Lack:
    """One thing that is not there. ``package`` is what apt would install; empty when apt cannot mend it."""

    what: str
    why: str
    verbs: tuple[str, ...]
    package: str
    mend: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``kmend doctor``."""
    parser.add_argument("verbs", metavar="VERB", nargs="*", help="look only at what these verbs need")


def run(args: argparse.Namespace, context: Context) -> int:
    """Report; 0 when everything is there, 3 when something lacks for the verbs that are named (see above)."""
    needs = read_needs(NEEDS)
    known = known_verbs(needs)
    hidden = () if in_checkout() else DEVELOPER_VERBS
    chosen = tuple(args.verbs) or tuple(verb for verb in known if verb not in hidden)
    decisive = set(args.verbs) or set(chosen) - {*LIVE_VERBS, *BOOT_VERBS}
    unknown = [verb for verb in chosen if verb not in known]
    if unknown:
        raise UsageError(f"no verb {unknown[0]!r}", why=f"doctor knows: {', '.join(known)}", rule="usage")
    everything = [*missing(needs, context.config.cache), *live_lacks(known_kernel()), *boot_lacks()]
    lacks = [lack for lack in everything if set(lack.verbs) & set(chosen)]
    command = apt_command(lacks)
    context.emit(document(chosen, lacks, command))
    if not context.json:
        context.say(table(chosen, lacks, command))
    return 3 if any(set(lack.verbs) & decisive for lack in lacks) else 0


def read_needs(file: Path) -> tuple[Need, ...]:
    """Parse ``needs.txt``.

    Raises:
        Failed: a line has not four fields (the installation is damaged).
    """
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("|")]
        if len(fields) != 4:
            raise Failed(f"{file}:{number} has {len(fields)} fields instead of 4", rule="installation")
        rows.append(Need(fields[0], fields[1], tuple(fields[2].split()), fields[3]))
    return tuple(rows)


def known_verbs(needs: Iterable[Need]) -> tuple[str, ...]:
    """Every verb that doctor can speak about, in the order of the list."""
    names = dict.fromkeys(verb for need in needs for verb in need.verbs)
    return (*names, *PURE_VERBS, *LIVE_VERBS, *BOOT_VERBS)


def in_checkout() -> bool:
    """Whether this kmend runs from its sources, and not as it was installed."""
    return (CHECKOUT / "pyproject.toml").is_file()


def is_there(proof: str, search: str | None = None) -> bool:
    """Whether a program is on the path (system folders included), or a file exists (``*`` as in a shell)."""
    if proof.startswith("/"):
        return any(True for _ in Path("/").glob(proof.lstrip("/")))
    path = search if search is not None else os.environ.get("PATH", os.defpath)
    return shutil.which(proof, path=os.pathsep.join((path, *SYSTEM_PATHS))) is not None


def missing(
    needs: Iterable[Need],
    cache: Path,
    there: Callable[[str], bool] = is_there,
    machine: str | None = None,
) -> list[Lack]:
    """All that lacks: packages, Python libraries, the architecture, room in the cache."""
    needs = tuple(needs)
    lacks = [
        Lack(need.proof, need.purpose, need.verbs, need.package, f"apt-get install {need.package}")
        for need in needs
        if not there(need.proof)
    ]
    verbs = known_verbs(needs)
    lacks.extend(
        Lack(f"Python library {dist}", "kmend imports it", verbs, "", library_command(dist))
        for module, dist in LIBRARIES
        if not importable(module)
    )
    machine = machine or platform.machine()
    if machine != "x86_64":
        lacks.append(
            Lack(
                f"an x86-64 machine (this is {machine})",
                "targets are amd64 kernels, and their compiler runs on amd64",
                ("kernel", "build"),
                "",
                "use an amd64 machine",
            )
        )
    lacks.extend(cache_lacks(cache))
    return lacks


def library_command(dist: str) -> str:
    """What brings back a library: the checkout's environment has it, or the Debian package."""
    return f"make, or pip install {dist}" if in_checkout() else "apt-get install --reinstall kmend"


def known_kernel() -> KernelState | None:
    """The running kernel; None where ``/proc`` or ``/sys`` cannot be read."""
    try:
        return read_kernel(Place())
    except KmendError:
        return None


def live_lacks(kernel: KernelState | None) -> list[Lack]:
    """What keeps the running kernel from being patched: nothing that a package could bring."""
    if kernel is None or not kernel.livepatch:
        name = kernel.release if kernel is not None else "the running kernel"
        return [
            Lack(
                "a kernel with livepatching",
                f"there is no {Place().livepatch}: {name} was built without CONFIG_LIVEPATCH, or this is "
                "a container or a chroot without /sys",
                LIVE_VERBS,
                "",
                "only for patching this very machine: boot a kernel with CONFIG_LIVEPATCH, as Debian's are",
            )
        ]
    lacks = []
    if kernel.modules_disabled:
        lacks.append(
            Lack(
                "a kernel that loads modules",
                "kernel.modules_disabled is 1, and stays so until the next boot",
                ("load",),
                "",
                "find out who sets it (grep -r modules_disabled /etc), and reboot",
            )
        )
    if kernel.ftrace_enabled is False:
        lacks.append(
            Lack(
                "ftrace, by which calls are redirected",
                "it has shut itself down after a fault (see dmesg)"
                if kernel.ftrace_dead
                else "kernel.ftrace_enabled is 0",
                ACTING_VERBS,
                "",
                "reboot" if kernel.ftrace_dead else "sysctl kernel.ftrace_enabled=1",
            )
        )
    return lacks


def boot_lacks(folders: Iterable[Path] = UNIT_FOLDERS) -> list[Lack]:
    """Whether there is a unit that loads what is installed."""
    if any((folder / UNIT).exists() for folder in folders):
        return []
    return [
        Lack(
            f"the unit {UNIT}",
            "what is installed is loaded by it at boot",
            BOOT_VERBS,
            "",
            "install the Debian package (make deb); docs/boot.md has a way without systemd",
        )
    ]


def importable(module: str) -> bool:
    """Whether a module would be found, without importing it (its parents are)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def cache_lacks(cache: Path) -> list[Lack]:
    """Whether the cache can be written and has room for one more target."""
    folder = cache
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK) or not folder.is_dir():
        return [
            Lack(
                f"a cache that can be written ({cache})",
                f"{folder} is not a folder that this user may write",
                ("kernel", "build", "try"),
                "",
                "name another one with --cache DIR or KMEND_CACHE",
            )
        ]
    free = shutil.disk_usage(folder).free
    if free >= ROOM_PER_TARGET:
        return []
    return [
        Lack(
            f"room in {cache}",
            f"{free / 1e9:.1f} GB free; preparing a target takes up to {ROOM_PER_TARGET / 1e9:.0f} GB",
            ("kernel", "build"),
            "",
            "free space, or name another folder with --cache DIR",
        )
    ]


def apt_command(lacks: Iterable[Lack]) -> str:
    """The one command that installs every lacking package; empty when none lacks."""
    packages = sorted({lack.package for lack in lacks if lack.package})
    if not packages:
        return ""
    sudo = "" if os.geteuid() == 0 else "sudo "
    update = "" if is_there(APT_LISTS) else f"{sudo}apt-get update && "
    return f"{update}{sudo}apt-get install --no-install-recommends {' '.join(packages)}"


def document(verbs: Iterable[str], lacks: list[Lack], command: str) -> dict[str, object]:
    """The JSON document of ``kmend doctor --json``."""
    return {
        "schema": 1,
        "verbs": {verb: not any(verb in lack.verbs for lack in lacks) for verb in verbs},
        "lacks": [
            {
                "what": row.what,
                "why": row.why,
                "verbs": list(row.verbs),
                "package": row.package,
                "next_step": row.mend,
            }
            for row in lacks
        ],
        "command": command,
    }


def table(verbs: Iterable[str], lacks: list[Lack], command: str) -> str:
    """The report for people."""
    lines = []
    for verb in verbs:
        mine = [lack for lack in lacks if verb in lack.verbs]
        lines.append(f"{verb:9} {'ready' if not mine else 'lacks ' + ', '.join(lack.what for lack in mine)}")
    for lack in lacks:
        if not lack.package:
            lines.append(f"\n{lack.what}: {lack.why}\n  next: {lack.mend}")
    if command:
        lines.append(f"\nThis installs what lacks:\n  {command}")
    return "\n".join(lines)
