"""Old kernels from an archive laid out like snapshot.debian.org, authenticated by apt."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from archive import Archive, Deb, Signer, make_deb, serving

from kmend.core.config import Config
from kmend.core.errors import Failed, Unable
from kmend.core.target import Release
from kmend.kernel.debian import GoneError, OfflineError
from kmend.kernel.snapshot import Snapshot
from kmend.kernel.work import Work

pytestmark = pytest.mark.skipif(
    not all(shutil.which(p) for p in ("apt-get", "dpkg-deb", "gpg", "gpgv")),
    reason="needs apt-get, dpkg-deb, gpg and gpgv",
)

RELEASE = Release("6.1.0-12-amd64")
MOMENT = "20230907T120000Z"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    made = Signer(tmp_path_factory.mktemp("key"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def debs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Deb]]:
    """Two versions of the packages of one kernel."""
    folder = tmp_path_factory.mktemp("debs")
    made = {}
    for version in ("6.1.52-1", "6.1.55-1"):
        made[version] = [
            make_deb(folder, f"linux-image-{RELEASE}", version, "amd64", {"boot/vmlinuz": version.encode()}),
            make_deb(
                folder,
                f"linux-headers-{RELEASE}",
                version,
                "amd64",
                {"usr/src/x": b"x"},
                depends=f"linux-headers-6.1.0-12-common (= {version}), linux-kbuild-6.1 (>= {version})",
            ),
            make_deb(folder, "linux-source-6.1", version, "all", {"usr/src/y": version.encode() * 1000}),
        ]
    return made


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Archive()) as running:
        yield running


@pytest.fixture
def snapshot(archive: Archive, signer: Signer, tmp_path: Path) -> Snapshot:
    config = Config(tmp_path / "cache", tmp_path / "state", 1, archive.url, signer.keyring)
    return Snapshot(config, Work())


def test_an_old_version_is_found_and_downloaded(
    archive: Archive, signer: Signer, debs: dict[str, list[Deb]], snapshot: Snapshot, tmp_path: Path
) -> None:
    archive.publish(signer, "debian-security", MOMENT, "bookworm-security", debs["6.1.52-1"])
    found = snapshot.find(RELEASE, "6.1.52-1")
    assert found is not None
    assert (found.version, found.common) == ("6.1.52-1", "linux-headers-6.1.0-12-common=6.1.52-1")
    by_name = {deb.name: deb for deb in debs["6.1.52-1"]}
    for package in found.all:
        path = package.archive.download(Work(), package, tmp_path)
        assert path.read_bytes() == by_name[package.name].data


def test_the_newest_version_is_taken_when_none_is_named(
    archive: Archive, signer: Signer, debs: dict[str, list[Deb]], snapshot: Snapshot
) -> None:
    archive.publish(signer, "debian-security", "20230901T000000Z", "bookworm-security", debs["6.1.52-1"])
    archive.publish(signer, "debian-security", MOMENT, "bookworm-security", debs["6.1.55-1"])
    found = snapshot.find(RELEASE, None)
    assert found is not None
    assert found.version == "6.1.55-1"
    assert {p.version for p in found.all} == {"6.1.55-1"}


def test_the_index_of_a_later_day_serves_when_the_first_lacks_the_package(
    archive: Archive, signer: Signer, debs: dict[str, list[Deb]], snapshot: Snapshot
) -> None:
    archive.publish(signer, "debian", "20230908T120000Z", "bookworm", debs["6.1.52-1"])
    for deb in debs["6.1.52-1"]:  # seen a day before an index had it
        archive.files.pop(f"/mr/binary/{deb.name}/")
        archive.describe(deb, "debian", MOMENT)
    found = snapshot.find(RELEASE, "6.1.52-1")
    assert found is not None
    assert found.version == "6.1.52-1"


def test_unknown_releases_and_versions_are_none(
    archive: Archive, signer: Signer, debs: dict[str, list[Deb]], snapshot: Snapshot
) -> None:
    archive.publish(signer, "debian-security", MOMENT, "bookworm-security", debs["6.1.52-1"])
    assert snapshot.find(Release("6.1.0-13-amd64"), None) is None
    assert snapshot.find(RELEASE, "6.1.53-1") is None


def test_a_foreign_signature_is_refused(
    archive: Archive, signer: Signer, debs: dict[str, list[Deb]], snapshot: Snapshot, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Signer(tmp_path / "other")
    try:
        archive.publish(stranger, "debian-security", MOMENT, "bookworm-security", debs["6.1.52-1"])
    finally:
        stranger.close()
    with pytest.raises(Unable) as caught:
        snapshot.find(RELEASE, "6.1.52-1")
    assert caught.value.rule == "unauthenticated"
    assert str(signer.keyring) in caught.value.why


def test_an_index_changed_after_it_was_signed_is_refused(
    archive: Archive, signer: Signer, debs: dict[str, list[Deb]], snapshot: Snapshot
) -> None:
    archive.publish(signer, "debian-security", MOMENT, "bookworm-security", debs["6.1.52-1"])
    root = f"/archive/debian-security/{MOMENT}/dists/bookworm-security/main/binary-amd64"
    archive.files.pop(f"{root}/Packages.gz")
    index = archive.files[f"{root}/Packages"]
    archive.files[f"{root}/Packages"] = index.replace(b"made for a test", b"made for a TEST")
    with pytest.raises(Unable) as caught:
        snapshot.find(RELEASE, "6.1.52-1")
    assert caught.value.rule == "unauthenticated"


def test_a_changed_package_is_refused_and_not_kept(
    archive: Archive, signer: Signer, debs: dict[str, list[Deb]], snapshot: Snapshot, tmp_path: Path
) -> None:
    archive.publish(signer, "debian-security", MOMENT, "bookworm-security", debs["6.1.52-1"])
    found = snapshot.find(RELEASE, "6.1.52-1")
    assert found is not None
    image = debs["6.1.52-1"][0]
    damaged = bytearray(image.data)
    damaged[len(damaged) // 2] ^= 1
    archive.files[f"/archive/debian-security/{MOMENT}/{image.pool}"] = bytes(damaged)
    with pytest.raises(Failed):
        found.image.archive.download(Work(), found.image, tmp_path)
    assert not (tmp_path / image.file_name).exists()


def test_a_damaged_or_partial_file_in_the_cache_is_mended(
    archive: Archive, signer: Signer, debs: dict[str, list[Deb]], snapshot: Snapshot, tmp_path: Path
) -> None:
    archive.publish(signer, "debian-security", MOMENT, "bookworm-security", debs["6.1.52-1"])
    found = snapshot.find(RELEASE, "6.1.52-1")
    assert found is not None
    source = next(deb for deb in debs["6.1.52-1"] if deb.name == "linux-source-6.1")
    path = tmp_path / source.file_name
    damaged = source.data[:50] + bytes([source.data[50] ^ 0xFF]) + source.data[51:]
    for content in (damaged, damaged[:-20], source.data[:-20], source.data + b"more", b""):
        path.write_bytes(content)
        assert found.source.archive.download(Work(), found.source, tmp_path).read_bytes() == source.data
    asked = len(archive.asked)
    found.source.archive.download(Work(), found.source, tmp_path)
    assert len(archive.asked) == asked, "a complete file must not be asked for again"


def test_a_package_that_the_server_lost_is_said_so(
    archive: Archive, signer: Signer, debs: dict[str, list[Deb]], snapshot: Snapshot, tmp_path: Path
) -> None:
    archive.publish(signer, "debian-security", MOMENT, "bookworm-security", debs["6.1.52-1"])
    found = snapshot.find(RELEASE, "6.1.52-1")
    assert found is not None
    archive.files.pop(f"/archive/debian-security/{MOMENT}/{debs['6.1.52-1'][0].pool}")
    with pytest.raises(GoneError):
        found.image.archive.download(Work(), found.image, tmp_path)


def test_answers_of_another_form_are_refused(archive: Archive, snapshot: Snapshot) -> None:
    for answer in (b"<html>", b"[]", b'{"result": 3}', b'{"result": [{"version": "1"}]}'):
        archive.files[f"/mr/binary/linux-image-{RELEASE}/"] = answer
        with pytest.raises(Failed) as caught:
            snapshot.find(RELEASE, None)
        assert caught.value.rule == "mirror"


def test_no_server_is_told_from_no_package(signer: Signer, tmp_path: Path) -> None:
    config = Config(tmp_path / "cache", tmp_path / "state", 1, "http://127.0.0.1:9", signer.keyring)
    with pytest.raises(OfflineError) as caught:
        Snapshot(config, Work()).find(RELEASE, None)
    assert caught.value.exit_status == 3
