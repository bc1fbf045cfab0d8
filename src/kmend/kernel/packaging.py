"""Debian's source package: the patches of a featureset, which ``linux-source-X.Y`` does not hold.

Debian builds its real-time kernels from the common source plus ``debian/patches-rt``
(``debian/rules.real``, target ``source_%``: ``quilt push -a --fuzz=0`` over a copy of the patched
source). The patches are part of the source package alone, in its ``NAME_VERSION.debian.tar.xz`` (2 MB).

It is authenticated like a package: the signed ``InRelease`` holds the hash of ``Sources``, ``Sources`` the
SHA-256 of the file. The ``.dsc`` is not used: it is signed by its uploader, whose key nobody has at hand.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Unable
from kmend.core.files import locked
from kmend.kernel.debian import Apt, GoneError, Package, PackageSet, private
from kmend.kernel.prepare import Tool, need_tools
from kmend.kernel.work import Work

#: What applying patches needs besides the tools of every kernel.
TOOLS = (Tool("patch", "patch", "applies the patches of real-time kernels"),)
#: The program and the strictness of ``quilt push --fuzz=0``.
_PATCH = (
    "patch",
    "-p1",
    "--force",
    "--silent",
    "--fuzz=0",
    "--remove-empty-files",
    "--no-backup-if-mismatch",
)


@dataclass(frozen=True, slots=True)
class Packaging:
    """The file of a source package that holds the folder ``debian``. ``size`` in bytes."""

    source: str
    version: str
    file_name: str
    size: int
    sha256: str
    archive: Apt = field(repr=False, compare=False)

    def download(self, work: Work, folder: Path) -> Path:
        """Get the file into ``folder``; its SHA-256 is the one of the signed index.

        Raises:
            OfflineError, GoneError, Failed: as :meth:`kmend.kernel.debian.Apt.download`.
        """
        arguments = ["source", "--download-only", "--diff-only", f"{self.source}={self.version}"]
        return self.archive.get(work, arguments, folder / self.file_name, self.size, self.sha256)


@dataclass(frozen=True, slots=True)
class Patches:
    """The patches of a featureset: ``file`` is the packaging, fetched and verified."""

    featureset: str
    packaging: Packaging
    file: Path

    def apply(self, work: Work, tree: Path, scratch: Path) -> None:
        """Apply them to ``tree`` as Debian's packaging does: in order, without fuzz.

        ``scratch`` is a folder of ours for the patches, made here; its removal is the caller's.

        Raises:
            Failed: rule ``rt-patches``: the series is not understood or a patch does not apply; rule
                ``bad-package``: the packaging holds no such patches.
        """
        _apply(work, tree, self.file, self.featureset, scratch)


def get(config: Config, work: Work, packages: PackageSet, folder: Path) -> Patches | None:
    """The patches that the kernel's source needs, fetched into ``folder``; None: it needs none.

    Raises:
        Unable: rule ``rt-source``: no signed index of the source's own archive lists them, or the server
            does not have them; rule ``missing-tool``: there is no ``patch``.
        OfflineError: no server was reached.
        Failed: rule ``corrupt-package``, or the cache cannot be written.
    """
    featureset, package = packages.featureset, packages.source
    if not featureset:
        return None
    need_tools(TOOLS)
    work.progress.step(f"looking up the source package of {package.name}")
    try:
        found = _find(config, work, package)
        if found is None:
            name, version = package.built_from
            raise _out_of_reach(package, featureset, f"no signed index lists the source {name} {version}")
        return Patches(featureset, found, found.download(work, folder))
    except GoneError as error:
        raise _out_of_reach(package, featureset, error.why) from error


def _out_of_reach(package: Package, featureset: str, why: str) -> Unable:
    name, version = package.built_from
    return Unable(
        f"the patches of the featureset {featureset} of {name} {version} cannot be had",
        why=f"Debian applies debian/patches-{featureset} of its source package to what {package.name} holds; "
        + why,
        next_step="run again later or with another mirror in apt's sources, or apply the patches to a tree "
        "yourself: kmend kernel fetch --source DIR --config FILE --vmlinux FILE",
        rule="rt-source",
    )


def _find(config: Config, work: Work, package: Package) -> Packaging | None:
    """The row of the index; the index is fetched when kmend's copy of it does not know the version."""
    with locked(
        config.cache / "apt" / ".lock", on_wait=lambda: work.progress.step("waiting for another kmend")
    ):
        apt = source_lists(config, work, package)
        if apt is None:
            return None
        name, version = package.built_from
        if found := _row(apt, work, name, version):
            return found
        work.progress.step("fetching the index of source packages")
        try:
            apt.update(work)
        except KmendError as error:
            # of several lists some may have come; what is there is signed
            if found := _row(apt, work, name, version):
                return found
            if error.rule == "download":
                raise GoneError(error.what, why=error.why, rule=error.rule) from error
            raise
        return _row(apt, work, name, version)


def _row(apt: Apt, work: Work, name: str, version: str) -> Packaging | None:
    result = work.run([*apt.command("apt-cache"), "showsrc", "--only-source", name], env=apt.env, check=False)
    return next(iter(packagings(result.text, name, version, apt)), None)


def packagings(text: str, name: str, version: str, archive: Apt) -> Iterable[Packaging]:
    """The packaging files of exactly that source and version in the output of ``apt-cache showsrc``."""
    for paragraph in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+):[ \t]*(.*(?:\n[ \t].*)*)$", paragraph, re.MULTILINE))
        if (fields.get("Package"), fields.get("Version")) != (name, version):
            continue
        for line in fields.get("Checksums-Sha256", "").splitlines():
            match = re.fullmatch(r"\s*([0-9a-f]{64}) (\d+) ([^/\s]+\.debian\.tar\.\w+)", line)
            if match:
                yield Packaging(name, version, match[3], int(match[2]), match[1], archive)


