"""Configurations compared, the compiler named and compared, generated headers compared."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kmend.core.errors import Failed, Unable
from kmend.core.run import run
from kmend.core.target import Release, Target
from kmend.kernel import prepare

BANNER = (
    "Linux version 6.1.0-55-amd64 (debian-kernel@lists.debian.org) ({compiler}, {linker}) "
    "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-1 (2026-11-14)"
)
VARIABLES_61 = """override ARCH = x86
override KERNELRELEASE = 6.1.0-55-amd64
CCACHE = ccache
CC = $(if $(DEBIAN_KERNEL_USE_CCACHE),$(CCACHE)) $(CROSS_COMPILE)gcc-12
ifneq ($(DEB_BUILD_ARCH),$(DEB_HOST_ARCH))
override CROSS_COMPILE = $(DEB_HOST_GNU_TYPE)-
endif
DEBIAN_KERNEL_NO_CC_VERSION_CHECK = y
"""
VARIABLES_612 = VARIABLES_61.replace(
    "ifneq ($(DEB_BUILD_ARCH),$(DEB_HOST_ARCH))\noverride CROSS_COMPILE = $(DEB_HOST_GNU_TYPE)-\nendif\n",
    "DEB_BUILD_ARCH ?= $(shell dpkg --print-architecture)\noverride CROSS_COMPILE = x86_64-linux-gnu-\n",
)


def test_the_compiler_is_read_from_the_headers_package() -> None:
    assert prepare.compiler_in(VARIABLES_61) == "gcc-12"
    assert prepare.compiler_in(VARIABLES_612) == "x86_64-linux-gnu-gcc-12"
    with pytest.raises(Failed):
        prepare.compiler_in("ARCH = x86\n")


def test_equal_configurations_have_no_changes_whatever_their_layout() -> None:
    old = '#\n# a comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S="x"\n'
    new = 'CONFIG_S="x"\nCONFIG_A=y\n# CONFIG_C is not set\n'
    assert prepare.config_changes(old, new) == ()


def test_changes_that_reach_code_are_found() -> None:
    old = "CONFIG_A=y\nCONFIG_B=m\nCONFIG_N=64\nCONFIG_DEBUG_INFO_BTF=y\n"
    new = "CONFIG_B=y\nCONFIG_N=32\n# CONFIG_A is not set\nCONFIG_NEW=y\n"
    assert [str(c) for c in prepare.config_changes(old, new)] == [
        "CONFIG_A: y -> not set",
        "CONFIG_B: m -> y",
        "CONFIG_DEBUG_INFO_BTF: y -> not set",
        "CONFIG_N: 64 -> 32",
        "CONFIG_NEW: not set -> y",
    ]


def test_harmless_options_are_passed_over_but_not_their_neighbours() -> None:
    old = 'CONFIG_CC_VERSION_TEXT="gcc-12 a"\nCONFIG_PAHOLE_VERSION=124\nCONFIG_GCC_VERSION=120200\n'
    new = 'CONFIG_CC_VERSION_TEXT="gcc-12 b"\nCONFIG_RUSTC_VERSION=0\nCONFIG_GCC_VERSION=130000\n'
    assert [c.option for c in prepare.config_changes(old, new)] == ["CONFIG_GCC_VERSION"]


def test_no_source_file_tests_a_harmless_option() -> None:
    # the reasons in the table are claims about the option's names: a rule for all must not creep in
    for row in prepare.HARMLESS:
        assert not row.pattern.fullmatch("CONFIG_ANYTHING")
        assert not row.pattern.fullmatch("CONFIG_DEBUG_INFO_BTF_MODULES")


def test_make_is_given_what_the_build_was_given() -> None:
    banner = prepare.parse_banner(BANNER.format(compiler="gcc-12 (X) 12.2.0", linker="GNU ld 2.40"))
    rows = prepare.variables(banner, "gcc-12", " Debian 6.1.192-1")
    assert {
        "KERNELRELEASE=6.1.0-55-amd64",
        "CC=gcc-12",
        "KBUILD_BUILD_TIMESTAMP=Debian 6.1.192-1 (2026-11-14)",
        "DISTRIBUTION_OFFICIAL_BUILD=1",
        "DISTRIBUTOR=Debian",
        "DISTRIBUTION_VERSION=6.1.192-1",
    } <= set(rows)
    assert not any(row.startswith("DISTRIBUT") for row in prepare.variables(banner, "gcc-12", ""))


def target(tmp_path: Path, banner: str, compiler: str) -> Target:
    return Target(
        release=Release("6.1.0-55-amd64"), source_version="6.1.192-1", banner=banner, build_id="00",
        folder=tmp_path, source=tmp_path, config=tmp_path, symvers=tmp_path, vmlinux=tmp_path, vmlinuz=None,
        modules=None, compiler=compiler,
    )  # fmt: skip


def first_line(*argv: str) -> str:
    return run(argv).text.partition("\n")[0]


def test_this_machines_compiler_is_accepted_and_others_are_refused(tmp_path: Path) -> None:
    compiler = first_line("gcc", "--version")
    linker = re.sub(r"\(compatible with [^)]*\)", "", first_line("ld", "-v")).rstrip()
    right = target(tmp_path, BANNER.format(compiler=compiler, linker=linker), "gcc")
    assert prepare.compiler_matches(right) is None
    renamed = compiler.replace("gcc", "x86_64-linux-gnu-gcc-12", 1)
    assert (
        prepare.compiler_matches(replace(right, banner=BANNER.format(compiler=renamed, linker=linker)))
        is None
    )

    other = BANNER.format(compiler="gcc-12 (Debian 12.2.0-13) 12.2.0", linker=linker)
    refusal = prepare.compiler_matches(replace(right, banner=other))
    assert refusal is not None
    assert refusal.rule == "wrong-compiler"
    assert compiler in refusal.why
    assert "12.2.0-13" in refusal.why
    assert "gcc-12=12.2.0-13" in refusal.next_step

    refusal = prepare.compiler_matches(
        replace(
            right, banner=BANNER.format(compiler=compiler, linker="GNU ld (GNU Binutils for Debian) 2.30")
        )
    )
    assert refusal is not None
    assert "linker" in refusal.what

    refusal = prepare.compiler_matches(replace(right, compiler="gcc-of-nowhere"))
    assert refusal is not None
    assert "not installed" in refusal.why
    with pytest.raises(Unable) as caught:
        prepare.need_compiler(prepare.parse_banner(other), "gcc")
    assert caught.value.exit_status == 3


def headers(root: Path, **texts: str) -> Path:
    folder = root / "include" / "generated"
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name}.h").write_text(text)
    return root


def test_generated_headers_are_compared(tmp_path: Path) -> None:
    auto = "#define CONFIG_A 1\n#define CONFIG_PAHOLE_VERSION 124\n"
    packaged = headers(tmp_path / "p", autoconf=auto, bounds="#define B 1\n", compile="theirs", later="x")
    same = headers(
        tmp_path / "s", autoconf=auto.replace("124", "125"), bounds="#define B 1\n", compile="ours"
    )
    prepare.compare_generated(same, packaged)

    with pytest.raises(Unable) as caught:
        prepare.compare_generated(headers(tmp_path / "b", autoconf=auto, bounds="#define B 2\n"), packaged)
    assert caught.value.rule == "generated-drift"
    assert "#define B 2" in caught.value.why

    with pytest.raises(Unable) as caught:
        prepare.compare_generated(headers(tmp_path / "c", autoconf="", bounds="#define B 1\n"), packaged)
    assert caught.value.rule == "config-drift"
    assert "CONFIG_A" in caught.value.why
    assert "PAHOLE" not in caught.value.why


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = prepare.Tool("no-such-program", "no-such-package", "a test")
    header = prepare.Tool("<no/such/header.h>", "no-such-dev", "a test")
    monkeypatch.setattr(prepare, "TOOLS", (prepare.Tool("gcc", "gcc", "a test"), lacking, header))
    assert prepare.missing_tools() == (lacking, header)
    with pytest.raises(Unable) as caught:
        prepare.need_tools()
    assert caught.value.rule == "missing-tool"
    assert caught.value.next_step == "apt-get install no-such-package no-such-dev"
