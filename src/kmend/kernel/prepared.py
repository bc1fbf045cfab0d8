"""Prepared targets, as they lie in the cache: opening and listing them.

Layout below ``config.targets``: see :mod:`kmend.kernel.store`, which makes them. Apart from it so that a
build for a kernel that is ready does not load all that fetching one takes.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from kmend.core.config import Config
from kmend.core.errors import Unable
from kmend.core.target import Release, Target

SCHEMA = 1
#: Raised whenever the files of an index change their form: targets prepared before get new ones.
INDEXES = 1
CUSTOM = "@custom"
#: A Debian kernel release: ``6.1.0-55-amd64``, ``6.12.117+deb12-cloud-amd64``.
RELEASE = re.compile(r"^(?P<line>[0-9]+\.[0-9]+)[0-9A-Za-z.+~_-]*\Z")


def open_target(config: Config, release: Release) -> Target:
    """The prepared target of that name (``RELEASE``, or ``RELEASE@custom``). Takes a millisecond.

    A custom target is found by its plain release too when no packaged one of that release is prepared.

    Raises:
        Unable: rule ``unknown-target``: no such target is prepared.
    """
    for key in (release, f"{release}{CUSTOM}"):
        if found := read(config, key):
            return found
    known = [
        t.release if t.source_version != "custom" else f"{t.release}{CUSTOM}" for t in list_targets(config)
    ]
    raise Unable(
        f"the kernel {release} is not prepared",
        why=f"prepared: {', '.join(known)}" if known else f"no kernel is prepared in {config.targets}",
        next_step=f"kmend kernel fetch {release}",
        rule="unknown-target",
    )


def list_targets(config: Config) -> tuple[Target, ...]:
    """All prepared targets, by name."""
    try:
        keys = sorted(path.name for path in config.targets.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return ()
    except OSError as error:
        from kmend.kernel.prepare import os_error  # noqa: PLC0415 - only when the cache cannot be read

        raise os_error(error) from error
    return tuple(target for key in keys if (target := read(config, key)))


def name_of(target: Target) -> str:
    """The name by which :func:`open_target` finds exactly this target."""
    return target.folder.name


def record_of(target: Target) -> dict[str, object]:
    """The whole record of a target: also ``origin``, ``packages`` or ``inputs``, ``seconds``."""
    document = load_record(target.folder / "target.json")
    return document if document is not None else {}


def ready(config: Config, release: Release) -> Target | None:
    """The target that serves ``release``, when it is prepared: the packaged one, else a custom one.

    None as well when it is of another version than the running kernel of the same name.
    """
    if not read(config, release) and (found := read(config, f"{release}{CUSTOM}")):
        return found
    return of_version(config, release, running_version(release))


def running_version(release: str) -> str | None:
    """The Debian version of the running kernel when it is ``release`` (it says so itself), else None.

    Before Debian 12 several versions shared one release; the running one is then the one that is meant.
    """
    uname = os.uname()
    match = re.search(r"\bDebian (\S+) \(", uname.version)
    return match[1] if match and uname.release == release else None


def of_version(config: Config, release: Release, version: str | None) -> Target | None:
    """The prepared target, unless it is of another version than the running kernel of the same name."""
    found = read(config, release)
    if found and version and found.source_version not in (version, "custom"):
        return None
    return found


def read(config: Config, key: str, *, indexes: int | None = INDEXES) -> Target | None:
    """The target in the folder ``key``; ``indexes`` None: whatever form its indexes have."""
    if not RELEASE.match(key.removesuffix(CUSTOM)):
        return None
    folder = config.targets / key
    document = load_record(folder / "target.json")
    if document is None or document.get("schema") != SCHEMA:
        return None
    if indexes is not None and document.get("indexes") != indexes:
        return None
    text = {k: v for k, v in document.items() if isinstance(v, str)}
    try:
        paths = {k: folder / text[k] for k in ("source", "config", "symvers", "vmlinux")}
        target = Target(
            release=Release(text["release"]),
            source_version=text["source_version"],
            banner=text["banner"],
            build_id=text["build_id"],
            folder=folder,
            vmlinuz=folder / text["vmlinuz"] if "vmlinuz" in text else None,
            modules=folder / text["modules"] if "modules" in text else None,
            compiler=text["compiler"],
            **paths,
        )
    except KeyError:
        return None
    there = (target.source / ".config", target.config, target.symvers, target.vmlinux, target.vmlinuz,
             target.modules)  # fmt: skip
    return target if all(path is None or path.exists() for path in there) else None


def load_record(path: Path) -> dict[str, object] | None:
    """A record of ours (JSON); None when it is absent or damaged."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None
