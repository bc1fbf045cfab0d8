"""What the Debian package installs: pages and completion from the parsers, units, scripts, the command."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kmend import __version__
from kmend.cli import VERBS

PACKAGING = Path(__file__).parents[2] / "packaging"


def script(name: str) -> ModuleType:
    """A script of the folder, imported."""
    spec = importlib.util.spec_from_file_location(f"kmend_packaging_{name}", PACKAGING / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generated")
    subprocess.run([sys.executable, PACKAGING / "generate.py", out], check=True)
    return out


def test_every_verb_has_a_page_that_names_its_flags(generated: Path) -> None:
    for verb in VERBS:
        text = (generated / f"man1/kmend-{verb.name}.1").read_text()
        assert f"kmend\\-{verb.name} \\- " in text
        assert "\\-\\-json" in text
    load = (generated / "man1/kmend-load.1").read_text()
    assert "\\-\\-on\\-stall reverse|wait|ask" in load
    assert "%(" not in load
    assert {"kmend.1", "kmend-kernel-fetch.1"} <= {path.name for path in (generated / "man1").iterdir()}


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff on this machine")
def test_troff_has_nothing_to_complain_about(generated: Path) -> None:
    for page in sorted((generated / "man1").iterdir()):
        done = subprocess.run(
            ["groff", "-man", "-Tascii", "-ww", "-rLL=100n", "-P-cbou", page], capture_output=True, check=True
        )
        complaints = [line for line in done.stderr.decode().splitlines() if "adjust" not in line]
        assert complaints == [], page.name
        assert b"NAME" in done.stdout


def completed(generated: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    lines = (
        f"source {generated}/bash/kmend\n"
        'COMP_WORDS=("$@") COMP_CWORD=$(($#-1)) COMPREPLY=()\n_kmend 2>/dev/null\n'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", lines, "bash", *words], capture_output=True, check=True)
    return set(done.stdout.decode().split())


def test_bash_completes_verbs_flags_and_values(generated: Path, tmp_path: Path) -> None:
    assert completed(generated, "kmend", "") == {verb.name for verb in VERBS}
    assert completed(generated, "kmend", "uni") == {"uninstall"}
    assert {"--all", "--boot", "--retry", "--wait"} <= completed(generated, "kmend", "load", "--")
    assert completed(generated, "kmend", "load", "--on-stall", "") == {"reverse", "wait", "ask"}
    assert completed(generated, "kmend", "kernel", "") == {"fetch", "list", "show"}
    assert "--modules" in completed(generated, "kmend", "--json", "kernel", "fetch", "--")
    (tmp_path / "fix.ko").write_text("")
    assert completed(generated, "kmend", "load", f"{tmp_path}/f") == {f"{tmp_path}/fix.ko"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
def test_zsh_can_read_its_script(generated: Path) -> None:
    subprocess.run(["zsh", "-n", generated / "zsh/_kmend"], check=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    """Also: no ordering cycle."""
    units = sorted((PACKAGING / "systemd").iterdir())
    for unit in units:
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/kmend", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(tmp_path / unit.name for unit in units)],
        capture_output=True,
        check=False,
    )
    said = [line for line in done.stderr.decode().splitlines() if "kmend" in line]
    assert said == []
    assert done.returncode == 0


@pytest.mark.parametrize("word", ["yes", "no"])
def test_the_initramfs_hook_puts_the_switch_into_the_image_when_told(tmp_path: Path, word: str) -> None:
    (tmp_path / "initramfs.conf").write_text(f"KMEND_INITRAMFS={word}\n")
    hook = (PACKAGING / "initramfs/hooks/kmend").read_text()
    copy = tmp_path / "hook"
    copy.write_text(hook.replace("/etc/kmend/initramfs.conf", str(tmp_path / "initramfs.conf")))
    image = tmp_path / "image"
    subprocess.run(["sh", copy], env={"DESTDIR": str(image), "PATH": "/usr/bin:/bin"}, check=True)
    assert (image / "conf/conf.d/kmend").exists() is (word == "yes")
    assert subprocess.run(["sh", copy, "prereqs"], capture_output=True, check=True).stdout == b"\n"


def test_the_initramfs_is_off_unless_somebody_turns_it_on() -> None:
    assert "KMEND_INITRAMFS=no" in (PACKAGING / "initramfs/kmend.conf").read_text().splitlines()


def test_every_shell_script_can_be_read() -> None:
    scripts = [
        *(PACKAGING / "debian").iterdir(),
        *(path for path in (PACKAGING / "initramfs").rglob("kmend") if path.is_file()),
    ]
    assert len(scripts) == 5
    for path in scripts:
        subprocess.run(["sh", "-n", path], check=True)
        assert path.stat().st_mode & 0o111, path


def dynamic(library: Path) -> str:
    """What readelf says of a library's dynamic section."""
    return subprocess.run(["readelf", "-dW", library], capture_output=True, check=True).stdout.decode()


@pytest.mark.parametrize("tags", ["new", "old"])
def test_a_library_loses_its_search_path_and_nothing_else(tmp_path: Path, tags: str) -> None:
    source, library = tmp_path / "x.c", tmp_path / "x.so"
    source.write_text("int answer(void) { return 42; }\n")
    flags = (
        f"-shared -fPIC -Wl,-rpath,/nowhere,--{'enable' if tags == 'new' else 'disable'}-new-dtags".split()
    )
    subprocess.run(["gcc", *flags, "-o", library, source], check=True)
    before = dynamic(library)
    assert ("RUNPATH" if tags == "new" else "RPATH") in before
    build = script("build_deb")
    library.write_bytes(build.without_search_path(library.read_bytes()))
    after = dynamic(library)
    assert "PATH" not in after
    kept = [line.split()[1] for line in before.splitlines()[3:] if "PATH" not in line]
    assert [line.split()[1] for line in after.splitlines()[3:]] == kept
    assert ctypes.CDLL(str(library)).answer() == 42
    with pytest.raises(ValueError, match="ELF64"):
        build.without_search_path(b"\x7fELF\x01\x01")


