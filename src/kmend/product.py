"""What ``kmend build`` and ``kmend module`` have in common: a name, the frame of a module, a report."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kmend import __version__
from kmend.core.errors import KmendError, Refusal, Refused, UsageError
from kmend.core.files import write_atomically
from kmend.core.progress import Timings
from kmend.core.report import BuildReport, KernelId, ObjectRow, Outcome, UnitCounts, Verified
from kmend.core.target import MAX_MODULE_NAME, Target

if TYPE_CHECKING:
    from kmend.elf.model import ElfFile
    from kmend.module.resolve import Resolution
    from kmend.view import TargetView


_CVE = re.compile(rb"(?<![A-Za-z0-9])[Cc][Vv][Ee]-[0-9]{4}-[0-9]{4,7}(?![0-9])")


@dataclass(frozen=True, slots=True)
class Signing:
    """With what a module is signed: a private key (PEM file or PKCS#11 URI) and its certificate."""

    key: str
    certificate: Path


def module_name(text: str) -> str:
    """The name of the module that the user named ``text``.

    Raises:
        UsageError: it is no usable name for a module.
    """
    name = text.removesuffix(".ko").replace("-", "_")
    if not re.fullmatch(r"[A-Za-z0-9_]+", name) or len(name) > MAX_MODULE_NAME:
        raise UsageError(
            f"{text!r} is no name for a module",
            why=f"letters, digits and underscores, at most {MAX_MODULE_NAME} of them",
            next_step="name another one with -n",
            rule="module-name",
        )
    return name


def kernel_id(target: Target) -> KernelId:
    return KernelId(target.release, target.version, target.build_id)


def cve_names(*texts: bytes | str) -> tuple[str, ...]:
    """The CVE names that the texts mention, each once, oldest first (cve.org: CVE-YEAR-NUMBER)."""
    found = set()
    for text in texts:
        words = text if isinstance(text, bytes) else text.encode(errors="replace")
        found |= {name.decode().upper() for name in _CVE.findall(words)}
    return tuple(sorted(found, key=lambda name: [int(part) for part in name.split("-")[1:]]))


def one_line(text: str) -> str:
    """At most 120 characters, without line breaks: what ``modinfo`` can show."""
    return " ".join(text.split())[:120]


# -- the frame of a module -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """What every module of kmend is built upon.

    ``forget`` is how the module clears what was relocated for one that goes (None: the kernel does it, or
    it cannot be done); ``crcs`` the checksums of the symbols that the glue needs.
    """

    glue: ElfFile
    forget: Resolution | None
    crcs: dict[str, int]
    warnings: tuple[Refusal, ...]


def frame(view: TargetView, modules: Iterable[str], *, own_init: bool = False) -> Frame:
    """The frame for a module that is relocated against ``modules``, which may come and go."""
    from kmend.elf.model import SHN_UNDEF
    from kmend.verify.symbols import crcs_of

    named = ", ".join(dict.fromkeys(modules))
    forget = view.forget() if named and not own_init else None
    warnings: tuple[Refusal, ...] = ()
    if named and forget is None and not view.takes_back():
        warnings = (
            Refusal(
                "module-reload",
                named,
                "this kernel cannot relocate the patch a second time: while it is loaded, the module "
                "can be unloaded but not loaded again",
                "take the patch back before the module is loaded again",
            ),
        )
    glue = view.glue(forget=forget is not None, own_init=own_init)
    needed = [s.name for s in glue.symbols if s.section == SHN_UNDEF and s.name]
    return Frame(glue, forget, crcs_of([*needed, "module_layout"], view.exports), warnings)


def note(
    target: Target, name: str, *, title: str, origin: str, digest: str, cves: Sequence[str] = ()
) -> bytes:
    """The contents of the note that ``kmend info`` shows; ``digest`` names what the module was made from.

    ``cves`` are the CVE names that the patch mentions.
    """
    return json.dumps(
        {
            "kmend": __version__,
            "patch": name,
            "title": title,
            "origin": origin,
            "kernel": target.release,
            "build_id": target.build_id,
            "report": digest,
            "cves": list(cves),
        },
        sort_keys=True,
    ).encode()


def modinfo_of(target: Target, name: str, *, digest: str) -> tuple[tuple[str, str], ...]:
    """What ``modinfo`` shows of every module of kmend."""
    return ("kmend_patch", name), ("kmend_build_id", target.build_id), ("kmend_report", digest)


# -- results ---------------------------------------------------------------------------------------


def reported(name: str, target: Target, work: Callable[[], BuildReport]) -> BuildReport:
    """What ``work`` returns; every KmendError that speaks of the author's input becomes a report.

    Raises:
        KmendError: wrong usage, and a machine or kernel that cannot do it (exit status 2 and 3).
    """
    try:
        return work()
    except KmendError as error:
        if error.exit_status != 1:
            raise
        outcome = Outcome.REFUSED if isinstance(error, Refused) else Outcome.FAILED
        return BuildReport(name, outcome, kernel_id(target), refused=error.reasons)


def written(
    target: Target,
    name: str,
    data: bytes,
    output: Path,
    signing: Signing | None,
    *,
    objects: tuple[ObjectRow, ...],
    warnings: Sequence[Refusal],
    verified: Verified | None = None,
    units: UnitCounts | None = None,
    cves: Sequence[str] = (),
    digest: str = "",
) -> BuildReport:
    """Sign the module if asked, and write ``NAME.ko`` into the folder ``output``."""
    if signing is not None:
        from kmend.kernel.sign import sign

        data = sign(target, data, signing.key, signing.certificate)
    path = output / f"{name}.ko"
    write_atomically(path, data)
    return BuildReport(
        name,
        Outcome.BUILT,
        kernel_id(target),
        module=str(path),
        sha256=hashlib.sha256(data).hexdigest(),
        objects=objects,
        warnings=tuple(dict.fromkeys(warnings)),
        verified=verified or Verified(),
        units=units or UnitCounts(),
        cves=tuple(cves),
        digest=digest,
    )


def concluded(report: BuildReport, timings: Timings) -> BuildReport:
    """The report with the times; that of a module that was built goes beside it as ``NAME.json``."""
    from kmend.report.build import to_document

    report = replace(report, timings=dict(timings.seconds))
    if report.result is Outcome.BUILT and report.module:
        module = Path(report.module)
        text = json.dumps(to_document(report), indent=2) + "\n"
        try:
            write_atomically(module.with_suffix(".json"), text.encode())
        except KmendError:
            module.unlink(missing_ok=True)  # without its report nobody knows what it is
            raise
    return report
