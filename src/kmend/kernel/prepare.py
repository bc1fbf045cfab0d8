"""A source tree that compiles the target's units as the target's own build did.

The packaged configuration is put into the source, kbuild is asked to complete it
(``olddefconfig``) and to make what units need (``modules_prepare``). Then the result is held
against the packages: a configuration that changed, or generated headers that differ from the
packaged ones (``asm-offsets.h``, ``autoconf.h``, ``bounds.h``, …), mean another kernel and are refused.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kmend.core.errors import Failed, KmendError, Refusal, Unable
from kmend.core.run import run
from kmend.core.target import Target
from kmend.kernel.image import Banner, read_banner
from kmend.kernel.work import FULL, Work, disk_full


@dataclass(frozen=True, slots=True)
class Tool:
    """Something that preparing a kernel needs (a program, or a C header: ``<libelf.h>``), and its package."""

    name: str
    package: str
    why: str


#: The compiler itself is checked by :func:`compiler_matches`, which also says which one is needed.
TOOLS = (
    Tool("make", "make", "kbuild"),
    Tool("gcc", "gcc", "kbuild's own tools"),
    Tool("ld", "binutils", "kbuild's own tools"),
    Tool("flex", "flex", "kconfig"),
    Tool("bison", "bison", "kconfig"),
    Tool("bc", "bc", "the kernel's timeconst.h"),
    Tool("perl", "perl", "kbuild's scripts"),
    Tool("pahole", "dwarves", "without it kconfig drops the BTF options of the target"),
    Tool("tar", "tar", "unpacking"),
    Tool("xz", "xz-utils", "unpacking"),
    Tool("depmod", "kmod", "modules.dep"),
    Tool("<libelf.h>", "libelf-dev", "objtool"),
    Tool("<openssl/opensslv.h>", "libssl-dev", "sign-file"),
)

#: Where programs lie that an ordinary user's PATH may lack.
SBIN = "/usr/sbin:/sbin"


def missing_tools(tools: tuple[Tool, ...] | None = None) -> tuple[Tool, ...]:
    """The rows of ``tools`` (by default :data:`TOOLS`) that this machine lacks."""
    tools = TOOLS if tools is None else tools
    lacking = [t for t in tools if not t.name.startswith("<") and not find_program(t.name)]
    if any(t.name == "gcc" for t in lacking):
        return tuple(lacking)  # headers can only be asked of a compiler
    for tool in tools:
        if tool.name.startswith("<"):
            text = f"#include {tool.name}\n".encode()
            if run(["gcc", "-E", "-x", "c", "-o", "/dev/null", "-"], stdin=text, check=False).status != 0:
                lacking.append(tool)
    return tuple(lacking)


def find_program(name: str) -> str | None:
    """The path of a program, looked for in PATH and in the places of system programs."""
    return shutil.which(name) or shutil.which(name, path=SBIN)


def need_tools(tools: tuple[Tool, ...] | None = None) -> None:
    """Raise Unable (rule ``missing-tool``) naming every tool and package that is lacking."""
    if lacking := missing_tools(tools):
        raise Unable(
            f"this machine lacks {', '.join(t.name for t in lacking)}",
            why="; ".join(f"{t.name}: {t.why}" for t in lacking),
            next_step=f"apt-get install {' '.join(dict.fromkeys(t.package for t in lacking))}",
            rule="missing-tool",
        )


def compiler_in(kernelvariables: str) -> str:
    """The compiler's command named by the headers package's ``.kernelvariables``.

    6.1: ``CC = $(if …) $(CROSS_COMPILE)gcc-12`` with no CROSS_COMPILE for a native build; 6.12 adds
    ``override CROSS_COMPILE = x86_64-linux-gnu-`` unconditionally.

    Raises:
        Failed: rule ``bad-package``: no compiler is named.
    """
    prefix, command, depth = "", "", 0
    for line in kernelvariables.splitlines():
        word = line.split()
        if line.startswith(("ifeq", "ifneq", "ifdef", "ifndef")):
            depth += 1
        elif line.startswith("endif"):
            depth -= 1
        elif match := re.match(r"CC\s*:?=.*?(\$\(CROSS_COMPILE\))?([A-Za-z0-9_.+-]+)\s*$", line):
            command = match[2]
        elif depth == 0 and word[:3] == ["override", "CROSS_COMPILE", "="]:
            prefix = word[3] if len(word) > 3 and "$" not in word[3] else ""
    if not command:
        raise Failed(
            "the headers package names no compiler",
            why="its .kernelvariables has no line CC = …",
            rule="bad-package",
        )
    return prefix + command


@dataclass(frozen=True, slots=True)
class Change:
    """An option whose value differs; None: not set."""

    option: str
    old: str | None
    new: str | None

    def __str__(self) -> str:
        return f"{self.option}: {self.old or 'not set'} -> {self.new or 'not set'}"


@dataclass(frozen=True, slots=True)
class Harmless:
    """Options that cannot reach code, and why."""

    pattern: re.Pattern[str]
    why: str


HARMLESS = (
    Harmless(
        re.compile(r"CONFIG_CC_VERSION_TEXT"),
        "text; names the compiler, which is compared with the banner by itself",
    ),
    Harmless(
        re.compile(r"CONFIG_PAHOLE_VERSION|CONFIG_PAHOLE_HAS_(SPLIT_BTF|LANG_EXCLUDE)"),
        "only say how BTF is made when vmlinux and modules are linked; no source file tests them",
    ),
    Harmless(
        re.compile(r"CONFIG_(RUSTC|BINDGEN)_VERSION(_TEXT)?|CONFIG_RUSTC_LLVM_VERSION|CONFIG_RUST_IS_AVAILABLE|"
                   r"CONFIG_RUSTC_HAS_\w+|CONFIG_RUSTC_SUPPORTS_\w+|CONFIG_HAVE_RUST"),
        "say which Rust tools the building machine has; Debian builds without CONFIG_RUST",
    ),
    Harmless(
        re.compile(r"CONFIG_CC_CAN_LINK(_STATIC)?"),
        "whether programs for user space can be linked; tested by samples and bpfilter's helper alone, "
        "whose own options are compared",
    ),
)  # fmt: skip

_SET = re.compile(r"^(CONFIG_\w+)=(.*)$", re.MULTILINE)
_DEFINE = re.compile(r"^#define (CONFIG_\w+) (.*)$", re.MULTILINE)


def config_changes(old: str, new: str) -> tuple[Change, ...]:
    """The options whose meaning differs between two ``.config`` texts, by name.

    ``not set`` and absent are one. Options of :data:`HARMLESS` are left out.
    """
    return _changes(dict(_SET.findall(old)), dict(_SET.findall(new)))


def _changes(old: dict[str, str], new: dict[str, str]) -> tuple[Change, ...]:
    return tuple(
        Change(name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not any(row.pattern.fullmatch(name) for row in HARMLESS)
    )


def variables(banner: Banner, compiler: str, package_id: str) -> tuple[str, ...]:
    """The variables that every ``make`` in the prepared tree must be given, so that it changes nothing there.

    ``package_id`` is Debian's ``LINUX_PACKAGE_ID`` (`` Debian 6.1.192-1``), which lib/dump_stack.c and
    kernel/hung_task.c print; Debian's Makefile makes it of DISTRIBUTOR and DISTRIBUTION_VERSION.
    """
    distributor, _, version = package_id.strip().partition(" ")
    rows = [
        "ARCH=x86",
        f"CC={compiler}",
        f"KERNELRELEASE={banner.release}",
        f"KBUILD_BUILD_USER={banner.user}",
        f"KBUILD_BUILD_HOST={banner.host}",
        f"KBUILD_BUILD_VERSION={banner.number}",
        f"KBUILD_BUILD_TIMESTAMP={banner.timestamp}",
    ]
    if version:
        rows += [
            "DISTRIBUTION_OFFICIAL_BUILD=1",
            f"DISTRIBUTOR={distributor}",
            f"DISTRIBUTION_VERSION={version}",
        ]
    return tuple(rows)


def make_variables(target: Target) -> tuple[str, ...]:
    """As :func:`variables`, for a prepared target.

    Raises:
        Failed: the target's banner is not understood.
    """
    return variables(
        parse_banner(target.banner),
        target.compiler,
        package_id_in(target.source / "include/generated/package.h"),
    )


def parse_banner(text: str) -> Banner:
    """The parts of a banner's text, as kept in ``Target.banner``.

    Raises:
        Failed: rule ``no-banner``.
    """
    return read_banner(text.encode() + b"\n\0")


def package_id_in(header: Path) -> str:
    """The value of ``LINUX_PACKAGE_ID``; empty when the header is not there (not a Debian kernel)."""
    try:
        match = re.search(r'#define LINUX_PACKAGE_ID "(.*)"', header.read_text())
    except OSError:
        return ""
    return match[1] if match else ""


def configure(work: Work, source: Path, config: Path, symvers: Path | None, make: tuple[str, ...]) -> None:
    """Put the configuration and the symbol versions into ``source`` and prepare it for compiling units.

    Raises:
        Unable: rule ``config-drift``: kconfig changed options that reach code.
        Failed: make failed, or the disk is full.
    """
    jobs = f"-j{work.jobs}"
    try:
        shutil.copyfile(config, source / ".config")
        if symvers is not None:
            shutil.copyfile(symvers, source / "Module.symvers")
        before = config.read_text()
        work.progress.step("completing the configuration")
        work.run(["make", "-s", jobs, "olddefconfig", *make], cwd=source)
        changes = config_changes(before, (source / ".config").read_text())
    except OSError as error:
        raise os_error(error) from error
    if changes:
        raise _drift(changes)
    work.progress.step("preparing the source tree for compiling")
    work.run(["make", "-s", jobs, "modules_prepare", *make], cwd=source)


def _drift(changes: tuple[Change, ...]) -> Unable:
    shown = [str(c) for c in changes[:20]] + ([f"and {len(changes) - 20} more"] if len(changes) > 20 else [])
    return Unable(
        f"the kernel's configuration cannot be kept on this machine: {len(changes)} options change",
        why="\n".join(shown),
        next_step="install the tools that the target was built with (the compiler, and pahole from the "
        "package dwarves); options that are gone from the source mean that source and configuration do "
        "not belong together",
        rule="config-drift",
    )


#: Generated headers that are not compared: what they hold reaches init/version.o alone, or no C at all.
_NOT_COMPARED = {"compile.h", "utsversion.h", "rustc_cfg"}


def compare_generated(source: Path, packaged: Path) -> None:
    """Hold the prepared tree's generated headers against those of the headers package.

    ``asm-offsets.h`` and ``bounds.h`` are compiled from the kernel's structures: equal files mean
    that source, configuration and compiler agree on the layout of what they cover.

    Raises:
        Unable: rule ``config-drift`` (autoconf.h) or ``generated-drift``: a header differs.
    """
    try:
        for path in _generated(packaged):
            name = path.relative_to(packaged)
            ours = source / name
            if not ours.exists():
                continue  # made by a later step of a full build
            theirs_text, our_text = path.read_text(), ours.read_text()
            if theirs_text == our_text:
                continue
            if path.name == "autoconf.h":
                changes = _changes(dict(_DEFINE.findall(theirs_text)), dict(_DEFINE.findall(our_text)))
                if not changes:
                    continue
                raise _drift(changes)
            raise Unable(
                f"{name} comes out differently on this machine",
                why=_first_difference(theirs_text, our_text),
                next_step="install the compiler and binutils that the target was built with; if they are, "
                "please report this as an error of kmend",
                rule="generated-drift",
            )
    except OSError as error:
        raise os_error(error) from error


def _generated(packaged: Path) -> Iterator[Path]:
    for folder in ("include/generated", "arch/x86/include/generated"):
        for path in sorted((packaged / folder).rglob("*.h")):
            if path.name not in _NOT_COMPARED:
                yield path


def _first_difference(theirs: str, ours: str) -> str:
    their_lines, our_lines = theirs.splitlines(), ours.splitlines()
    for index in range(max(len(their_lines), len(our_lines))):
        one, other = (lines[index] if index < len(lines) else "(end)" for lines in (their_lines, our_lines))
        if one != other:
            return f"line {index + 1}: packaged: {one} - here: {other}"
    return "the line ends differ"


def compiler_matches(target: Target) -> Refusal | None:
    """None when this machine's compiler is the one that the kernel's own banner names; else the refusal.

    Called at each build: the compiler may have been upgraded since the target was prepared.
    Takes two program starts (some milliseconds).

    Raises:
        Failed: the target's banner is not understood.
    """
    return compiler_refusal(parse_banner(target.banner), target.compiler)


def compiler_refusal(banner: Banner, compiler: str) -> Refusal | None:
    """:func:`compiler_matches` by parts. What stands before the first space is the command and may differ."""
    for what, command, wanted, found in (
        ("compiler", compiler, banner.compiler, _first_line([compiler, "--version"])),
        ("linker", "ld", banner.linker, _linker_text(_first_line(["ld", "-v"]))),
    ):
        if found is not None and _without_command(what, found) == _without_command(what, wanted):
            continue
        return Refusal(
            rule="wrong-compiler",
            what=f"the target was built by another {what}",
            why=f"the kernel's banner says {wanted!r}; "
            + (f"{command} here is {found!r}" if found else f"{command} is not installed here"),
            next_step=_install_hint(what, wanted),
        )
    return None


def need_compiler(banner: Banner, compiler: str) -> None:
    """Raise Unable (rule ``wrong-compiler``) when :func:`compiler_refusal` has something to say."""
    if refusal := compiler_refusal(banner, compiler):
        raise Unable(refusal.what, why=refusal.why, next_step=refusal.next_step, rule=refusal.rule)


def _without_command(what: str, text: str) -> str:
    return text.partition(" ")[2] if what == "compiler" else text


def _linker_text(text: str | None) -> str | None:
    # as scripts/mkcompile_h trims it
    return None if text is None else re.sub(r"\(compatible with [^)]*\)", "", text).rstrip()


def _first_line(argv: list[str]) -> str | None:
    try:
        result = run(argv, check=False, timeout=30)
    except KmendError:
        return None
    return result.text.partition("\n")[0] if result.status == 0 else None


def _install_hint(what: str, wanted: str) -> str:
    if what == "linker":
        return "install the version of binutils that the banner names"
    match = re.match(r"(?:\S*-)?(gcc-\d+)\S* \(Debian ([^)]+)\)", wanted)
    if match:
        return f"apt-get install {match[1]}={match[2]} (or build on a machine that has it)"
    return f"install {wanted}"


def os_error(error: OSError) -> KmendError:
    """The error of the system as one of ours (a full disk is told apart)."""
    text = str(error)
    if FULL.search(text):
        return disk_full(text)
    return Failed(
        "kmend's cache cannot be used",
        why=text,
        next_step="make the folder readable and writable, or name another cache: KMEND_CACHE=DIR",
        rule="unwritable",
    )
