"""Debian's packages through apt: which belong together, and getting them, verified, without installing.

Every file is authenticated the way apt does it: the signature of ``InRelease`` is checked with the
keys of the source entry, ``InRelease`` holds the hash of ``Packages``, ``Packages`` the SHA-256 of the
package. ``apt-get download`` checks what it transfers; a file that already has the right size it takes
as it is, so kmend computes the SHA-256 of every file once more before it uses it.

One kernel is made of packages of one version (docs/decisions/0007-target-packages.md):

* ``linux-image-R`` (signed; built from another source package but with the same version),
* ``linux-headers-R``: ``.config``, ``Module.symvers``, generated headers, the compiler's name,
* ``linux-source-X.Y``: the patched source.

``linux-headers-…-common`` and ``linux-kbuild-X.Y`` belong to it as well but are not downloaded: every
file of the former is in the source too, and the tools of the latter are built from the source.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Unable
from kmend.core.files import locked, write_atomically
from kmend.core.target import Release
from kmend.kernel.prepared import RELEASE
from kmend.kernel.work import Work, disk_full

#: What apt says when it does not reach a server, as opposed to an answer that it does not like.
_OFFLINE = re.compile(
    r"Could not resolve|Temporary failure resolving|Could not connect|Unable to connect|"
    r"Network is unreachable|No route to host|Connection (?:refused|timed out|reset)|Connection failed|"
    r"Could not wait for server|Could not handshake",
    re.IGNORECASE,
)
#: A server that no longer has what the (old) lists name.
_GONE = re.compile(
    r"\b404\b|Size of file .* is not what|File has unexpected size|Hash Sum mismatch", re.IGNORECASE
)

#: The same for every apt: nothing unauthenticated, no sandbox user (who could not write in our cache).
_OPTIONS = (
    "APT::Sandbox::User=root",
    "APT::Get::AllowUnauthenticated=false",
    "Acquire::AllowInsecureRepositories=false",
    "Acquire::Retries=2",
    "Acquire::http::Timeout=30",
    "Acquire::https::Timeout=30",
)


@dataclass(frozen=True, slots=True)
class Package:
    """One package of one version. ``size`` in bytes; ``installed`` its unpacked size in bytes (about)."""

    name: str
    version: str
    architecture: str
    size: int
    sha256: str
    installed: int
    depends: str
    archive: Apt = field(repr=False, compare=False)
    source: str = ""

    @property
    def built_from(self) -> tuple[str, str]:
        """Name and version of the source package: its own, or what the field ``Source`` says."""
        match = re.fullmatch(r"(\S+)(?:\s+\(([^)]+)\))?", self.source.strip())
        return (match[1], match[2] or self.version) if match else (self.name, self.version)

    @property
    def file_name(self) -> str:
        """The name that ``apt-get download`` gives the file (a colon of an epoch is escaped)."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


@dataclass(frozen=True, slots=True)
class PackageSet:
    """The packages of one kernel. ``common`` is named for the record; it is not downloaded."""

    release: Release
    version: str
    image: Package
    headers: Package
    source: Package
    common: str

    @property
    def all(self) -> tuple[Package, ...]:
        return (self.headers, self.image, self.source)

    @property
    def featureset(self) -> str:
        """``rt`` when the kernel is built from the common source plus patches of that name; else empty.

        Debian names the featureset in the package of common headers: ``linux-headers-6.1.0-50-common-rt``.
        """
        match = re.search(r"-common-([a-z0-9]+)=", self.common)
        return match[1] if match else ""


class OfflineError(Unable):
    """No package server could be reached."""


class GoneError(Failed):
    """The server does not have (any more) what the lists name."""


