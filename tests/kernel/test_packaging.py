"""The packaging of a source package, from a signed archive: the snapshot's, and the machine's own entries."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from archive import Archive, Signer, Source, make_deb, serving

from kmend.core.config import Config
from kmend.core.errors import Unable
from kmend.core.target import Release
from kmend.kernel import packaging, store
from kmend.kernel.debian import Apt, Package, PackageSet, together, wanted_names
from kmend.kernel.debian import own as own_lists
from kmend.kernel.snapshot import Snapshot
from kmend.kernel.work import Work

pytestmark = pytest.mark.skipif(
    not all(shutil.which(p) for p in ("apt-get", "dpkg-deb", "gpg", "gpgv", "patch")),
    reason="needs apt-get, dpkg-deb, gpg, gpgv and patch",
)

RELEASE = Release("6.1.0-12-rt-amd64")
VERSION = "6.1.52-1"
MOMENT = "20230907T120000Z"
POOL = f"/archive/debian-security/{MOMENT}/pool/main/l/linux"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    made = Signer(tmp_path_factory.mktemp("key"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("source")
    place = folder / "debian" / "patches-rt"
    place.mkdir(parents=True)
    (place / "series").write_text("0001-rt.patch\n")
    (place / "0001-rt.patch").write_text("--- a/f\n+++ b/f\n@@ -1 +1 @@\n-common\n+realtime\n")
    tar = folder / "x.tar.xz"
    subprocess.run(["tar", "-C", folder, "-cJf", tar, "debian"], check=True)
    return Source("linux", VERSION, tar.read_bytes())


Publish = Callable[..., Config]


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Archive()) as running:
        yield running


@pytest.fixture
def publish(archive: Archive, signer: Signer, tmp_path: Path) -> Publish:
    """Publish the packages of one real-time kernel, with or without sources; the settings that find them."""
    debs = tmp_path / "debs"
    debs.mkdir()
    common = f"linux-headers-6.1.0-12-common-rt (= {VERSION})"
    made = [
        make_deb(debs, f"linux-image-{RELEASE}", VERSION, "amd64", {"boot/x": b"x"}),
        make_deb(debs, f"linux-headers-{RELEASE}", VERSION, "amd64", {"usr/x": b"x"}, depends=common),
        make_deb(debs, "linux-source-6.1", VERSION, "all", {"usr/src/x": b"x"}),
    ]
    made[2].control += "Source: linux\n"

    def do(*sources: Source) -> Config:
        archive.publish(signer, "debian-security", MOMENT, "bookworm-security", made, sources)
        return Config(tmp_path / "cache", tmp_path / "state", 1, archive.url, signer.keyring)

    return do


def found(config: Config) -> PackageSet:
    packages = Snapshot(config, Work()).find(RELEASE, VERSION)
    assert packages is not None
    assert packages.featureset == "rt"
    return packages


def test_an_old_kernel_s_patches_come_from_the_archive_of_that_moment(
    publish: Publish, archive: Archive, source: Source, tmp_path: Path
) -> None:
    config = publish(source)
    patches = packaging.get(config, Work(), found(config), tmp_path)
    assert patches is not None
    assert patches.file.read_bytes() == source.packaging
    assert patches.packaging.sha256
    assert not any(path.endswith((".dsc", ".orig.tar.xz")) for path in archive.asked)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "f").write_text("common\n")
    patches.apply(Work(), tree, tmp_path / "scratch")
    assert (tree / "f").read_text() == "realtime\n"
    # a second time nothing is downloaded
    archive.asked.clear()
    assert packaging.get(config, Work(), found(config), tmp_path) == patches
    assert not any(path.startswith(POOL) for path in archive.asked)


def test_the_machine_s_own_entries_serve_without_deb_src(
    publish: Publish, archive: Archive, signer: Signer, source: Source, tmp_path: Path
) -> None:
    """As on most machines: deb822, only ``Types: deb``, another entry that is disabled."""
    config = publish(source)
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "test.sources").write_text(
        f"Types: deb\nURIs: {archive.url}/archive/debian-security/{MOMENT}/\n"
        f"Suites: bookworm-security\nComponents: main\nSigned-By: {signer.keyring}\n"
        "Check-Valid-Until: no\n\n"
        "Types: deb\nURIs: http://127.0.0.1:9/\nSuites: x\nComponents: main\nEnabled: no\n"
    )
    apt = own_lists(config)
    assert apt.settings is not None
    with (apt.settings.parent / "main.conf").open("a") as main:  # instead of the machine's /etc/apt
        main.write(f'Dir::Etc::sourcelist "{tmp_path}/none";\nDir::Etc::sourceparts "{parts}";\n')
    apt.update(Work())
    packages = together(apt.records(Work(), wanted_names(RELEASE)), RELEASE, None)
    assert packages is not None
    patches = packaging.get(config, Work(), packages, tmp_path)
    assert patches is not None
    assert patches.file.read_bytes() == source.packaging


def test_a_server_without_the_file_is_a_refusal(
    publish: Publish, archive: Archive, source: Source, tmp_path: Path
) -> None:
    config = publish(source)
    del archive.files[f"{POOL}/{source.file_name}"]
    with pytest.raises(Unable) as caught:
        packaging.get(config, Work(), found(config), tmp_path)
    assert caught.value.rule == "rt-source"
    assert "404" in caught.value.why
    assert list(tmp_path.glob("*.xz")) == []


@pytest.mark.parametrize("other", [False, True], ids=["no index", "another version"])
def test_an_archive_without_that_source_is_a_refusal(
    publish: Publish, source: Source, tmp_path: Path, other: bool
) -> None:
    config = publish(*([Source("linux", "6.1.55-1", source.packaging)] if other else []))
    with pytest.raises(Unable) as caught:
        packaging.get(config, Work(), found(config), tmp_path)
    assert caught.value.rule == "rt-source"


def test_a_damaged_file_is_refused(
    publish: Publish, archive: Archive, source: Source, tmp_path: Path
) -> None:
    config = publish(source)
    archive.files[f"{POOL}/{source.file_name}"] = bytes(len(source.packaging))
    with pytest.raises(Unable) as caught:
        packaging.get(config, Work(), found(config), tmp_path)
    assert caught.value.rule == "rt-source"
    assert "Hash Sum mismatch" in caught.value.why
    assert list(tmp_path.glob("*.xz")) == []


def test_a_common_kernel_needs_none(publish: Publish, tmp_path: Path) -> None:
    packages = found(publish())
    plain = PackageSet(packages.release, VERSION, packages.image, packages.headers, packages.source, "")
    config = Config(tmp_path / "cache", tmp_path, 1, "http://127.0.0.1:9")
    assert packaging.get(config, Work(), plain, tmp_path) is None


@pytest.mark.parametrize(
    ("option", "refused"), [("# CONFIG_LIVEPATCH is not set", True), ("CONFIG_LIVEPATCH=y", False)]
)
def test_a_kernel_without_livepatch_is_refused_by_its_headers(
    tmp_path: Path, option: str, refused: bool
) -> None:
    root = f"usr/src/linux-headers-{RELEASE}"
    files = {
        f"{root}/.config": f"CONFIG_PREEMPT_RT=y\n{option}\n".encode(),
        f"{root}/Module.symvers": b"",
        f"{root}/.kernelvariables": b"CC = $(CROSS_COMPILE)gcc-12\n",
    }
    downloads, folder = tmp_path / "downloads", tmp_path / "target"
    downloads.mkdir()
    folder.mkdir()
    deb = make_deb(downloads, f"linux-headers-{RELEASE}", VERSION, "amd64", files)
    digest = hashlib.sha256(deb.data).hexdigest()
    package = Package(deb.name, VERSION, "amd64", len(deb.data), digest, 1, "", Apt("test"))
    packages = PackageSet(RELEASE, VERSION, package, package, package, "")
    config = Config(tmp_path / "cache", tmp_path / "state", 1, "http://127.0.0.1:9")
    parts = store._Parts(config, Work(), packages, None, folder, downloads)
    if not refused:
        assert parts.headers().compiler == "gcc-12"
        return
    with pytest.raises(Unable) as caught:
        parts.headers()
    assert caught.value.rule == "no-livepatch"
    assert caught.value.exit_status == 3
