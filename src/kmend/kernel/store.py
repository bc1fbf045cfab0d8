"""The cache of prepared kernels: fetching, opening, listing, making one of the user's own parts.

Layout below ``config.targets``, one folder per target (``RELEASE``, or ``RELEASE@custom``)::

    target.json    what :class:`Target` is made of; written last, so a target is complete or absent
    image.json     written when image/ is complete: which package it came from
    source.json    written when source/ is unpacked and prepared
    config symvers the packaged configuration and symbol versions
    headers/       generated headers of the headers package (the record that source/ was compared with)
    image/         boot/ and lib/modules/RELEASE/ of the image package
    vmlinux        extracted from the vmlinuz
    source/        the configured, prepared tree

A killed run leaves a part without its record; the next one removes and remakes that part. Downloaded
packages (``config.downloads/KEY``) are kept until the target is complete.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Refusal, Refused, Unable, UsageError
from kmend.core.files import write_atomically
from kmend.core.progress import Progress
from kmend.core.run import Children, run
from kmend.core.target import Release, Target
from kmend.kernel import debian, kallsyms, prepare, units
from kmend.kernel import modules as modules_index
from kmend.kernel.image import Banner, Bytes, extract_vmlinux, mapped, read_banner, read_build_id
from kmend.kernel.prepared import (
    CUSTOM,
    INDEXES,
    SCHEMA,
    list_targets,
    load_record,
    name_of,
    of_version,
    open_target,
    read,
    ready,
    record_of,
    running_version,
)
from kmend.kernel.snapshot import Snapshot
from kmend.kernel.unpack import decompress_modules, unpack_deb, unpack_source
from kmend.kernel.work import Shared, Work, as_disk_full, disk_full, owned

__all__ = [
    "custom",
    "fetch",
    "fetch_packaged",
    "list_targets",
    "name_of",
    "open_target",
    "record_of",
    "size_on_disk",
]

#: Bytes that a target needs besides its packages: source 1.5 GB, vmlinux and indexes 0.2 GB (measured).
SOURCE_ROOM = 1_750_000_000
#: Files and folders of one source tree and one image, rounded up (83,000 + 5,000 for 6.1; 6.12 has more).
INODES = 110_000
#: Failures after which what is complete so far serves the next run; after others nothing is left.
TRANSIENT = frozenset({"no-network", "download", "timeout", "stopped"})
#: How often the size of running downloads is looked at, in seconds.
POLL = 0.2


def fetch(config: Config, release: Release, progress: Progress) -> Target:
    """As :func:`fetch_packaged`, but a custom target of that release serves when only it is prepared."""
    return ready(config, release) or fetch_packaged(config, release, progress)


def fetch_packaged(config: Config, release: Release, progress: Progress) -> Target:
    """Make the target ``release`` ready: download, verify, unpack, prepare, index. At once when it is ready.

    May be run again after any interruption, and by several processes at once: one works, the others wait.

    Raises:
        Unable: ``unknown-release``, ``no-network``, ``unauthenticated``, ``wrong-compiler``,
            ``config-drift``, ``generated-drift``, ``missing-tool``.
        Failed: ``disk-full``, ``unwritable``, ``corrupt-package``, ``bad-package`` or a tool failed; no part
            that is not complete is left behind.
    """
    running = running_version(release)
    if found := of_version(config, release, running):
        return found
    older = read(config, release, indexes=None)
    if release.endswith(CUSTOM) and not older:
        return open_target(config, release)  # says that there is none
    debian.line_of(release)
    with _working(config, release, progress) as work:
        if found := of_version(config, release, running):
            return found
        older = read(config, release, indexes=None)
        if older and (running in (None, older.source_version) or older.source_version == "custom"):
            return _index_anew(older, work.progress)
        prepare.need_tools()
        began = time.monotonic()
        packages = _find(config, work, release, running)
        return _build(config, work, packages, began)


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
    with _working(config, Release(key), progress) as work:
        compiler = _custom_compiler(banner)
        prepare.need_compiler(banner, compiler)
        folder = config.targets / key
        _need_room(config, SOURCE_ROOM)
        _remove(work, folder)
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
            _index_image(target, progress)
            _index_source(target, progress)
            inputs = {"source": source, "config": config_file, "vmlinux": vmlinux, "modules": modules,
                      "symvers": symvers}  # fmt: skip
            _write(
                target,
                origin="custom",
                inputs={k: str(v.absolute()) for k, v in inputs.items() if v},
                seconds=round(time.monotonic() - began, 1),
            )
        except BaseException:
            _remove_quietly(folder)
            raise
        return target


# --- a packaged target, part by part ----------------------------------------------------------------


def _find(config: Config, work: Work, release: Release, version: str | None) -> debian.PackageSet:
    """The packages of ``release``, from the archive or else from the snapshot archive."""
    work.progress.step(f"looking up the packages of {release}")
    lookup = debian.find(config, work, release, version)
    if lookup.found:
        return lookup.found
    return _find_old(config, work, release, version or lookup.version, lookup.trouble)


def _find_old(
    config: Config, work: Work, release: Release, version: str | None, trouble: KmendError | None
) -> debian.PackageSet:
    work.progress.step(f"looking for {release} in {config.mirror}")
    offline: KmendError | None = None
    try:
        if found := Snapshot(config, work).find(release, version):
            return found
    except debian.OfflineError as error:
        offline = error
    if offline is not None and trouble is not None:
        raise Unable(
            f"the packages of {release} cannot be looked up",
            why=f"{trouble.why}\n{offline.why}",
            next_step=trouble.next_step,
            rule="no-network" if isinstance(trouble, debian.OfflineError) else trouble.rule,
        )
    close = debian.near(work, config, release)
    raise Unable(
        f"no packages of the kernel {release} were found",
        why=(f"the archive has its image ({version}) but not all of its parts, and " if version else "")
        + (
            f"it is not in the package archive, and {config.mirror} was not reached ({offline.why})"
            if offline
            else f"neither the package archive nor {config.mirror} has it"
        )
        + (f"\nthe archive's lists could not be fetched anew: {trouble.why}" if trouble else ""),
        next_step=f"releases that do exist: {', '.join(close)}" if close else "check the release's name",
        rule="unknown-release",
    )


def _build(config: Config, work: Work, packages: debian.PackageSet, began: float) -> Target:
    """Download and prepare; source and image in parallel."""
    release = packages.release
    folder, downloads = config.targets / release, config.downloads / release
    room = SOURCE_ROOM + packages.image.installed + sum(p.size for p in packages.all)
    _need_room(config, room - _present(downloads, packages))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        downloads.mkdir(parents=True, exist_ok=True)
        (folder / "target.json").unlink(missing_ok=True)
        try:
            target = _parallel(config, work, packages, folder, downloads)
        except debian.GoneError:
            # the lists name what the server has no longer: once more with new ones
            lookup = debian.find(config, work, release, packages.version, anew=True)
            packages = lookup.found or _find_old(config, work, release, packages.version, lookup.trouble)
            target = _parallel(config, work, packages, folder, downloads)
        _index_source(target, work.progress)
        _write(
            target,
            origin=packages.image.archive.title,
            packages=[
                {"name": p.name, "version": p.version, "sha256": p.sha256, "size": p.size}
                for p in packages.all
            ],
            seconds=round(time.monotonic() - began, 1),
        )
    except (KmendError, OSError) as error:
        reason = error if isinstance(error, KmendError) else prepare.os_error(error)
        reason = as_disk_full(reason) or reason
        if reason.rule in TRANSIENT:
            _remove_quietly(folder / "headers")
            for place in (folder, downloads):
                with contextlib.suppress(OSError):
                    place.rmdir()  # when nothing in it is complete
        else:
            _remove_quietly(folder, downloads)
        if reason is error:
            raise
        raise reason from error
    _remove_quietly(downloads)
    return target


def _parallel(
    config: Config, work: Work, packages: debian.PackageSet, folder: Path, downloads: Path
) -> Target:
    """The parts side by side: the image is unpacked and indexed while the source is unpacked and prepared."""
    work = replace(work, children=Children())
    if _present(downloads, packages) < sum(p.size for p in packages.all):
        work.progress.step(_download_text(packages))
    parts = _Parts(config, work, packages, folder, downloads)
    with ThreadPoolExecutor(max_workers=4, thread_name_prefix="kmend-fetch") as pool:
        headers = pool.submit(parts.headers)
        image = pool.submit(parts.image, headers)
        index = pool.submit(parts.index, image)
        source = pool.submit(parts.source, headers, image)
        try:
            _watch(work, packages, downloads, (headers, image, index, source))
        except BaseException:
            # end the other parts' children: leaving the pool waits for them
            work.children.stop()
            raise
    return source.result()


def _watch(work: Work, packages: debian.PackageSet, downloads: Path, futures: Sequence[Future[Any]]) -> None:
    """Wait for the parts, showing how far the downloads are; raise the failure that came first."""
    total = sum(p.size for p in packages.all)
    names = [p.file_name for p in packages.all]
    text = _download_text(packages)
    progress = work.progress
    pending: set[Future[Any]] = set(futures)
    shown = time.monotonic()
    while pending:
        finished, pending = wait(pending, timeout=POLL, return_when=FIRST_EXCEPTION)
        errors = [e for f in finished if (e := f.exception())]
        if errors:
            raise min(errors, key=lambda e: isinstance(e, KmendError) and e.rule == "stopped")
        done = sum(_size(downloads / name) for name in names)
        if 0 < done < total and pending:
            if isinstance(progress, Shared) and progress.text != text and time.monotonic() - shown > 2.0:
                progress.step(text)
                shown = time.monotonic()
            progress.amount(done, total)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the parts of one fetch have in common; each method is one part and runs in its own thread."""

    config: Config
    work: Work
    packages: debian.PackageSet
    folder: Path
    downloads: Path

    def headers(self) -> _Headers:
        package = self.packages.headers
        deb = self._get(package)
        there = self.folder / "headers"
        _remove(self.work, there)
        unpack_deb(self.work, deb, there)
        found = list((there / "usr" / "src").glob(f"linux-headers-{self.packages.release}"))
        if len(found) != 1:
            raise _bad_package(package, "it has no folder usr/src/linux-headers-RELEASE")
        root = found[0]
        for name in (".config", "Module.symvers", ".kernelvariables"):
            if not (root / name).is_file():
                raise _bad_package(package, f"it has no {name}")
        if re.search(r"^CONFIG_PREEMPT_RT=y$", (root / ".config").read_text(), re.MULTILINE):
            raise Unable(
                f"{self.packages.release} is a real-time kernel",
                why="Debian builds it with the patches of debian/patches-rt, which "
                f"{self.packages.source.name} does not contain",
                next_step="apply those patches of the source package to a tree and name it: "
                "kmend kernel fetch --source DIR --config FILE --vmlinux FILE",
                rule="rt-source",
            )
        shutil.copyfile(root / ".config", self.folder / "config")
        shutil.copyfile(root / "Module.symvers", self.folder / "symvers")
        return _Headers(
            root=root,
            compiler=prepare.compiler_in((root / ".kernelvariables").read_text()),
            package_id=prepare.package_id_in(root / "include/generated/package.h"),
        )

    def image(self, headers: Future[_Headers]) -> Target:
        package, release, folder = self.packages.image, self.packages.release, self.folder

        def build() -> dict[str, str]:
            deb = self._get(package)
            self.work.progress.step("unpacking the kernel image and its modules")
            unpack_deb(self.work, deb, folder / "image")
            root = _modules_root(folder / "image")
            vmlinuz = folder / "image" / "boot" / f"vmlinuz-{release}"
            if not vmlinuz.is_file() or not (root / "lib/modules" / release).is_dir():
                raise _bad_package(package, "it has no boot/vmlinuz or no modules")
            vmlinux = extract_vmlinux(vmlinuz.read_bytes())
            write_atomically(folder / "vmlinux", vmlinux)
            decompress_modules(self.work, root / "lib" / "modules" / release)
            _depmod(self.work, root, release)
            return {"banner": read_banner(vmlinux).text, "build_id": read_build_id(vmlinux)}

        facts = _stage(self.work, folder, "image", package.sha256, ("image", "vmlinux"), build)
        banner = prepare.parse_banner(facts["banner"])
        if banner.release != release:
            raise _bad_package(package, f"its kernel says that it is {banner.release}")
        compiler = headers.result().compiler
        prepare.need_compiler(banner, compiler)
        return Target(
            release=release,
            source_version=self.packages.version,
            banner=banner.text,
            build_id=facts["build_id"],
            folder=folder,
            source=folder / "source",
            config=folder / "config",
            symvers=folder / "symvers",
            vmlinux=folder / "vmlinux",
            vmlinuz=folder / "image" / "boot" / f"vmlinuz-{release}",
            modules=_modules_root(folder / "image") / "lib" / "modules" / release,
            compiler=compiler,
        )

    def index(self, image: Future[Target]) -> None:
        _index_image(image.result(), self.work.progress)

    def source(self, headers: Future[_Headers], image: Future[Target]) -> Target:
        package, folder = self.packages.source, self.folder

        def build() -> dict[str, str]:
            deb = self._get(package)
            self.work.progress.step("unpacking the kernel source")
            unpack_source(self.work, deb, folder / "source")
            parts, target = headers.result(), image.result()
            make = prepare.variables(prepare.parse_banner(target.banner), parts.compiler, parts.package_id)
            prepare.configure(self.work, folder / "source", folder / "config", folder / "symvers", make)
            prepare.compare_generated(folder / "source", parts.root)
            return {}

        _stage(
            self.work,
            folder,
            "source",
            f"{package.sha256} {self.packages.headers.sha256}",
            ("source",),
            build,
        )
        target = image.result()
        _remove(self.work, folder / "headers")
        return target

    def _get(self, package: debian.Package) -> Path:
        return package.archive.download(self.work, package, self.downloads)


