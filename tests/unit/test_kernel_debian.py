"""Which packages belong together, and which releases are near."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kmend.core.config import Config
from kmend.core.errors import Unable
from kmend.core.target import Release
from kmend.kernel import debian, prepared
from kmend.kernel.debian import Apt, Package, together
from kmend.kernel.work import Work

RELEASE = "6.1.0-55-amd64"


def package(name: str, version: str, depends: str = "") -> Package:
    return Package(name, version, "amd64", 1, "00", 1, depends, Apt("test"))


def kernel(version: str, *, headers: str | None = None) -> list[Package]:
    return [
        package(f"linux-image-{RELEASE}", version),
        package(
            f"linux-headers-{RELEASE}",
            headers or version,
            f"linux-headers-6.1.0-55-common (= {version}), linux-kbuild-6.1 (>= {version})",
        ),
        package("linux-source-6.1", version),
    ]


def test_packages_of_one_version_belong_together() -> None:
    rows = [*kernel("6.1.192-1"), package("linux-source-6.1", "6.1.192-2")]
    found = together(rows, RELEASE, None)
    assert found is not None
    assert {p.version for p in found.all} == {"6.1.192-1"}
    assert found.common == "linux-headers-6.1.0-55-common=6.1.192-1"


def test_the_first_complete_version_is_taken_and_an_exact_one_is_obeyed() -> None:
    rows = [package(f"linux-image-{RELEASE}", "3"), *kernel("2"), *kernel("1")]
    newest, exact = together(rows, RELEASE, None), together(rows, RELEASE, "1")
    assert newest is not None
    assert exact is not None
    assert (newest.version, exact.version) == ("2", "1")
    assert together(rows, RELEASE, "3") is None


def test_headers_of_another_version_do_not_serve() -> None:
    assert together(kernel("2", headers="1"), RELEASE, None) is None


def test_an_unsigned_image_serves_when_there_is_no_signed_one() -> None:
    rows = [package(f"linux-image-{RELEASE}-unsigned", "1"), *kernel("1")[1:]]
    found = together(rows, RELEASE, None)
    assert found is not None
    assert found.image.name.endswith("-unsigned")


def test_apts_records_are_read() -> None:
    text = (
        "Package: linux-image-x\nVersion: 1:2-3\nInstalled-Size: 400644\nArchitecture: amd64\n"
        "Depends: kmod, a (= 1)\nDescription: Linux\n more text\nSize: 70\nSHA256: ABCD\n\n"
        "Package: installed-only\nVersion: 1\nArchitecture: amd64\nStatus: install ok installed\n\n"
    )
    (row,) = Apt("test")._packages(text + text)
    assert (row.name, row.version, row.size, row.sha256) == ("linux-image-x", "1:2-3", 70, "abcd")
    assert row.installed == 400644 * 1024
    assert row.file_name == "linux-image-x_1%3a2-3_amd64.deb"


@pytest.mark.parametrize(
    ("release", "line"),
    [("6.1.0-55-amd64", "6.1"), ("6.12.117+deb12-cloud-amd64", "6.12"), ("5.10.0-8-rt-amd64", "5.10")],
)
def test_the_line_of_a_release(release: str, line: str) -> None:
    assert debian.line_of(release) == line


@pytest.mark.parametrize("text", ["", "foo", "../6.1", "6", "6.1/../x", "6.1.0 x", "-6.1", "6.1.0\n"])
def test_what_is_no_release_is_refused(text: str) -> None:
    with pytest.raises(Unable) as caught:
        debian.line_of(text)
    assert caught.value.rule == "unknown-release"


def test_near_releases_have_the_same_flavour_and_close_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = [
        "6.1.0-54-amd64",
        "6.1.0-56-amd64",
        "6.1.0-9-amd64",
        "6.1.0-55-cloud-amd64",
        "6.12.1+deb12-amd64",
    ]
    monkeypatch.setattr(Apt, "kernels", lambda self, work: tuple(Release(k) for k in known))
    config = Config(tmp_path, tmp_path, 1, "")
    assert debian.near(Work(), config, "6.1.0-57-amd64", count=2) == ("6.1.0-56-amd64", "6.1.0-54-amd64")
    assert debian.near(Work(), config, "6.1.0-50-cloud-amd64", count=1) == ("6.1.0-55-cloud-amd64",)
    assert debian.near(Work(), config, "6.12.2+deb12-amd64", count=1) == ("6.12.1+deb12-amd64",)


def test_the_running_kernels_own_version_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    uname = os.uname_result(("Linux", "host", RELEASE, "#1 SMP Debian 6.1.192-1 (2026-11-14)", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: uname)
    assert prepared.running_version(RELEASE) == "6.1.192-1"
    assert prepared.running_version("6.1.0-54-amd64") is None


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert debian.has_sha256(path, digest)
    path.write_bytes(b"abd")
    assert not debian.has_sha256(path, digest)
    assert not debian.has_sha256(tmp_path / "absent", digest)
    assert not debian.has_sha256(tmp_path, digest)
