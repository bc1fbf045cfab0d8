"""Prepared targets of real kernels, held against what their packages say."""

from __future__ import annotations

import time

import pytest

from kmend.core.config import Config
from kmend.core.run import run
from kmend.core.target import Target
from kmend.kernel import image, prepare, store

pytestmark = pytest.mark.target


class Steps:
    """Records the steps that were told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def step(self, text: str) -> None:
        self.texts.append(text)

    def amount(self, done: int, total: int) -> None:
        pass


def test_a_second_fetch_does_nothing(config: Config, target_55: Target) -> None:
    steps = Steps()
    began = time.perf_counter()
    assert store.fetch(config, target_55.release, steps) == target_55
    assert time.perf_counter() - began < 0.05
    assert steps.texts == []


def test_the_identity_is_that_of_the_image(target_55: Target, target_56: Target) -> None:
    for target, version in ((target_55, "6.1.192-1"), (target_56, "6.1.192-2")):
        assert target.source_version == version
        assert target.vmlinuz is not None
        assert image.extract_vmlinux(target.vmlinuz.read_bytes()) == target.vmlinux.read_bytes()
        notes = run(["readelf", "-n", "-W", target.vmlinux]).text
        assert f"Build ID: {target.build_id}" in notes
        assert f"Debian {version} " in target.version
    assert target_55.build_id != target_56.build_id


def test_the_tree_is_configured_as_the_package_says(target_55: Target) -> None:
    packaged, ours = target_55.config.read_text(), (target_55.source / ".config").read_text()
    assert prepare.config_changes(packaged, ours) == ()
    # the image package has the configuration too; only what concerns signing is left out of one or the other
    assert target_55.vmlinuz is not None
    boot = (target_55.vmlinuz.parent / f"config-{target_55.release}").read_text()
    assert {c.option for c in prepare.config_changes(boot, ours)} <= {
        "CONFIG_BUILD_SALT",
        "CONFIG_MODULE_SIG_ALL",
        "CONFIG_MODULE_SIG_KEY",
        "CONFIG_SYSTEM_TRUSTED_KEYS",
    }
    assert prepare.package_id_in(target_55.source / "include/generated/package.h") == " Debian 6.1.192-1"
    assert (target_55.source / "tools/objtool/objtool").is_file()


def test_an_altered_option_is_seen(target_55: Target) -> None:
    packaged = target_55.config.read_text()
    altered = packaged.replace("CONFIG_HZ=250", "CONFIG_HZ=1000")
    assert altered != packaged
    assert [c.option for c in prepare.config_changes(packaged, altered)] == ["CONFIG_HZ"]


def test_the_modules_are_those_of_the_package(target_55: Target) -> None:
    assert target_55.modules is not None
    files = {str(p.relative_to(target_55.modules)) for p in target_55.modules.rglob("*.ko")}
    order = (target_55.modules / "modules.order").read_text().split()
    assert files == set(order)
    assert len(files) > 3000
    dependencies = (target_55.modules / "modules.dep").read_text()
    assert "kernel/fs/ext4/ext4.ko: kernel/lib/crc16.ko" in dependencies


def test_this_machines_compiler_is_the_right_one(target_55: Target) -> None:
    assert prepare.compiler_matches(target_55) is None


def test_a_target_takes_less_than_three_gigabytes_and_no_package_is_kept(
    config: Config, target_55: Target
) -> None:
    size = store.size_on_disk(target_55.folder)
    assert size is not None
    assert size < 3_000_000_000
    downloads = config.downloads / target_55.release
    assert not downloads.exists() or list(downloads.iterdir()) == []


def test_make_is_given_what_debian_gave_it(target_55: Target) -> None:
    rows = prepare.make_variables(target_55)
    assert f"KERNELRELEASE={target_55.release}" in rows
    assert "DISTRIBUTION_VERSION=6.1.192-1" in rows
    stamp = next(row.partition("=")[2] for row in rows if row.startswith("KBUILD_BUILD_TIMESTAMP="))
    assert target_55.version.endswith(f" {stamp}")