@dataclass(frozen=True, slots=True)
class _Headers:
    """What the headers package says."""

    root: Path
    compiler: str
    package_id: str


def _stage(
    work: Work,
    folder: Path,
    name: str,
    key: str,
    parts: Sequence[str],
    build: Callable[[], dict[str, str]],
) -> dict[str, str]:
    """Make a part unless its record says that it is complete and made of ``key``."""
    record = folder / f"{name}.json"
    if (known := load_record(record)) and known.get("schema") == SCHEMA and known.get("key") == key:
        facts = known.get("facts")
        if isinstance(facts, dict):
            return facts
    record.unlink(missing_ok=True)
    for part in parts:
        _remove(work, folder / part)
    try:
        made = build()
    except BaseException:
        _remove_quietly(*(folder / part for part in parts))
        raise
    write_atomically(record, _json({"schema": SCHEMA, "key": key, "facts": made}))
    return made


def _index_image(target: Target, progress: Progress) -> None:
    kallsyms.build_index(target, progress)
    modules_index.build_index(target, progress)


def _index_source(target: Target, progress: Progress) -> None:
    units.build_unit_index(target, progress)


def _index_anew(target: Target, progress: Progress) -> Target:
    """Give a target that an older kmend prepared the indexes that this one reads."""
    record = load_record(target.folder / "target.json") or {}
    _index_image(target, progress)
    _index_source(target, progress)
    write_atomically(target.folder / "target.json", _json({**record, "indexes": INDEXES}))
    return target


