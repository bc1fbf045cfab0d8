"""Patches of a featureset: which source, from which archive, in which order, how strictly applied."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kmend.core.config import Config
from kmend.core.errors import Failed, Unable
from kmend.core.progress import Silent
from kmend.core.target import Release, Target
from kmend.kernel import lab_drivers, packaging
from kmend.kernel.debian import Apt, Package, PackageSet
from kmend.kernel.work import Work

APT = Apt("test")
SHOWSRC = """\
Package: linux-6.12
Binary: linux-source-6.12, linux-doc-6.12
Version: 6.12.117-1~deb12u1
Checksums-Sha256:
 1111111111111111111111111111111111111111111111111111111111111111 400000 linux-6.12_6.12.117-1~deb12u1.dsc
 2222222222222222222222222222222222222222222222222222222222222222 150000000 linux-6.12_6.12.117.orig.tar.xz
 3333333333333333333333333333333333333333333333333333333333333333 1900000 linux-6.12_6.12.117-1~deb12u1.debian.tar.xz
Directory: pool/updates/main/l/linux-6.12

Package: linux-6.12
Version: 6.12.107-1~deb12u1
Checksums-Sha256:
 4444444444444444444444444444444444444444444444444444444444444444 1800000 linux-6.12_6.12.107-1~deb12u1.debian.tar.xz
"""  # noqa: E501 - as apt-cache prints it


def package(name: str, *, source: str = "", depends: str = "") -> Package:
    return Package(name, "6.1.187-1", "amd64", 1, "00", 1, depends, APT, source)


def packages(common: str) -> PackageSet:
    one = package("x")
    return PackageSet(Release("6.1.0-53-rt-amd64"), "6.1.187-1", one, one, one, common)


def test_the_package_says_which_source_it_was_built_from() -> None:
    assert package("linux").built_from == ("linux", "6.1.187-1")
    assert package("linux-source-6.12", source="linux-6.12").built_from == ("linux-6.12", "6.1.187-1")
    signed = package("linux-image-x", source="linux-signed-amd64 (6.1.187+1)")
    assert signed.built_from == ("linux-signed-amd64", "6.1.187+1")


@pytest.mark.parametrize(
    ("common", "featureset"),
    [
        ("linux-headers-6.1.0-53-common-rt=6.1.187-1", "rt"),
        ("linux-headers-6.12.107+deb12-common-rt=6.12.107-1~deb12u1", "rt"),
        ("linux-headers-6.1.0-53-common=6.1.187-1", ""),
        ("", ""),
    ],
)
def test_the_common_headers_name_the_featureset(common: str, featureset: str) -> None:
    assert packages(common).featureset == featureset


def test_the_index_row_of_exactly_that_version_is_taken() -> None:
    (row,) = packaging.packagings(SHOWSRC, "linux-6.12", "6.12.117-1~deb12u1", APT)
    assert row.file_name == "linux-6.12_6.12.117-1~deb12u1.debian.tar.xz"
    assert (row.size, row.sha256) == (1_900_000, "3" * 64)
    assert list(packaging.packagings(SHOWSRC, "linux-6.12", "6.12.117-1", APT)) == []
    assert list(packaging.packagings(SHOWSRC, "linux", "6.12.117-1~deb12u1", APT)) == []


def test_a_name_that_leaves_the_folder_is_no_packaging() -> None:
    text = SHOWSRC.replace("linux-6.12_6.12.107", "../linux-6.12_6.12.107")
    assert list(packaging.packagings(text, "linux-6.12", "6.12.107-1~deb12u1", APT)) == []


SOURCES = """\
# the archive
Types: deb
URIs: http://deb.debian.org/debian
Suites: bookworm bookworm-updates
# Components: contrib
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb deb-src
URIs: http://other.example/debian/
  http://deb.debian.org/debian-security/
Suites: bookworm-security
Components: main

