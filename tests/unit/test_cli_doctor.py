"""doctor: finds what lacks, says the command, and shares its list with the Makefile."""

from __future__ import annotations

import json
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from kmend.cli import doctor, main
from kmend.cli.doctor import NEEDS, Lack, Need, apt_command, cache_lacks, is_there, missing, read_needs
from kmend.core.errors import Failed
from kmend.core.live import KernelState

ROOT = Path(__file__).parents[2]


def test_every_library_is_looked_for() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = sorted(row.partition(">")[0] for row in wanted)
    assert sorted(dist.lower() for _, dist in doctor.LIBRARIES) == names


def test_the_list_is_sound() -> None:
    needs = read_needs(NEEDS)
    assert {"gcc-12", "qemu-system-x86", "busybox-static", "libelf-dev", "dwarves"} <= {
        n.package for n in needs
    }
    for need in needs:
        assert need.verbs
        assert need.purpose


def test_damaged_list_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("gcc | gcc | build\n")
    with pytest.raises(Failed, match="3 fields"):
        read_needs(tmp_path / "n")


def test_packages_exist_in_debian() -> None:
    """Each name is one that apt knows (where this machine has package lists)."""
    names = sorted({need.package for need in read_needs(NEEDS)})
    done = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", *names], capture_output=True, check=False
    )
    known = {line.split()[1] for line in done.stdout.decode().splitlines() if line.startswith("Package: ")}
    if "gcc" not in known:
        pytest.skip("no package lists on this machine")
    assert known >= set(names)


def test_is_there(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("")
    (tmp_path / "tool").chmod(0o755)
    assert is_there("tool", str(tmp_path))
    assert not is_there("kmend-no-such-tool", str(tmp_path))
    assert is_there(str(tmp_path / "to*"))
    assert not is_there(str(tmp_path / "x*"))


def test_missing_names_package_verbs_and_one_command(tmp_path: Path) -> None:
    needs = (Need("gcc-12", "gcc-12", ("build",), "compiles"), Need("make", "make", ("build",), "makes"))
    lacks = missing(needs, tmp_path, there=lambda proof: proof == "make", machine="x86_64")
    lacks = [lack for lack in lacks if lack.package]
    assert [(lack.what, lack.verbs) for lack in lacks] == [("gcc-12", ("build",))]
    assert apt_command(lacks).endswith("apt-get install --no-install-recommends gcc-12")
    assert apt_command([]) == ""
    assert any("aarch64" in lack.what for lack in missing((), tmp_path, machine="aarch64"))


def test_cache_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert "written" in cache_lacks(tmp_path / "file" / "cache")[0].what
    monkeypatch.setattr(doctor, "ROOM_PER_TARGET", 10**18)
    assert "GB free" in cache_lacks(tmp_path / "new")[0].why


def test_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = tmp_path / "needs"
    needs.write_text("sh | sh | build | runs\nnone | kmend-no-such-tool | try | is missed\n")
    monkeypatch.setattr(doctor, "NEEDS", needs)
    monkeypatch.setattr(doctor, "ROOM_PER_TARGET", 0)
    assert main(["doctor", "--json", "--cache", str(tmp_path)]) == 3
    document = json.loads(capsys.readouterr().out)
    here = {verb: document["verbs"].pop(verb) for verb in (*doctor.LIVE_VERBS, *doctor.BOOT_VERBS)}
    assert len(here) == 13
    assert document["verbs"] == {"build": True, "try": False, "diff": True, "check": True, "info": True}
    assert [row["package"] for row in document["lacks"] if row["package"]] == ["none"]
    assert document["command"].endswith("none")
    assert main(["doctor", "build", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "build     ready\n"
    assert main(["doctor", "--cache", str(tmp_path)]) == 3
    assert "lacks kmend-no-such-tool" in capsys.readouterr().out
    assert main(["doctor", "nonsense"]) == 2


KERNEL = KernelState("6.1.0-56-amd64", "#1", "", "", True, 0, (), False, "none", False, True)


@pytest.mark.parametrize(
    ("kernel", "lacking", "working"),
    [
        (KERNEL, "", "load"),
        (None, "load", "build"),
        (replace(KERNEL, livepatch=False), "status", "build"),
        (replace(KERNEL, modules_disabled=True), "load", "unload"),
        (replace(KERNEL, ftrace_enabled=False), "unload", "status"),
        (replace(KERNEL, ftrace_enabled=None), "", "unload"),
    ],
)
def test_what_the_running_kernel_cannot_do(kernel: KernelState | None, lacking: str, working: str) -> None:
    verbs = {verb for lack in doctor.live_lacks(kernel) for verb in lack.verbs}
    assert lacking in verbs if lacking else not verbs
    assert working not in verbs
    assert all(lack.mend and not lack.package for lack in doctor.live_lacks(kernel))


def test_this_machine_s_kernel_decides_only_when_it_is_asked_about(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = tmp_path / "needs"
    needs.write_text("sh | sh | build | runs\nnone | kmend-no-such-tool | test | is missed\n")
    monkeypatch.setattr(doctor, "NEEDS", needs)
    monkeypatch.setattr(doctor, "ROOM_PER_TARGET", 0)
    missing_unit = doctor.boot_lacks((tmp_path,))
    monkeypatch.setattr(doctor, "known_kernel", lambda: None)
    monkeypatch.setattr(doctor, "boot_lacks", lambda: missing_unit)
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)  # as installed: nobody is to need what tests need
    assert main(["doctor", "--cache", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "load      lacks a kernel with livepatching" in said
    assert "install   lacks the unit kmend-load.service" in said
    assert "test" not in {line.split()[0] for line in said.splitlines() if line.strip()}
    assert main(["doctor", "load", "--cache", str(tmp_path)]) == 3
    assert main(["doctor", "install", "--cache", str(tmp_path)]) == 3
    assert main(["doctor", "test", "--cache", str(tmp_path)]) == 3


def test_a_system_without_package_lists_is_told_to_fetch_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lack = Lack("make", "makes", ("build",), "make", "")
    monkeypatch.setattr(doctor, "APT_LISTS", "/kmend-no-such-folder/*_Packages*")
    assert "apt-get update && " in apt_command([lack])
    monkeypatch.setattr(doctor, "APT_LISTS", "/etc/host*")
    assert "update" not in apt_command([lack])


def test_setup_reads_the_same_list() -> None:
    assert str(NEEDS.relative_to(ROOT)) in (ROOT / "scripts/setup").read_text()
    assert str(NEEDS.relative_to(ROOT)) in (ROOT / "Makefile").read_text()