def _depmod(work: Work, root: Path, release: str) -> None:
    if not (root / "lib" / "modules" / release / "modules.dep").exists():
        work.run([prepare.find_program("depmod") or "depmod", "-b", root, release])


def _modules_root(image: Path) -> Path:
    """The folder that ``lib/modules`` lies in: packages of Debian 13 and later have it below ``usr``."""
    return image if (image / "lib" / "modules").is_dir() else image / "usr"


# --- a custom target ---------------------------------------------------------------------------------


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
    _depmod(work, into.parents[2], release)


# --- records, locks, room ----------------------------------------------------------------------------


@contextmanager
def _working(config: Config, key: Release, progress: Progress) -> Iterator[Work]:
    """Hold the lock of one target; errors of the system leave as ours."""
    try:
        config.targets.mkdir(parents=True, exist_ok=True)
        with owned(
            config.targets / f".{key}.lock",
            on_wait=lambda: progress.step(f"another kmend is preparing {key}; waiting for it"),
        ) as lock:
            work = Work(progress=Shared(progress), lock=lock, jobs=config.jobs)
            try:
                yield work
            except BaseException:
                work.children.stop()
                raise
    except OSError as error:
        raise prepare.os_error(error) from error


def _write(target: Target, **record: object) -> None:
    """Write ``target.json``: from here on the target exists. Relative paths let a cache be moved."""
    names = ("source", "config", "symvers", "vmlinux", "vmlinuz", "modules")
    paths = {n: str(p.relative_to(target.folder)) for n in names if (p := getattr(target, n)) is not None}
    document = {
        "schema": SCHEMA,
        "release": target.release,
        "source_version": target.source_version,
        "banner": target.banner,
        "build_id": target.build_id,
        "compiler": target.compiler,
        **paths,
        **record,
        "indexes": INDEXES,
        "size": size_on_disk(target.folder),
    }
    write_atomically(target.folder / "target.json", _json(document))


