"""A target of the user's own parts (``RELEASE@custom``): source, configuration, vmlinux, modules.

Nobody has signed that the parts belong together, so everything that they tell about themselves is
compared first, and the tree is configured and checked like a packaged one.
"""

from __future__ import annotations

import gzip
import re
import shutil
import time
import zlib
from pathlib import Path

from kmend.core.config import Config
from kmend.core.errors import Refusal, Refused, UsageError
from kmend.core.files import write_atomically
from kmend.core.progress import Progress
from kmend.core.target import Release, Target
from kmend.kernel import prepare
from kmend.kernel.folder import (
    SOURCE_ROOM,
    depmod,
    index_image,
    index_source,
    need_room,
    remove_quietly,
    remove_tree,
    working,
    write_target,
)
from kmend.kernel.image import Banner, Bytes, extract_vmlinux, mapped, read_banner, read_build_id
from kmend.kernel.prepared import CUSTOM
from kmend.kernel.unpack import decompress_modules
from kmend.kernel.work import Work


def custom(
    config: Config,
    *,
    source: Path,
    config_file: Path,
    vmlinux: Path,
    modules: Path | None = None,
    symvers: Path | None = None,
    progress: Progress,
) -> Target:
    """Make a target of the user's own parts; its name is the release in the vmlinux's banner + ``@custom``.

    ``source`` is the tree that the kernel was built from; it is copied, never changed. ``vmlinux`` is
    the ELF file or a bzImage. ``modules`` is ``lib/modules/RELEASE``, which holds ``kernel/**.ko``.
    A custom target of the same release is replaced.

    Raises:
        UsageError: a path is not there or of the wrong kind; the symbol versions are missing but needed.
        Refused: rule ``custom-mismatch``: the parts do not belong together; lists every contradiction.
        Unable, Failed: as :func:`fetch`.
    """
    _check_paths(source, config_file, vmlinux, modules, symvers)
    began = time.monotonic()
    prepare.need_tools()
    with mapped(vmlinux) as data:
        is_image = data[:4] != b"\x7fELF"
        elf = extract_vmlinux(bytes(data)) if is_image else data
        banner, build_id = read_banner(elf), read_build_id(elf)
        config_text = config_file.read_text(errors="replace")
        _belong_together(source, config_text, elf, banner, modules)
    if symvers is None and (source / "Module.symvers").is_file():
        symvers = source / "Module.symvers"
    if symvers is None and re.search(r"^CONFIG_MODVERSIONS=y$", config_text, re.MULTILINE):
        raise UsageError(
            "the kernel's symbol versions are missing",
            why="its configuration has CONFIG_MODVERSIONS: a module without checksums is not loaded",
            next_step="name the Module.symvers of its build with --symvers",
            rule="custom-symvers",
        )
    release = Release(banner.release)
    key = f"{release}{CUSTOM}"
    with working(config, Release(key), progress) as work:
        compiler = _custom_compiler(banner)
        prepare.need_compiler(banner, compiler)
        folder = config.targets / key
        need_room(config, SOURCE_ROOM)
        remove_tree(work, folder)
        try:
            folder.mkdir(parents=True)
            shutil.copyfile(config_file, folder / "config")
            (folder / "symvers").write_bytes(symvers.read_bytes() if symvers else b"")
            if is_image:
                shutil.copyfile(vmlinux, folder / "vmlinuz")
                write_atomically(folder / "vmlinux", extract_vmlinux(vmlinux.read_bytes()))
            else:
                # debug data is no use to any stage and has ten times the size of the rest
                work.run(["strip", "--strip-debug", "-o", folder / "vmlinux", vmlinux])
            if modules is not None:
                progress.step("copying the modules")
                _copy_modules(work, modules, folder / "image" / "lib" / "modules" / release, release)
            progress.step("copying the source tree")
            _copy_tree(work, source, folder / "source")
            package_id = prepare.package_id_in(source / "include/generated/package.h") or (
                f" Debian {m[1]}" if (m := re.search(r"\bDebian (\S+) \(", banner.version)) else ""
            )
            make = prepare.variables(banner, compiler, package_id)
            if any(
                (folder / "source" / name).exists() for name in (".config", "include/config", "vmlinux.o")
            ):
                progress.step("removing what an earlier build left in the copy")
                work.run(["make", "-s", "mrproper", *make], cwd=folder / "source")
            prepare.configure(
                work, folder / "source", folder / "config", folder / "symvers" if symvers else None, make
            )
            target = Target(
                release=release,
                source_version="custom",
                banner=banner.text,
                build_id=build_id,
                folder=folder,
                source=folder / "source",
                config=folder / "config",
                symvers=folder / "symvers",
                vmlinux=folder / "vmlinux",
                vmlinuz=folder / "vmlinuz" if is_image else None,
                modules=folder / "image" / "lib" / "modules" / release if modules else None,
                compiler=compiler,
            )
            index_image(target, progress)
            index_source(target, progress)
            inputs = {"source": source, "config": config_file, "vmlinux": vmlinux, "modules": modules,
                      "symvers": symvers}  # fmt: skip
            write_target(
                target,
                origin="custom",
                inputs={k: str(v.absolute()) for k, v in inputs.items() if v},
                seconds=round(time.monotonic() - began, 1),
            )
        except BaseException:
            remove_quietly(folder)
            raise
        return target


