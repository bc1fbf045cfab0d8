"""``make deb``: build/kmend_VERSION_amd64.deb from this checkout and the libraries that it was tested with.

Debian 12 lacks some of kmend's libraries and has others in versions that are too old, so all of them go
into /usr/lib/kmend, as they lie in the environment that runs this (docs/decisions/0031-package.md). Needs
no root and no network.

    .venv/bin/python packaging/build_deb.py [OUT]
"""

from __future__ import annotations

import gzip
import importlib.metadata
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HERE = ROOT / "packaging"
LIBRARY = "usr/lib/kmend"
#: What kmend cannot do without; what each verb needs beside it is recommended, and `kmend doctor` names it.
#: init-system-helpers, which the maintainer scripts use, is essential and so not named (policy 3.5).
DEPENDS = "python3 (>= 3.{minor}), python3 (<< 3.{next}), libc6 (>= 2.34)"
#: Of needs.txt, what every Debian machine has (``Essential: yes``) and policy forbids to name.
ESSENTIAL = {"dpkg"}
#: What libraries bring for their own tests, or to be called by hand; other architectures' programs among it.
LEFT_OUT = (
    re.compile(r"vmlinux_to_elf/utils/elf_tests/"),
    re.compile(r"(?:^|/)tests?/"),
    re.compile(r"^pwiz\.py$"),  # of peewee
    re.compile(r"^debian/doc-debtags$"),
)
#: Entries of an ELF file's dynamic section that name folders to look for libraries in (elf.h).
DT_NULL, DT_RPATH, DT_RUNPATH = 0, 15, 29
PT_DYNAMIC = 2
COMMAND = """\
#!/usr/bin/python3 -I
import sys

sys.path.insert(0, "/usr/lib/kmend")
from kmend.cli import main

sys.exit(main())
"""
CONTROL = """\
Package: kmend
Version: {version}
Architecture: amd64
Maintainer: {maintainer}
Installed-Size: {size}
Depends: {depends}
Recommends: {recommends}
Suggests: initramfs-tools
Section: kernel
Priority: optional
Description: live patching for running Linux kernels
 Turns a source patch into a livepatch module for the exact kernel that runs,
 proves that the module fits, tries it in a virtual machine, loads it, brings
 the transition to its end, and loads it again at boot.
"""


def distributions(name: str) -> list[importlib.metadata.Distribution]:
    """A distribution's dependencies, all the way down, by name; without itself, without extras."""
    found: dict[str, importlib.metadata.Distribution] = {}

    def follow(one: importlib.metadata.Distribution) -> None:
        for line in one.requires or []:
            requirement, _, marker = line.partition(";")
            match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
            if match is None or "extra" in marker or not _holds(marker):
                continue
            key = match[0].lower().replace("_", "-")
            if key not in found:
                found[key] = importlib.metadata.distribution(match[0])
                follow(found[key])

    follow(importlib.metadata.distribution(name))
    return [found[key] for key in sorted(found)]


def _holds(marker: str) -> bool:
    """Whether a condition of a requirement holds for the interpreter that runs this."""
    if not marker.strip():
        return True
    from packaging.markers import Marker  # noqa: PLC0415 - comes with the development tools

    return bool(Marker(marker).evaluate())


def copy_distribution(one: importlib.metadata.Distribution, to: Path) -> None:
    """The files that its RECORD names, programs and byte code left out."""
    for file in one.files or []:
        if ".." in file.parts or file.is_absolute() or "__pycache__" in file.parts:
            continue
        if any(row.search(file.as_posix()) for row in LEFT_OUT):
            continue
        target = to / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(one.locate_file(file)), target)
        if file.name.endswith(".so"):
            finish_library(target)


def finish_library(file: Path) -> None:
    """Take out of a shared library what belongs to the machine that it was built on."""
    subprocess.run(["strip", "--strip-unneeded", file], check=True)
    file.write_bytes(without_search_path(file.read_bytes()))


def without_search_path(data: bytes) -> bytes:
    """An ELF64 file without RPATH and RUNPATH: a wheel that was built here names this machine's folders.

    Raises:
        ValueError: it is no little-endian ELF64 file.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no little-endian ELF64 file")
    out = bytearray(data)
    (headers,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<HH", data, 0x36)
    for at in range(headers, headers + size * count, size):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, at)
        if kind != PT_DYNAMIC:
            continue
        rows = [struct.unpack_from("<qQ", data, offset + step) for step in range(0, length, 16)]
        kept = [row for row in rows if row[0] not in (DT_RPATH, DT_RUNPATH)]
        kept += [(DT_NULL, 0)] * (len(rows) - len(kept))
        out[offset : offset + length] = b"".join(struct.pack("<qQ", *row) for row in kept)
    return bytes(out)


def tracked(folder: str) -> Iterator[Path]:
    """The files of the checkout below a folder that are under version control."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", folder], check=True, capture_output=True)
    for name in sorted(done.stdout.decode().split("\0")):
        if name and (ROOT / name).is_file():
            yield ROOT / name


