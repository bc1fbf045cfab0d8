"""Kernels that the package archive no longer carries, from an archive laid out like snapshot.debian.org.

The machine-readable interface tells *where* a package of an exact version lay:

* ``/mr/binary/PACKAGE/`` lists the versions of a package,
* ``/mr/binary/PACKAGE/VERSION/binfiles?fileinfo=1`` names for each architecture the file's archive
  (``debian``, ``debian-security``), its size and the moment at which it was first seen.

Nothing of that is trusted: the interface is not signed. It only picks the moment. The packages are
then taken by apt from ``/archive/ARCHIVE/MOMENT/``, the archive as it was then, with its signed
``InRelease``; so they are authenticated exactly as apt authenticates a current package (see
``debian.py``), by the keys of ``config.keyring``. The one check that is switched off is
``Valid-Until``: an old index has expired by nature. A package that no signed index lists is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from urllib.parse import quote, urlsplit

from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Unable
from kmend.core.files import locked
from kmend.core.target import Release
from kmend.kernel.debian import Apt, OfflineError, PackageSet, private, together, wanted_names
from kmend.kernel.work import Work

T = TypeVar("T")

MOMENT = "%Y%m%dT%H%M%SZ"
#: A file can appear in the pool some hours before the index that lists it.
LATER = (timedelta(0), timedelta(days=1), timedelta(days=4))


@dataclass(frozen=True, slots=True)
class Line:
    """A line of kernels and the Debian releases (code names) that it was published in."""

    pattern: re.Pattern[str]
    codenames: tuple[str, ...]


#: Needed because the interface does not say in which suite a file was. First match counts. The suite
#: of a release is a fact of Debian's history, not of the kernel: no probe could find it.
LINES = (
    Line(re.compile(r".*\+deb13"), ("trixie",)),
    Line(re.compile(r".*[+~]deb12"), ("bookworm",)),
    Line(re.compile(r".*[+~]deb11"), ("bullseye",)),
    Line(re.compile(r"6\.12\."), ("trixie", "bookworm")),
    Line(re.compile(r"6\.1\."), ("bookworm", "bullseye")),
    Line(re.compile(r"5\.10\."), ("bullseye", "buster")),
    Line(re.compile(r"4\.19\."), ("buster",)),
    Line(re.compile(r""), ("sid",)),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """Where and when a file was first seen."""

    archive: str
    moment: datetime


class Snapshot:
    """The archive at ``config.mirror``."""

    def __init__(self, config: Config, work: Work) -> None:
        self._config = config
        self._work = work
        self._mirror = config.mirror

    def find(self, release: Release, version: str | None) -> PackageSet | None:
        """The packages of ``release`` (of exactly ``version``, or of the newest); None: the archive has none.

        Raises:
            OfflineError: the archive was not reached.
            Unable: rule ``unauthenticated``: it has the packages, but in no index with a good signature.
            Failed: it answers in a form that is not understood.
        """
        image, unsigned, headers, source = wanted_names(release)
        if version is None:
            versions = self._versions(image) or self._versions(unsigned)
            if not versions:
                return None
            version = versions[0]
        seen = self._seen(image, version) or self._seen(unsigned, version)
        if not seen:
            return None
        for name in (headers, source):
            where = self._seen(name, version)
            if not where:
                return None
            # the set is complete when its last part has arrived
            seen = tuple(
                Seen(a.archive, max(a.moment, b.moment))
                for a in seen
                for b in where
                if a.archive == b.archive
            )
        trouble: KmendError | None = None
        for apt in self._archives(release, seen):
            try:
                self._update(apt)
            except OfflineError:
                raise
            except KmendError as error:
                if error.rule in ("disk-full", "stopped"):
                    raise
                trouble = error
                continue
            if found := together(apt.records(self._work, wanted_names(release)), release, version):
                return found
        raise Unable(
            f"the packages of {release} ({version}) cannot be authenticated",
            why=f"{self._mirror} has them, but no index that is signed with a key of {self._config.keyring} "
            f"lists them" + (f": {trouble.why}" if trouble else ""),
            next_step="install or update the package debian-archive-keyring "
            "(keys of old releases: set KMEND_KEYRING to debian-archive-removed-keys.gpg)",
            rule="unauthenticated",
        )

    def _archives(self, release: str, seen: tuple[Seen, ...]) -> Iterator[Apt]:
        codenames = next(line.codenames for line in LINES if line.pattern.match(release))
        for where in sorted(seen, key=lambda s: s.archive != "debian-security"):
            for later in LATER:
                for codename in codenames:
                    for suite in _suites(where.archive, codename):
                        yield self._archive(where.archive, where.moment + later, suite)

    def _archive(self, archive: str, moment: datetime, suite: str) -> Apt:
        stamp = moment.strftime(MOMENT)
        url = f"{self._mirror}/archive/{archive}/{stamp}"
        site = re.sub(r"[^A-Za-z0-9.]", "_", urlsplit(self._mirror).netloc or "local")
        return private(
            self._config,
            f"{site}-{archive}-{stamp}-{suite.replace('/', '_')}",
            title=f"{url} {suite}",
            sources=f"deb [arch=amd64 check-valid-until=no signed-by={self._config.keyring}] "
            f"{url} {suite} main\n",
            extra=(
                # a machine's own exceptions are not for this archive
                'Acquire::AllowWeakRepositories "false";',
                'Acquire::AllowDowngradeToInsecureRepositories "false";',
                # what was published at that moment does not change: no use in asking again
                'Acquire::Check-Valid-Until "false";',
            ),
        )

    def _update(self, apt: Apt) -> None:
        """Fetch the index once; it can never change."""
        assert apt.settings is not None
        with locked(apt.settings.parent / ".lock"):
            if not _has_lists(apt.settings.parent):
                self._work.progress.step(f"fetching the index of {apt.title}")
                apt.update(self._work)

    def _versions(self, package: str) -> tuple[str, ...]:
        """The versions of a package, newest first (the interface's own order)."""
        answer = self._ask(f"/mr/binary/{quote(package, safe='')}/")
        rows = _field(answer, "result", list) if answer is not None else []
        return tuple(_field(row, "binary_version", str) for row in rows)

    def _seen(self, package: str, version: str) -> tuple[Seen, ...]:
        answer = self._ask(
            f"/mr/binary/{quote(package, safe='')}/{quote(version, safe='')}/binfiles?fileinfo=1"
        )
        if answer is None:
            return ()
        found: dict[str, datetime] = {}
        for row in _field(answer, "result", list):
            if _field(row, "architecture", str) not in ("amd64", "all"):
                continue
            for info in _field(_field(answer, "fileinfo", dict), _field(row, "hash", str), list):
                archive = _field(info, "archive_name", str)
                text = _field(info, "first_seen", str)
                if not re.fullmatch(r"[a-z-]+", archive):
                    raise _strange(f"an archive named {archive!r}")
                try:
                    moment = datetime.strptime(text, MOMENT).replace(tzinfo=UTC)
                except ValueError as error:
                    raise _strange(f"the moment {text!r}") from error
                found[archive] = min(moment, found.get(archive, moment))
        return tuple(Seen(archive, moment) for archive, moment in found.items())

    def _ask(self, path: str) -> object | None:
        """A JSON answer; None: not found. Through apt's own downloader, so that its proxy settings hold."""
        with TemporaryDirectory(prefix="kmend-") as folder:
            answer = Path(folder) / "answer"
            result = self._work.run(
                [
                    "/usr/lib/apt/apt-helper",
                    *("-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2"),
                    *("-o", "Acquire::http::Timeout=30", "-o", "Acquire::https::Timeout=30"),
                    "download-file",
                    self._mirror + path,
                    answer,
                ],
                check=False,
            )
            if result.status == 0 and answer.exists():
                try:
                    document: object = json.loads(answer.read_bytes())
                except ValueError as error:
                    raise _strange("an answer that is no JSON") from error
                return document
        said = [line for line in result.errors.splitlines() if line.startswith("E: ")]
        if re.search(r"\b404\b", "".join(said)):
            return None
        raise OfflineError(
            f"{self._mirror} was not reached",
            why=said[0][3:] if said else "apt-helper gave no reason",
            next_step="connect this machine to the network, or name another archive: KMEND_MIRROR=URL",
            rule="no-network",
        )


def _suites(archive: str, codename: str) -> tuple[str, ...]:
    if codename == "sid":
        return ("sid",) if archive == "debian" else ()
    if archive == "debian-security":
        # the name changed with Debian 11
        return (f"{codename}-security", f"{codename}/updates")
    return (codename, f"{codename}-proposed-updates", f"{codename}-updates", f"{codename}-backports", "sid")


def _has_lists(root: Path) -> bool:
    return any("Packages" in file.name for file in (root / "state" / "lists").iterdir())


def _field(value: object, name: str, kind: type[T]) -> T:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise _strange(f"no {name} where one belongs")
    return found


def _strange(what: str) -> Failed:
    return Failed(
        "the snapshot archive's answer is not understood",
        why=f"it contains {what}",
        next_step="check the setting mirror (KMEND_MIRROR): it must be laid out like snapshot.debian.org",
        rule="mirror",
    )