def size_on_disk(folder: Path) -> int | None:
    """Bytes that a folder takes on the disk (counts every file: a second or more); None: cannot be told."""
    try:
        result = run(["du", "-s", "-B1", "--", folder], check=False, timeout=300)
    except KmendError:
        return None
    first = result.text.split("\t", 1)[0]
    return int(first) if first.isdigit() else None


def _json(document: object) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _need_room(config: Config, room: int) -> None:
    """Raise ``disk-full`` before anything is downloaded when the target cannot fit."""
    there = config.targets
    space = os.statvfs(there)
    free = space.f_bavail * space.f_frsize
    if free < room:
        raise disk_full(f"{there} has {free / 1e9:.2f} GB free, the kernel needs {room / 1e9:.2f} GB")
    if space.f_files and space.f_favail < INODES:
        raise disk_full(f"{there} has room for {space.f_favail} more files, the kernel needs {INODES}")


def _download_text(packages: debian.PackageSet) -> str:
    return f"downloading {sum(p.size for p in packages.all) / 1e6:.0f} MB of packages"


def _present(downloads: Path, packages: debian.PackageSet) -> int:
    return sum(min(p.size, _size(downloads / p.file_name)) for p in packages.all)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _remove(work: Work, path: Path) -> None:
    if path.is_symlink() or path.exists():
        work.run(["rm", "-rf", "--", path])


def _remove_quietly(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _bad_package(package: debian.Package, why: str) -> Failed:
    return Failed(
        f"the package {package.file_name} is not what was expected",
        why=why,
        next_step="check the release's name; if it is right, please report this",
        rule="bad-package",
    )
