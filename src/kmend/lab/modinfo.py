"""What a module file says of itself: its ``.modinfo`` section (``__MODULE_INFO``, linux/moduleparam.h)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kmend.core.errors import Refusal, Refused, UsageError
from kmend.elf import reader


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """``name`` as the kernel knows it (underscores), ``release`` the first word of vermagic."""

    name: str
    release: str
    vermagic: str
    depends: tuple[str, ...]
    livepatch: bool
    path: Path
    data: bytes


def read(path: Path) -> ModuleInfo:
    """Read a module file.

    Raises:
        UsageError: it cannot be read, is no complete ELF file, or no kernel module.
    """
    try:
        if path.is_dir():
            raise UsageError(
                f"{path} is a folder, not a module",
                why="a .ko file is needed",
                next_step="name the .ko file in it",
                rule="not-a-module",
            )
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read",
            why=error.strerror or str(error),
            next_step="name a .ko file that `kmend build` made",
            rule="not-a-module",
        ) from error
    section = reader.read(data, str(path)).section(".modinfo")
    fields: dict[str, str] = {}
    for pair in section.data.split(b"\0") if section else ():
        key, _, value = pair.decode("utf-8", "replace").partition("=")
        fields.setdefault(key, value)
    vermagic = fields.get("vermagic", "")
    if not vermagic.split():
        raise UsageError(
            f"{path} is no kernel module",
            why="it has no .modinfo section with a vermagic",
            next_step="name a .ko file that `kmend build` made",
            rule="not-a-module",
        )
    return ModuleInfo(
        name=fields.get("name", path.name.partition(".")[0]).replace("-", "_"),
        release=vermagic.split()[0],
        vermagic=vermagic,
        depends=tuple(name.replace("-", "_") for name in fields.get("depends", "").split(",") if name),
        livepatch=fields.get("livepatch", "N").upper().startswith("Y"),
        path=path,
        data=data,
    )


def read_livepatch(path: Path) -> ModuleInfo:
    """:func:`read`, and refuse what the livepatch core would refuse.

    Raises:
        UsageError: as :func:`read`.
        Refused: it is a module, but no livepatch (rule ``not-a-livepatch``).
    """
    info = read(path)
    if not info.livepatch:
        # klp_enable_patch() answers EINVAL: "module M is not marked as a livepatch module"
        raise Refused(
            [
                Refusal(
                    "not-a-livepatch",
                    f"{path} is no livepatch module",
                    "its modinfo lacks `livepatch: Y`; the kernel would refuse its patch",
                    'build it with `kmend build`, or add MODULE_INFO(livepatch, "Y")',
                )
            ]
        )
    return info