def recommended() -> str:
    """The packages of needs.txt that users (not developers) may want."""
    rows: dict[str, None] = {}
    for line in (ROOT / "src/kmend/cli/needs.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            package, _, verbs, _ = (field.strip() for field in line.split("|"))
            if package not in ESSENTIAL and set(verbs.split()) - {"test", "setup", "deb"}:
                rows[package] = None
    return ", ".join(rows)


def put(root: Path, name: str, data: bytes, mode: int = 0o644) -> None:
    """A file of the package."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def fill(root: Path, generated: Path) -> None:
    """Everything that the package installs."""
    for path in tracked("src/kmend"):
        put(root, f"{LIBRARY}/{path.relative_to(ROOT / 'src')}", path.read_bytes())
    for one in distributions("kmend"):
        copy_distribution(one, root / LIBRARY)
    put(root, "usr/bin/kmend", COMMAND.encode(), 0o755)
    for unit in sorted((HERE / "systemd").iterdir()):
        put(root, f"usr/lib/systemd/system/{unit.name}", unit.read_bytes())
    share = "usr/share/initramfs-tools"
    put(root, f"{share}/hooks/kmend", (HERE / "initramfs/hooks/kmend").read_bytes(), 0o755)
    put(root, f"{share}/scripts/local-bottom/kmend", (HERE / "initramfs/scripts/kmend").read_bytes(), 0o755)
    put(root, "etc/kmend/initramfs.conf", (HERE / "initramfs/kmend.conf").read_bytes())
    for page in sorted((generated / "man1").iterdir()):
        put(root, f"usr/share/man/man1/{page.name}.gz", gzip.compress(page.read_bytes(), mtime=0))
    put(root, "usr/share/bash-completion/completions/kmend", (generated / "bash/kmend").read_bytes())
    put(root, "usr/share/zsh/vendor-completions/_kmend", (generated / "zsh/_kmend").read_bytes())
    for path in (*tracked("docs"), *tracked("examples"), ROOT / "README.md"):
        put(root, f"usr/share/doc/kmend/{path.relative_to(ROOT)}", path.read_bytes())
    put(root, "usr/share/doc/kmend/copyright", copyright_text().encode())
    changelog = (HERE / "changelog").read_bytes()
    put(root, "usr/share/doc/kmend/changelog.gz", gzip.compress(changelog, mtime=0))
    put(root, "usr/share/lintian/overrides/kmend", (HERE / "lintian-overrides").read_bytes())


def copyright_text() -> str:
    """Who holds which rights: kmend's own, and where each library's licence lies."""
    lines = [
        "Copyright (C) 2026 the kmend developers",
        "",
        "kmend is free software under the GNU General Public License, version 2 or later;",
        "see /usr/share/common-licenses/GPL-2.",
        "",
        "It brings these libraries, each with its licence in /usr/lib/kmend/NAME.dist-info:",
    ]
    for one in distributions("kmend"):
        meta = one.metadata
        licence = next((meta[key] for key in ("License-Expression", "License") if meta[key]), "see there")
        lines.append(f"  {meta['Name']} {one.version}: {licence.splitlines()[0]}")
    return "\n".join(lines) + "\n"


def maintainer() -> str:
    """Who makes this package, as Debian's own tools ask for it (DEBFULLNAME and DEBEMAIL)."""
    name = os.environ.get("DEBFULLNAME", "The kmend developers")
    return f"{name} <{os.environ.get('DEBEMAIL', 'kmend@localhost')}>"


def version_of_changelog() -> str:
    """The version that the changelog speaks of last.

    Raises:
        SystemExit: its first line is not one of a Debian changelog (deb-changelog(5)).
    """
    first = (HERE / "changelog").read_text().partition("\n")[0]
    match = re.fullmatch(r"kmend \(([^()\s]+)\) [\w.+-]+; urgency=\w+", first)
    if match is None:
        sys.exit(f"packaging/changelog begins with {first!r}")
    return match[1]


def build(out: Path) -> Path:
    """Make the package; its path.

    Raises:
        SystemExit: the changelog speaks of another version.
    """
    version = importlib.metadata.version("kmend")
    if version_of_changelog() != version:
        sys.exit(f"packaging/changelog speaks of {version_of_changelog()}, but this is kmend {version}")
    work = out / "deb"
    shutil.rmtree(work, ignore_errors=True)
    root = work / "root"
    subprocess.run([sys.executable, HERE / "generate.py", work / "generated"], check=True)
    fill(root, work / "generated")
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    minor = sys.version_info.minor
    control = CONTROL.format(
        version=version,
        maintainer=maintainer(),
        size=size // 1024,
        depends=DEPENDS.format(minor=minor, next=minor + 1),
        recommends=recommended(),
    )
    put(root, "DEBIAN/control", control.encode())
    put(root, "DEBIAN/conffiles", b"/etc/kmend/initramfs.conf\n")
    for script in sorted((HERE / "debian").iterdir()):
        put(root, f"DEBIAN/{script.name}", script.read_bytes(), 0o755)
    for path in root.rglob("*"):  # whatever the umask was
        if path.is_dir():
            path.chmod(0o755)
    root.chmod(0o755)
    package = out / f"kmend_{version}_amd64.deb"
    done = subprocess.run(
        ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"], check=True, capture_output=True
    )
    env = {**os.environ, "SOURCE_DATE_EPOCH": done.stdout.decode().strip()}
    argv = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(root), str(package)]
    subprocess.run(argv, check=True, env=env, stdout=subprocess.DEVNULL)
    shutil.rmtree(work)
    return package


if __name__ == "__main__":
    made = build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build").absolute())
    sys.stdout.write(f"{made}\n")