def test_the_changelog_speaks_of_this_version() -> None:
    assert script("build_deb").version_of_changelog() == __version__


def test_what_every_debian_has_is_not_asked_for() -> None:
    names = script("build_deb").recommended().split(", ")
    assert "gcc-12" in names
    assert not {"dpkg", "git", "python3-venv"} & set(names)


def test_the_packaged_command_runs_from_its_own_folder_alone(tmp_path: Path, generated: Path) -> None:
    """With the system's own interpreter settings switched off, as it is installed."""
    build = script("build_deb")
    build.fill(tmp_path, generated)
    for name in ("lz4", "zstandard", "capstone", "rich", "qemu", "vmlinux_to_elf", "kmend"):
        assert (tmp_path / build.LIBRARY / name).exists(), name
    assert not (tmp_path / build.LIBRARY / "hypothesis").exists()
    listed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {
        "usr/lib/systemd/system/kmend-load.service",
        "usr/share/initramfs-tools/scripts/local-bottom/kmend",
        "usr/share/man/man1/kmend-install.1.gz",
        "usr/share/doc/kmend/copyright",
        "usr/share/doc/kmend/docs/boot.md",
    } <= listed
    assert not [name for name in listed if name.endswith(".pyc")]
    # nothing of other architectures, nothing that looks for libraries where this machine has them
    assert not [name for name in listed if "elf_tests" in name]
    libraries = [name for name in listed if name.endswith(".so")]
    assert len(libraries) > 5
    for name in libraries:
        assert "PATH" not in dynamic(tmp_path / name), name
    command = tmp_path / "usr/bin/kmend"
    command.write_text(command.read_text().replace("/usr/lib/kmend", str(tmp_path / build.LIBRARY)))
    for words, want in (
        (["--version"], f"kmend {__version__}"),
        (["install", "--help"], "kmend-load.service"),
    ):
        done = subprocess.run(
            [sys.executable, "-I", command, *words],
            capture_output=True,
            check=True,
            env={"PYTHONPATH": "/nowhere", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert want in done.stdout.decode()


@pytest.mark.parametrize(
    ("state", "tried"),
    [("enabled", True), ("disabled", False), ("masked", False), ("no unit at all", True)],
)
def test_the_initramfs_loads_nothing_where_the_unit_is_switched_off(
    tmp_path: Path, state: str, tried: bool
) -> None:
    """Else nothing would say that the boot is healthy, and the next one would be refused by the guard."""
    units = tmp_path / "etc/systemd/system"
    (units / "sysinit.target.wants").mkdir(parents=True)
    if state != "no unit at all":
        (tmp_path / "usr/lib/systemd/system").mkdir(parents=True)
        (tmp_path / "usr/lib/systemd/system/kmend-load.service").touch()
    if state in ("enabled", "masked"):
        (units / "sysinit.target.wants/kmend-load.service").symlink_to("/nowhere")
    if state == "masked":
        (units / "kmend-load.service").symlink_to("/dev/null")
    assert initramfs_script_tries(tmp_path) is tried


@pytest.mark.parametrize(
    ("table", "unit", "tried"),
    [
        ("UUID=1 / ext4 defaults 0 1\n# /dev/sdb1 /var ext4\n#UUID=2 /var ext4 x 0 2\n", "", True),
        ("UUID=1 / ext4 defaults 0 1\nUUID=2 /var ext4 defaults 0 2\n", "", False),
        ("UUID=2\t/var/lib/kmend\text4\tdefaults\t0 2", "", False),  # no newline at its end
        ("UUID=2\t/var/lib/kmend\text4\tdefaults\t0 2\n", "", False),
        ("UUID=3 /var/log ext4 defaults 0 2\n", "", True),
        ("", "var-lib.mount", False),
        ("", "var-log.mount", True),
    ],
)
def test_the_initramfs_leaves_a_store_that_the_system_will_not_see(
    tmp_path: Path, table: str, unit: str, tried: bool
) -> None:
    """Its mark would stay where nothing takes it away."""
    if table:
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/fstab").write_text(table)
    if unit:
        (tmp_path / "etc/systemd/system").mkdir(parents=True)
        (tmp_path / "etc/systemd/system" / unit).touch()
    assert initramfs_script_tries(tmp_path) is tried


def initramfs_script_tries(tmp_path: Path) -> bool:
    """Whether the script would load something from that root."""
    script = (PACKAGING / "initramfs/scripts/kmend").read_text()
    release = subprocess.run(["uname", "-r"], capture_output=True, check=True, text=True).stdout.strip()
    for path in (f"var/lib/kmend/{release}/index.json", "usr/bin/kmend"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch(0o755)
    # what would need root, and the kernel's own files, are not this test's
    before, _, _ = script.partition("# the mark of the crash guard must be on the disk")
    copy = tmp_path / "script"
    copy.write_text(
        before.replace("/proc/cmdline", "/dev/null").replace("/proc/vmcore", "/no") + "echo tried\n"
    )
    environment = {"rootmnt": str(tmp_path), "KMEND_INITRAMFS": "yes", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["sh", copy], env=environment, capture_output=True, check=True, text=True)
    return done.stdout == "tried\n"
