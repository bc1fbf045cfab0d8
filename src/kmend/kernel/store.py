"""The cache of prepared kernels: fetching a packaged kernel, part by part.

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
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Unable
from kmend.core.files import write_atomically
from kmend.core.progress import Progress
from kmend.core.run import Children
from kmend.core.target import Release, Target
from kmend.kernel import debian, packaging, prepare
from kmend.kernel.custom import custom
from kmend.kernel.folder import (
    SOURCE_ROOM,
    as_json,
    depmod,
    index_image,
    index_source,
    need_room,
    remove_quietly,
    remove_tree,
    size_on_disk,
    working,
    write_target,
)
from kmend.kernel.image import extract_vmlinux, read_banner, read_build_id
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
from kmend.kernel.work import Shared, Work, as_disk_full

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
    with working(config, release, progress) as work:
        if found := of_version(config, release, running):
            return found
        older = read(config, release, indexes=None)
        if older and (running in (None, older.source_version) or older.source_version == "custom"):
            return _index_anew(older, work.progress)
        prepare.need_tools()
        began = time.monotonic()
        packages = _find(config, work, release, running)
        return _build(config, work, packages, began)


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
    need_room(config, room - _present(downloads, packages))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        downloads.mkdir(parents=True, exist_ok=True)
        (folder / "target.json").unlink(missing_ok=True)
        patches = packaging.get(config, work, packages, downloads)
        try:
            target = _parallel(config, work, packages, patches, folder, downloads)
        except debian.GoneError:
            # the lists name what the server has no longer: once more with new ones
            lookup = debian.find(config, work, release, packages.version, anew=True)
            packages = lookup.found or _find_old(config, work, release, packages.version, lookup.trouble)
            target = _parallel(config, work, packages, patches, folder, downloads)
        index_source(target, work.progress)
        write_target(
            target,
            origin=packages.image.archive.title,
            packages=_record(packages, patches),
            seconds=round(time.monotonic() - began, 1),
        )
    except (KmendError, OSError) as error:
        reason = error if isinstance(error, KmendError) else prepare.os_error(error)
        reason = as_disk_full(reason) or reason
        if reason.rule in TRANSIENT:
            remove_quietly(folder / "headers")
            for place in (folder, downloads):
                with contextlib.suppress(OSError):
                    place.rmdir()  # when nothing in it is complete
        else:
            remove_quietly(folder, downloads)
        if reason is error:
            raise
        raise reason from error
    remove_quietly(downloads)
    return target


def _parallel(
    config: Config,
    work: Work,
    packages: debian.PackageSet,
    patches: packaging.Patches | None,
    folder: Path,
    downloads: Path,
) -> Target:
    """The parts side by side: the image is unpacked and indexed while the source is unpacked and prepared."""
    work = replace(work, children=Children())
    if _present(downloads, packages) < sum(p.size for p in packages.all):
        work.progress.step(_download_text(packages))
    parts = _Parts(config, work, packages, patches, folder, downloads)
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
    patches: packaging.Patches | None
    folder: Path
    downloads: Path

    def headers(self) -> _Headers:
        package = self.packages.headers
        deb = self._get(package)
        there = self.folder / "headers"
        remove_tree(self.work, there)
        unpack_deb(self.work, deb, there)
        found = list((there / "usr" / "src").glob(f"linux-headers-{self.packages.release}"))
        if len(found) != 1:
            raise _bad_package(package, "it has no folder usr/src/linux-headers-RELEASE")
        root = found[0]
        for name in (".config", "Module.symvers", ".kernelvariables"):
            if not (root / name).is_file():
                raise _bad_package(package, f"it has no {name}")
        if not re.search(r"^CONFIG_LIVEPATCH=y$", (root / ".config").read_text(), re.MULTILINE):
            raise Unable(
                f"{self.packages.release} cannot be live-patched",
                why="its configuration has no CONFIG_LIVEPATCH=y",
                next_step="boot a kernel that has it",
                rule="no-livepatch",
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
            depmod(self.work, root, release)
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
        index_image(image.result(), self.work.progress)

    def source(self, headers: Future[_Headers], image: Future[Target]) -> Target:
        package, folder, patches = self.packages.source, self.folder, self.patches
        made_of = [package.sha256, self.packages.headers.sha256]
        if patches:
            made_of.append(patches.packaging.sha256)

        def build() -> dict[str, str]:
            deb = self._get(package)
            self.work.progress.step("unpacking the kernel source")
            unpack_source(self.work, deb, folder / "source")
            if patches:
                patches.apply(self.work, folder / "source", folder / "patches")
                remove_tree(self.work, folder / "patches")
            parts, target = headers.result(), image.result()
            make = prepare.variables(prepare.parse_banner(target.banner), parts.compiler, parts.package_id)
            prepare.configure(self.work, folder / "source", folder / "config", folder / "symvers", make)
            prepare.compare_generated(folder / "source", parts.root)
            return {}

        _stage(self.work, folder, "source", " ".join(made_of), ("source", "patches"), build)
        target = image.result()
        remove_tree(self.work, folder / "headers")
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
        remove_tree(work, folder / part)
    try:
        made = build()
    except BaseException:
        remove_quietly(*(folder / part for part in parts))
        raise
    write_atomically(record, as_json({"schema": SCHEMA, "key": key, "facts": made}))
    return made


def _index_anew(target: Target, progress: Progress) -> Target:
    """Give a target that an older kmend prepared the indexes that this one reads."""
    record = load_record(target.folder / "target.json") or {}
    index_image(target, progress)
    index_source(target, progress)
    write_atomically(target.folder / "target.json", as_json({**record, "indexes": INDEXES}))
    return target


def _modules_root(image: Path) -> Path:
    """The folder that ``lib/modules`` lies in: packages of Debian 13 and later have it below ``usr``."""
    return image if (image / "lib" / "modules").is_dir() else image / "usr"


def _record(packages: debian.PackageSet, patches: packaging.Patches | None) -> list[dict[str, object]]:
    """The files that the target was made of, for its record."""
    rows: list[dict[str, object]] = [
        {"name": p.name, "version": p.version, "sha256": p.sha256, "size": p.size} for p in packages.all
    ]
    if patches:
        p = patches.packaging
        rows.append({"name": p.file_name, "version": p.version, "sha256": p.sha256, "size": p.size})
    return rows


def _download_text(packages: debian.PackageSet) -> str:
    return f"downloading {sum(p.size for p in packages.all) / 1e6:.0f} MB of packages"


def _present(downloads: Path, packages: debian.PackageSet) -> int:
    return sum(min(p.size, _size(downloads / p.file_name)) for p in packages.all)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _bad_package(package: debian.Package, why: str) -> Failed:
    return Failed(
        f"the package {package.file_name} is not what was expected",
        why=why,
        next_step="check the release's name; if it is right, please report this",
        rule="bad-package",
    )