Types: deb
URIs: http://deb.debian.org/debian
Suites: sid
Components: main
Enabled: no
"""
LIST = """\
# deb http://deb.debian.org/debian stretch main
deb [arch=amd64 signed-by=/k.gpg] http://deb.debian.org/debian/ bullseye main contrib
deb-src http://deb.debian.org/debian bullseye main
deb https://packages.cloud.example/apt main
"""
MAIN = frozenset({"http://deb.debian.org/debian"})


def test_entries_that_offer_the_package_become_entries_of_sources() -> None:
    lines, stanzas = packaging.source_entries({"/a/x.sources": SOURCES, "/a/x.list": LIST}, MAIN)
    assert lines.splitlines() == [
        "deb-src [arch=amd64 signed-by=/k.gpg] http://deb.debian.org/debian/ bullseye main contrib",
        "deb-src http://deb.debian.org/debian bullseye main",
    ]
    assert stanzas.splitlines() == [
        "Types: deb-src",
        "URIs: http://deb.debian.org/debian",
        "Suites: bookworm bookworm-updates",
        "Components: main",
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg",
    ]


def test_a_second_uri_of_a_stanza_counts() -> None:
    security = frozenset({"http://deb.debian.org/debian-security"})
    lines, stanzas = packaging.source_entries({"x.sources": SOURCES, "sources.list": LIST}, security)
    assert lines == ""
    assert stanzas.startswith("Types: deb-src\nURIs: http://other.example/debian/\n  http://deb.debian.org/")
    assert "bookworm-security" in stanzas
    assert stanzas.count("Types:") == 1


def test_a_series_is_read_as_quilt_reads_it() -> None:
    text = "# first\n0001-a.patch\n\n  sub/0002-b.patch -p1 # why\n0003-c.patch#1\n"
    assert packaging.read_series(text, "rt") == ("0001-a.patch", "sub/0002-b.patch", "0003-c.patch#1")


@pytest.mark.parametrize("line", ["a.patch -p0", "a.patch -R", "../a.patch", "/etc/passwd", "a b"])
def test_a_line_that_is_not_understood_is_an_error(line: str) -> None:
    with pytest.raises(Failed) as caught:
        packaging.read_series(f"ok.patch\n{line}\n", "rt")
    assert caught.value.rule == "rt-patches"
    assert line in caught.value.why


# --- applying --------------------------------------------------------------------------------------

FIRST = "--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n one\n-two\n+TWO\n three\n"
SECOND = (
    "--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n one\n-TWO\n+2\n three\n--- /dev/null\n+++ b/g\n@@ -0,0 +1 @@\n+-rt\n"
)
#: its first line of context is not the file's: patch would take it with fuzz 1
FUZZY = "--- a/f\n+++ b/f\n@@ -1,4 +1,4 @@\n other\n one\n-two\n+TWO\n three\n"


def patches(folder: Path, files: dict[str, str]) -> packaging.Patches:
    """A packaging with these files in debian/patches-rt."""
    place = folder / "in" / "debian" / "patches-rt"
    place.mkdir(parents=True)
    for name, text in files.items():
        (place / name).write_text(text)
    tar = folder / "linux_1-1.debian.tar.xz"
    subprocess.run(["tar", "-C", folder / "in", "-cJf", tar, "debian"], check=True)
    row = packaging.Packaging("linux", "1-1", tar.name, tar.stat().st_size, "00", APT)
    return packaging.Patches("rt", row, tar)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "f").write_text("one\ntwo\nthree\n")
    return folder


def test_patches_are_applied_in_the_order_of_the_series(tmp_path: Path, tree: Path) -> None:
    made = patches(tmp_path, {"series": "z.patch\na.patch\n", "z.patch": FIRST, "a.patch": SECOND})
    made.apply(Work(), tree, tmp_path / "scratch")
    assert (tree / "f").read_text() == "one\n2\nthree\n"
    assert sorted(p.name for p in tree.iterdir()) == ["f", "g"]


@pytest.mark.parametrize("bad", [FUZZY, SECOND], ids=["fuzz", "not there"])
def test_a_patch_that_does_not_fit_exactly_is_refused(tmp_path: Path, tree: Path, bad: str) -> None:
    made = patches(tmp_path, {"series": "a.patch\n", "a.patch": bad})
    with pytest.raises(Failed) as caught:
        made.apply(Work(), tree, tmp_path / "scratch")
    assert caught.value.rule == "rt-patches"
    assert "debian/patches-rt/a.patch" in caught.value.what
    assert "FAILED" in caught.value.why


def test_a_packaging_without_the_patches_is_refused(tmp_path: Path, tree: Path) -> None:
    made = patches(tmp_path, {"a.patch": FIRST})  # no series
    with pytest.raises(Failed) as caught:
        made.apply(Work(), tree, tmp_path / "scratch")
    assert caught.value.rule == "bad-package"


# --- drivers for the lab ---------------------------------------------------------------------------

TABLE = """\
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_ring.ko:
kernel/fs/netfs/netfs.ko: kernel/fs/fscache/fscache.ko
"""


def test_drivers_get_rows_as_depmod_writes_them() -> None:
    modules = {
        "9pnet": b"\0depends=\0",
        "9pnet_virtio": b"alias=x\0depends=9pnet,virtio,virtio_ring\0",
        "9p": b"\0depends=9pnet,netfs\0",
    }
    assert lab_drivers.dependencies(TABLE, modules).splitlines() == [
        "9pnet.ko:",
        "9pnet_virtio.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko 9pnet.ko",
        "9p.ko: kernel/fs/netfs/netfs.ko kernel/fs/fscache/fscache.ko 9pnet.ko",
    ]


def test_a_driver_that_needs_what_nobody_has_is_an_error() -> None:
    with pytest.raises(Failed, match="netfs"):
        lab_drivers.dependencies("", {"9p": b"\0depends=netfs\0"})


def a_target(folder: Path, *, dep: str, builtin: str = "", config: str = "") -> Target:
    modules = folder / "modules"
    modules.mkdir(parents=True)
    (folder / "source").mkdir()
    (modules / "modules.dep").write_text(dep)
    (modules / "modules.builtin").write_text(builtin)
    (folder / "config").write_text(config)
    return Target(
        release=Release("6.1.0-55-cloud-amd64"), source_version="6.1.192-1", banner="", build_id="ab",
        folder=folder, source=folder / "source", config=folder / "config", symvers=folder / "symvers",
        vmlinux=folder / "vmlinux", vmlinuz=None, modules=modules, compiler="gcc-12",
    )  # fmt: skip


def settings(folder: Path) -> Config:
    return Config(folder / "cache", folder / "state", 1, "http://127.0.0.1:9")


def test_a_kernel_with_all_drivers_is_given_none(tmp_path: Path) -> None:
    target = a_target(
        tmp_path / "t",
        dep="kernel/fs/9p/9p.ko.xz:\nkernel/net/9p/9pnet-virtio.ko:\n",
        builtin="net/9pnet.ko\n",
    )
    assert lab_drivers.provide(settings(tmp_path), target, Silent()) is None


@pytest.mark.parametrize(
    ("config", "why"), [("CONFIG_MODULE_SIG_FORCE=y\n", "signed"), ("", "its source has no net/9p")]
)
def test_drivers_that_cannot_be_had_are_named(tmp_path: Path, config: str, why: str) -> None:
    target = a_target(tmp_path / "t", dep="kernel/fs/ext4/ext4.ko:\n", config=config)
    with pytest.raises(Unable, match="cannot be a guest") as caught:
        lab_drivers.provide(settings(tmp_path), target, Silent())
    assert caught.value.rule == "no-lab-kernel"
    assert "9pnet, 9pnet_virtio, 9p" in caught.value.why
    assert why in caught.value.why
    assert [path for path in target.folder.iterdir() if path.name.startswith("lab-drivers")] == []
