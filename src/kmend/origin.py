"""Where a patch comes from: what its module says of itself, and the build report that belongs to it.

A report belongs to a module when both name the same name, kernel build and digest of what the module was made
from (``product.note()``), or when the report names the very bytes of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.core.errors import Failed, KmendError
from kmend.core.files import read_regular
from kmend.core.live import ActionReport, LivePatch
from kmend.runtime import journal, persistence
from kmend.runtime.journal import Record

if TYPE_CHECKING:
    from kmend.core.report import BuildReport

#: A report of this size is none of ours.
_MOST = 64 << 20


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of a patch beside what the kernel shows.

    ``note`` is what kmend wrote into the module (empty for others' modules). ``report`` is its build report,
    with the file that it was found in. ``loaded`` is the journal's record of its last load in this boot.
    """

    note: Mapping[str, object] = field(default_factory=dict)
    report: BuildReport | None = None
    report_file: str = ""
    loaded: Record | None = None

    @property
    def cves(self) -> tuple[str, ...]:
        """The CVE names that the patch mentions."""
        from kmend.report.live import cves_of

        return cves_of(self.note) or cves_of({"cves": list(self.report.cves) if self.report else []})


def of_file(path: str, sha256: str, note: Mapping[str, object]) -> Origin:
    """Of a module's file: the report beside it, if it is that of this very file."""
    beside = Path(path).with_suffix(".json")
    report = _read(beside)
    if report is None or not (report.sha256 == sha256 or _belongs(report, note)):
        return Origin(note)
    return Origin(note, report, str(beside))


def of_name(
    state: Path, release: str, loads: Mapping[str, Record], name: str, note: Mapping[str, object]
) -> Origin:
    """Of a patch by its name and note; ``loads`` are :func:`kmend.runtime.journal.loads` of this boot.

    The report is looked for in the store of installed patches, then beside the file that it was loaded from.
    """
    loaded = loads.get(name)
    for path in _candidates(state, release, loaded, name) if note else ():
        report = _read(path)
        if report is not None and _belongs(report, note):
            return Origin(note, report, str(path), loaded)
    return Origin(note, loaded=loaded)


class Origins:
    """Origins of the patches of one machine; each is looked up once, as long as its module stays the same."""

    def __init__(self, state: Path, release: str, boot: str) -> None:
        self._state, self._release = state, release
        try:
            self._loads = journal.loads(journal.Journal(state, boot).records(), boot)
        except KmendError:  # what kmend did before is not known to this user; the rest can be told
            self._loads = {}
        self._known: dict[tuple[str, str], Origin] = {}

    def of(self, patch: LivePatch) -> Origin:
        """Of this patch."""
        key = (patch.name, patch.module.identity if patch.module is not None else "")
        if key not in self._known:
            note = patch.module.note if patch.module is not None else {}
            self._known[key] = of_name(self._state, self._release, self._loads, patch.name, note)
        return self._known[key]

    def of_action(self, report: ActionReport) -> Origin:
        """Of the patch that was acted upon, whether it is still loaded or not."""
        if report.file:
            found = of_file(report.file, report.sha256, report.note)
            if found.report is not None:
                return found
        return of_name(self._state, self._release, self._loads, report.patch, report.note)

    def all_of(self, patches: Sequence[LivePatch]) -> dict[str, Origin]:
        """Of these patches, by name."""
        return {row.name: self.of(row) for row in patches}


def _candidates(state: Path, release: str, loaded: Record | None, name: str) -> Iterator[Path]:
    try:
        store = persistence.read(state, persistence.release_of(release))
        row = store.named(name)
        if row is not None and row.report:
            yield store.folder / row.report
    except KmendError:
        pass  # a store that cannot be read has no report to show; `kmend status` names what is wrong with it
    file = loaded.detail.get("file") if loaded is not None else None
    if isinstance(file, str) and file:
        yield Path(file).with_suffix(".json")


def _belongs(report: BuildReport, note: Mapping[str, object]) -> bool:
    return bool(report.digest) and (report.name, report.kernel.build_id, report.digest) == (
        note.get("patch"),
        note.get("build_id"),
        note.get("report"),
    )


def _read(path: Path) -> BuildReport | None:
    from kmend.report.build import from_document

    try:
        return from_document(json.loads(read_regular(path, _MOST)))
    except (OSError, ValueError, Failed):
        return None