@dataclass(frozen=True)
class Apt:
    """apt with the machine's settings, or with a state of its own.

    ``settings`` is a file of apt settings read after the machine's own (APT_CONFIG); None: the
    machine's lists as they are. ``title`` names the archive for people. ``lines`` are the lines of its
    sources.list; None: the machine's own sources.
    """

    title: str
    settings: Path | None = None
    lines: str | None = None

    @cached_property
    def env(self) -> Mapping[str, str]:
        """What its programs need in their environment."""
        return {} if self.settings is None else {"APT_CONFIG": str(self.settings)}

    def command(self, program: str) -> list[str]:
        """``apt-get`` or ``apt-cache`` with the options that hold for all of them."""
        return [program, *self._options]

    @cached_property
    def _options(self) -> tuple[str, ...]:
        return tuple(word for option in _OPTIONS for word in ("-o", option))

    def records(self, work: Work, names: Sequence[str]) -> tuple[Package, ...]:
        """What the lists know of the packages ``names``, newest version first; unknown names are passed over.

        Raises:
            Unable: apt is not there.
        """
        result = work.run([*self.command("apt-cache"), "show", *names], env=self.env, check=False)
        return tuple(self._packages(result.text))

    def _packages(self, text: str) -> Iterable[Package]:
        seen = set()
        for paragraph in re.split(r"\n\s*\n", text):
            fields = dict(re.findall(r"^([A-Za-z0-9-]+):[ \t]*(.*)$", paragraph, re.MULTILINE))
            # a package that is installed but in no list has neither Size nor SHA256
            if not {"Package", "Version", "Architecture", "Size", "SHA256"} <= fields.keys():
                continue
            key = fields["Package"], fields["Version"], fields["SHA256"]
            if key in seen or not fields["Size"].isdigit():
                continue
            seen.add(key)
            installed = fields.get("Installed-Size", "0")
            yield Package(
                name=fields["Package"],
                version=fields["Version"],
                architecture=fields["Architecture"],
                size=int(fields["Size"]),
                sha256=fields["SHA256"].lower(),
                installed=int(installed) * 1024 if installed.isdigit() else 0,
                depends=fields.get("Depends", ""),
                archive=self,
                source=fields.get("Source", ""),
            )

    def kernels(self, work: Work) -> tuple[Release, ...]:
        """The releases of all kernel images in the lists."""
        result = work.run([*self.command("apt-cache"), "pkgnames", "linux-image-"], env=self.env, check=False)
        names = (line.removeprefix("linux-image-") for line in result.text.split())
        return tuple(
            Release(name)
            for name in names
            if RELEASE.match(name)
            # not the packages that only depend on the newest (6.12-amd64), nor debug images
            and re.match(r"\d+\.\d+\.\d", name)
            and not re.search(r"-(dbg|unsigned|template)$", name)
        )

    def update(self, work: Work) -> None:
        """Fetch the lists anew.

        Lists that could be fetched are kept when others could not.

        Raises:
            OfflineError: no server was reached.
            Failed: apt refused for another reason (a signature, a damaged list); its words are in ``why``.
        """
        result = work.run([*self.command("apt-get"), "-q=2", "update"], env=self.env, check=False)
        said = result.errors.strip()
        if result.status != 0 or _OFFLINE.search(said):
            raise self._complaint("the package lists could not be fetched", said)

    def download(self, work: Work, package: Package, folder: Path) -> Path:
        """Get ``package`` into ``folder`` and return its path; the file's SHA-256 is the list's.

        A part left by an earlier run is continued. A file with other content (damaged on the disk, or
        changed by somebody) is fetched again.

        Raises:
            OfflineError: no server was reached.
            GoneError: the server does not have the file; the lists are old.
            Failed: rule ``corrupt-package``: what the server delivers is not what the lists promise.
        """
        return self.get(
            work,
            ["download", f"{package.name}={package.version}"],
            folder / package.file_name,
            package.size,
            package.sha256,
        )

    def get(self, work: Work, arguments: Sequence[str], path: Path, size: int, sha256: str) -> Path:
        """Have ``apt-get ARGUMENTS`` fetch the file ``path``, whose size and SHA-256 the lists name.

        Raises:
            OfflineError, GoneError, Failed: as :meth:`download`.
        """
        if has_sha256(path, sha256):
            return path
        if path.exists() and path.stat().st_size >= size:
            path.unlink()  # apt would take a file of the right size for the right file
        for attempt in (1, 2):
            result = work.run(
                [*self.command("apt-get"), "-q=2", *arguments], cwd=path.parent, env=self.env, check=False
            )
            if has_sha256(path, sha256):
                return path
            if result.status != 0 and (attempt == 2 or not _GONE.search(result.errors)):
                raise self._complaint(f"{path.name} could not be downloaded", result.errors.strip())
            # the continued part was no beginning of this file: once more from nothing
            path.unlink(missing_ok=True)
        raise Failed(
            f"{path.name} is damaged",
            why=f"even after a second download its SHA-256 is not {sha256}, as {self.title} promises",
            next_step="run again later, or use another mirror",
            rule="corrupt-package",
        )

    def _complaint(self, what: str, said: str) -> KmendError:
        lines = [line for line in said.splitlines() if line[:2] in ("E:", "W:")] or said.splitlines()
        why = "\n".join(dict.fromkeys(line[:300] for line in lines[:6])) or "apt gave no reason"
        if re.search(r"No space left on device", said):
            return disk_full(next(line for line in said.splitlines() if "No space left" in line))
        if _OFFLINE.search(said):
            return OfflineError(
                what,
                why=why,
                next_step="connect this machine to the network (apt's own proxy settings are honoured), "
                "then run again",
                rule="no-network",
            )
        if _GONE.search(said):
            return GoneError(what, why=why, next_step="run again later", rule="download")
        return Failed(what, why=why, next_step="look at the output of `apt-get update`", rule="download")