def _check_paths(
    source: Path, config: Path, vmlinux: Path, modules: Path | None, symvers: Path | None
) -> None:
    wrong = [f"{p} is no folder" for p in (source, modules) if p is not None and not p.is_dir()]
    wrong += [f"{p} is no file" for p in (config, vmlinux, symvers) if p is not None and not p.is_file()]
    if not wrong and not (source / "Kbuild").is_file():
        wrong.append(f"{source} is no kernel source tree (it has no Kbuild)")
    if not wrong and modules is not None and not (modules / "kernel").is_dir():
        wrong.append(f"{modules} has no folder named kernel (lib/modules/RELEASE is meant)")
    if wrong:
        raise UsageError(
            wrong[0],
            why="; ".join(wrong[1:]),
            next_step="see `kmend kernel fetch --help`",
            rule="custom-paths",
        )


def _belong_together(source: Path, config: str, vmlinux: Bytes, banner: Banner, modules: Path | None) -> None:
    """Refuse parts that contradict each other; everything that they tell about themselves is compared."""
    found: list[Refusal] = []

    def mismatch(what: str, why: str) -> None:
        found.append(
            Refusal("custom-mismatch", what, why, "name the source, configuration and vmlinux of one build")
        )

    makefile = dict(
        re.findall(r"^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION) *= *(\S*)", _text(source / "Makefile"), re.M)
    )
    version = [makefile.get(k, "") for k in ("VERSION", "PATCHLEVEL", "SUBLEVEL")]
    # Debian's release carries an ABI number (6.1.0-55); the upstream version stands in its version text
    debian_version = re.search(r"\bDebian (\d+)\.(\d+)\.(\d+)", banner.version)
    stated = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", banner.release)
    kernel = list(debian_version.groups() if debian_version else stated.groups("0") if stated else ())
    if kernel[2:] == ["0"] and not debian_version:
        kernel = kernel[:2]  # as Ubuntu's 5.15.0-91: the third number says nothing
    if version[: len(kernel)] != kernel:
        mismatch(
            f"the source in {source} is not that of the vmlinux",
            f"its Makefile says {'.'.join(version)}, the vmlinux says {banner.release} {banner.version}",
        )
    header = re.search(r"^# Linux/(\S+) (\S+) Kernel Configuration", config, re.MULTILINE)
    if header and header[2] != ".".join(version) + makefile.get("EXTRAVERSION", ""):
        mismatch(
            "the configuration is not of this source",
            f"it was made for {header[2]}, the source's Makefile says {'.'.join(version)}",
        )
    options = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", config, re.MULTILINE))
    if "CONFIG_X86_64" not in options:
        mismatch("the configuration is not for amd64", "it has no CONFIG_X86_64=y")
    if "CONFIG_LIVEPATCH" not in options:
        mismatch("the kernel cannot be live-patched", "its configuration has no CONFIG_LIVEPATCH=y")
    compiler = options.get("CONFIG_CC_VERSION_TEXT", "").strip('"')
    if compiler and compiler.partition(" ")[2] != banner.compiler.partition(" ")[2]:
        mismatch(
            "configuration and vmlinux name different compilers",
            f"configuration: {compiler}; vmlinux: {banner.compiler}",
        )
    salt = options.get("CONFIG_BUILD_SALT", "").strip('"')
    if re.match(r"\d+\.\d+", salt) and salt != banner.release:
        mismatch(
            "the configuration is of another build",
            f"it was made for {salt}, the vmlinux is {banner.release}",
        )
    for option, word in (("CONFIG_SMP", "SMP"), ("CONFIG_PREEMPT_RT", "PREEMPT_RT")):
        if (option in options) != (word in banner.version.split()):
            mismatch(
                f"configuration and vmlinux disagree about {option}",
                f"the vmlinux's version is {banner.version!r}",
            )
    embedded = _embedded_config(vmlinux)
    if embedded is not None and (changes := prepare.config_changes(embedded, config)):
        mismatch(
            "the configuration is not the one inside the vmlinux",
            "; ".join(str(c) for c in changes[:8]) + (" …" if len(changes) > 8 else ""),
        )
    if modules is not None:
        sample = next((modules / "kernel").rglob("*.ko*"), None)
        if sample is not None and sample.suffix == ".ko":
            magic = re.search(rb"vermagic=(\S+) ", sample.read_bytes())
            made_for = magic[1].decode(errors="replace") if magic else banner.release
            if made_for != banner.release:
                mismatch(
                    f"the modules in {modules} are not of this kernel",
                    f"{sample.name} is for {made_for}, the vmlinux is {banner.release}",
                )
    if found:
        raise Refused(found)


def _embedded_config(vmlinux: Bytes) -> str | None:
    """The configuration that CONFIG_IKCONFIG puts into the image (kernel/configs.c: IKCFG_ST … IKCFG_ED)."""
    start, end = vmlinux.find(b"IKCFG_ST\x1f\x8b"), vmlinux.find(b"IKCFG_ED")
    if not 0 <= start < end:
        return None
    try:
        return gzip.decompress(vmlinux[start + 8 : end]).decode(errors="replace")
    except (OSError, EOFError, zlib.error):
        return None


def _custom_compiler(banner: Banner) -> str:
    """The command that the banner names, when it is here; else ``gcc`` (its version is compared later)."""
    command = banner.compiler.partition(" ")[0]
    return command if re.fullmatch(r"[A-Za-z0-9_.+-]+", command) and shutil.which(command) else "gcc"


def _copy_tree(work: Work, source: Path, into: Path) -> None:
    into.mkdir(parents=True)
    work.shell('tar -C "$1" --exclude=./.git -c . | tar -x -C "$2" --no-same-owner', source, into)


def _copy_modules(work: Work, modules: Path, into: Path, release: str) -> None:
    into.mkdir(parents=True)
    # build and source are links to trees that are no part of the modules
    work.shell(
        'tar -C "$1" --exclude=./build --exclude=./source -c . | tar -x -C "$2" --no-same-owner',
        modules,
        into,
    )
    decompress_modules(work, into)
    depmod(work, into.parents[2], release)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