def source_lists(config: Config, work: Work, package: Package) -> Apt | None:
    """apt with the source index of the archive that ``package`` comes from; None: its entry is not found.

    Most machines have no ``deb-src`` entry. So the entries (``deb``) that offer the package are taken, with
    their keys and options, as entries of sources; lists and cache are kmend's own.
    """
    if package.archive.lines is not None:
        assert package.archive.settings is not None
        return private(
            config,
            f"{package.archive.settings.parent.name}-src",
            title=package.archive.title,
            sources=re.sub(r"^deb ", "deb-src ", package.archive.lines, flags=re.MULTILINE),
        )
    lists, stanzas = source_entries(_machine_entries(package.archive, work), _offered_at(package, work))
    if not lists and not stanzas:
        return None
    return private(config, "own-src", title="the package archive", sources=lists, deb822=stanzas)


def _offered_at(package: Package, work: Work) -> frozenset[str]:
    """The base URIs of the archives that offer exactly this package."""
    apt = package.archive
    result = work.run([*apt.command("apt-cache"), "madison", package.name], env=apt.env, check=False)
    rows = (line.split("|") for line in result.text.splitlines())
    return frozenset(
        row[2].split()[0].rstrip("/") for row in rows if len(row) == 3 and row[1].strip() == package.version
    )


def _machine_entries(apt: Apt, work: Work) -> Mapping[str, str]:
    """apt's own files of sources: name to contents."""
    result = work.run(
        ["apt-config", "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"],
        env=apt.env,
    )
    places = dict(word.split("=", 1) for word in shlex.split(result.text) if "=" in word)
    paths = [Path(places["LIST"])] if places.get("LIST") else []
    if parts := places.get("PARTS"):
        paths += sorted(path for path in Path(parts).glob("*") if path.suffix in (".list", ".sources"))
    return {
        str(path): path.read_text(errors="replace") for path in paths if path.is_file() and _readable(path)
    }


def _readable(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True


def source_entries(files: Mapping[str, str], uris: frozenset[str]) -> tuple[str, str]:
    """The entries of ``files`` for ``uris`` as entries of sources: one-line ones, and deb822 stanzas."""
    lines: dict[str, None] = {}
    stanzas: dict[str, None] = {}
    for name, text in files.items():
        if name.endswith(".sources"):
            for stanza in re.split(r"\n[ \t]*\n", _without_comments(text)):
                words = re.search(r"^URIs:((?:.|\n[ \t])*)", stanza, re.MULTILINE | re.IGNORECASE)
                disabled = re.search(r"^Enabled:[ \t]*(no|false|0)\b", stanza, re.MULTILINE | re.IGNORECASE)
                if words and not disabled and {u.rstrip("/") for u in words[1].split()} & uris:
                    kinds = re.compile(r"^Types:.*(?:\n[ \t].*)*$", re.MULTILINE | re.IGNORECASE)
                    stanzas[kinds.sub("Types: deb-src", stanza).strip("\n")] = None
        else:
            for line in text.splitlines():
                match = re.match(r"\s*deb(?:-src)?(\s+(?:\[[^]]*\]\s+)?(\S+)\s.*)$", line)
                if match and match[2].rstrip("/") in uris:
                    lines[f"deb-src{match[1]}"] = None
    return "".join(f"{line}\n" for line in lines), "\n\n".join(stanzas)


def _without_comments(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def _apply(work: Work, tree: Path, packaging: Path, featureset: str, scratch: Path) -> None:
    work.progress.step(f"applying the patches of the featureset {featureset}")
    name = f"debian/patches-{featureset}"
    scratch.mkdir(parents=True, exist_ok=True)
    unpacked = work.run(["tar", "-x", "-f", packaging, "-C", scratch, "--no-same-owner", name], check=False)
    series = scratch / name / "series"
    if unpacked.status != 0 or not series.is_file():
        raise Failed(
            f"{packaging.name} holds no patches of the featureset {featureset}",
            why=unpacked.errors.strip() or f"it has no {name}/series",
            next_step="check the release's name; if it is right, please report this",
            rule="bad-package",
        )
    for patch in read_series(series.read_text(errors="replace"), featureset):
        done = work.run(
            [*_PATCH, "-i", scratch / name / patch],
            cwd=tree,
            check=False,
        )
        if done.status != 0:
            raise Failed(
                f"{name}/{patch} does not apply",
                why="\n".join((done.text + done.errors).strip().splitlines()[-10:]),
                next_step="please report this: source and packaging are of one version",
                rule="rt-patches",
            )


def read_series(text: str, featureset: str) -> tuple[str, ...]:
    """The patches that a quilt series names, in order.

    Raises:
        Failed: rule ``rt-patches``: a line that this reader, or the packaging itself, has no use for.
    """
    names = []
    for line in text.splitlines():
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if not words:
            continue
        path = PurePosixPath(words[0])
        if words[1:] not in ([], ["-p1"]) or path.is_absolute() or ".." in path.parts:
            raise Failed(
                f"the series of debian/patches-{featureset} is not understood",
                why=f"it has the line {line!r}",
                next_step="please report this",
                rule="rt-patches",
            )
        names.append(words[0])
    return tuple(names)