def machine() -> Apt:
    """apt as this machine has it set up, with the lists of its last update."""
    return Apt("this machine's package lists")


def private(
    config: Config,
    name: str,
    *,
    title: str,
    sources: str | None,
    deb822: str = "",
    extra: Sequence[str] = (),
) -> Apt:
    """apt with its own lists below kmend's cache, so that it needs no root and changes nothing.

    ``sources`` are the lines of a sources.list; None: the machine's own sources. ``deb822`` are more
    entries, as stanzas. ``extra`` are more lines of apt settings.

    Raises:
        Failed: the cache cannot be written.
    """
    root = config.cache / "apt" / name
    try:
        (root / "state" / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (root / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        (root / "empty").mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(root, error) from error
    write_atomically(root / "status", b"")
    # apt reads the file of APT_CONFIG before the machine's settings; ours must have the last word
    machine = "".join(
        f'#include "{path}";\n'
        for path in ("/etc/apt/apt.conf.d/", "/etc/apt/apt.conf")
        if Path(path).exists()
    )
    lines = [
        machine,
        f'Dir::State "{root}/state";',
        f'Dir::State::status "{root}/status";',
        f'Dir::Cache "{root}/cache";',
        'Dir::Cache::pkgcache "pkgcache.bin";',
        'Dir::Cache::srcpkgcache "srcpkgcache.bin";',
        'APT::Architectures { "amd64"; };',
        'APT::Architecture "amd64";',
        'Acquire::Languages { "none"; };',
        # hooks of the machine (PackageKit, apt-file) concern its own lists, not ours
        "#clear APT::Update::Pre-Invoke;",
        "#clear APT::Update::Post-Invoke;",
        "#clear APT::Update::Post-Invoke-Success;",
        *extra,
    ]
    if sources is not None:
        write_atomically(root / "sources.list", sources.encode())
        write_atomically(root / "parts" / "kmend.sources", deb822.encode())
        lines += [f'Dir::Etc::sourcelist "{root}/sources.list";', f'Dir::Etc::sourceparts "{root}/parts";']
    write_atomically(root / "main.conf", ("\n".join(lines) + "\n").encode())
    settings = root / "apt.conf"
    first = f'Dir::Etc::parts "{root}/empty";\nDir::Etc::main "{root}/main.conf";\n'
    write_atomically(settings, first.encode())
    return Apt(title, settings, sources)


def has_sha256(path: Path, sha256: str) -> bool:
    """Whether the file exists and has that SHA-256 (hexadecimal)."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False


def line_of(release: str) -> str:
    """``6.1`` of ``6.1.0-55-amd64``: the part of the source package's name.

    Raises:
        Unable: rule ``unknown-release``: the text is no kernel release.
    """
    match = RELEASE.match(release)
    if not match:
        raise Unable(
            f"{release!r} is no kernel release",
            why="a release looks like 6.1.0-55-amd64 (see `uname -r`)",
            next_step="give the release exactly as `uname -r` prints it on the machine concerned",
            rule="unknown-release",
        )
    return match["line"]


def images(packages: Iterable[Package], release: str) -> tuple[Package, ...]:
    """The image packages among ``packages``: signed ones before unsigned ones, newest first."""
    rows = tuple(packages)
    signed = tuple(p for p in rows if p.name == f"linux-image-{release}")
    return signed + tuple(p for p in rows if p.name == f"linux-image-{release}-unsigned")


def wanted_names(release: str) -> tuple[str, ...]:
    """The names to ask for; the image has two possible ones."""
    return (
        f"linux-image-{release}",
        f"linux-image-{release}-unsigned",
        f"linux-headers-{release}",
        f"linux-source-{line_of(release)}",
    )


def together(packages: Sequence[Package], release: str, version: str | None) -> PackageSet | None:
    """The newest complete set of packages of one version (or of exactly ``version``); None: there is none."""
    for image in images(packages, release):
        if version is not None and image.version != version:
            continue
        same = {p.name: p for p in reversed(packages) if p.version == image.version}
        headers = same.get(f"linux-headers-{release}")
        source = same.get(f"linux-source-{line_of(release)}")
        if headers and source:
            common = re.search(r"\b(linux-headers-\S+-common\S*) \(= ([^)]+)\)", headers.depends)
            return PackageSet(
                Release(release),
                image.version,
                image,
                headers,
                source,
                f"{common[1]}={common[2]}" if common else "",
            )
    return None


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the lists said: the set, or why there is none.

    ``version`` is the image's version when only other parts were missing. ``trouble`` is what kept
    the lists from being fetched anew.
    """

    found: PackageSet | None
    version: str | None
    trouble: KmendError | None = None


def find(config: Config, work: Work, release: Release, version: str | None, *, anew: bool = False) -> Lookup:
    """Look ``release`` up in the machine's lists, then in kmend's own, then fetch kmend's own anew.

    ``anew`` fetches the lists first (what the old ones name is gone from the server). The machine's
    own lists are never updated: that is its administrator's business.
    """
    own_settings = config.cache / "apt" / "own" / "apt.conf"
    rows: list[Package] = []

    def ask(apt: Apt) -> PackageSet | None:
        answer = apt.records(work, wanted_names(release))
        rows.extend(answer)
        return together(answer, release, version)

    if not anew:
        if found := ask(machine()):
            return Lookup(found, found.version)
        if own_settings.exists() and (found := ask(own(config))):
            return Lookup(found, found.version)
    trouble: KmendError | None = None
    with locked(
        config.cache / "apt" / ".lock", on_wait=lambda: work.progress.step("waiting for another kmend")
    ):
        apt = own(config)
        if not anew and (found := ask(apt)):  # another run has fetched them meanwhile
            return Lookup(found, found.version)
        work.progress.step("fetching the package lists anew")
        try:
            apt.update(work)
        except KmendError as error:
            if error.rule in ("disk-full", "stopped"):
                raise
            trouble = error
    found = ask(apt)
    known = [p.version for p in images(rows, release) if version in (None, p.version)]
    return Lookup(found, found.version if found else next(iter(known), version), trouble)


def own(config: Config) -> Apt:
    """apt with the machine's sources and keys, but with lists in kmend's cache."""
    return private(config, "own", title="the package archive", sources=None)


def near(work: Work, config: Config, release: str, *, count: int = 4) -> tuple[Release, ...]:
    """Releases in the lists that are most like ``release``: same flavour first, then the nearest numbers."""
    known = set(machine().kernels(work))
    if (config.cache / "apt" / "own" / "apt.conf").exists():
        known |= set(own(config).kernels(work))
    wanted, flavour = _numbers(release), _flavour(release)

    def distance(other: str) -> tuple[int, int, list[int]]:
        numbers = _numbers(other)
        length = max(len(numbers), len(wanted))
        padded = [n + [0] * (length - len(n)) for n in (wanted, numbers)]
        differences = [abs(a - b) for a, b in zip(*padded, strict=True)]
        first = next((i for i, d in enumerate(differences) if d), length)
        return (_flavour(other) != flavour, -first, differences)

    return tuple(sorted(known, key=distance)[:count])


def _numbers(release: str) -> list[int]:
    return [int(n) for n in re.findall(r"[0-9]+", re.sub(r"-[a-z].*|\+deb[0-9]+", "", release))]


def _flavour(release: str) -> str:
    match = re.search(r"-((?:cloud-|rt-)?[a-z][a-z0-9-]*)$", release)
    return match[1] if match else ""


def _unwritable(folder: Path, error: OSError) -> Failed:
    return Failed(
        f"{folder} cannot be written",
        why=error.strerror or str(error),
        next_step="make the folder writable, or name another cache: KMEND_CACHE=DIR",
        rule="unwritable",
    )
