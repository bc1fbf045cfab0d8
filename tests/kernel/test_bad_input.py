"""Bad input and bad luck, as a user meets them: one clear line, the exit status, nothing left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from archive import Archive, Deb, Signer, make_deb, serving

from kmend.cli import main
from kmend.core.config import Config
from kmend.core.target import Target

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CMDLINE = EXAMPLES / "cmdline.patch"
KMEND = (sys.executable, "-m", "kmend")
#: What a run may leave in a cache: downloaded lists, the compiled originals, locks and empty folders.
KEPT = ("apt", "objects", "lab")


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command ended: exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """What went wrong, the reasons and the next steps: lines for people, without progress."""
        return [line for line in (self.err + self.out).splitlines() if line and not line.endswith("…")]


def ask(argv: Sequence[str | Path], **more: str) -> Answer:
    """Run the real command as a user does; ``more`` is added to the environment."""
    env = {**os.environ, **more}
    words = [str(word) for word in argv]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=env)
    assert "Traceback" not in done.stderr + done.stdout
    assert "inside kmend" not in done.stderr + done.stdout
    return Answer(done.returncode, done.stdout, done.stderr)


def refused(answer: Answer, status: int, what: str) -> None:
    """The command ended so: one line says what, one why, one what to do next."""
    assert answer.status == status, answer
    said = "\n".join(answer.said)
    assert what in said
    assert "why: " in said
    assert "next: " in said


def files(folder: Path) -> set[str]:
    """Every file below the folder that a run has no business to leave."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {str(path) for path in found if path.parts[0] not in KEPT and ".lock" not in path.name}


@pytest.fixture
def cache(config: Config, tmp_path: Path) -> Path:
    """An empty cache that has the prepared kernels."""
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "targets").symlink_to(config.targets)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def left(cache: Path) -> list[str]:
    """What lies in the scratch folders of a cache."""
    places = (cache / "scratch", cache / "objects" / "work")
    return sorted(path.name for place in places if place.is_dir() for path in place.iterdir())


def build(cache: Path, out: Path, patch: Path = CMDLINE, release: str = "6.1.0-56-amd64") -> list[str]:
    return [*KMEND, "build", str(patch), "--kernel", release, "--cache", str(cache), "-o", str(out)]


# -- patches ---------------------------------------------------------------------------------------------

NO_PATCHES: dict[str, bytes] = {
    "empty": b"",
    "prose": b"Dear all,\nplease find attached the fix.\n",
    "elf": b"\x7fELF\x02\x01\x01" + bytes(80),
    "noise": random.Random(1).randbytes(5000),
    "context diff": b"*** a/x.c\n--- b/x.c\n***************\n*** 1,2 ****\n! a\n--- 1,2 ----\n! b\n",
    "cut short": CMDLINE.read_bytes()[:-60],
    "header alone": b"--- a/fs/proc/cmdline.c\n+++ b/fs/proc/cmdline.c\n",
    "hunk too long": CMDLINE.read_bytes() + b" \tone line more\n",
    "no names": b"@@ -1 +1 @@\n-a\n+b\n",
}


@pytest.mark.parametrize("kind", NO_PATCHES)
def test_what_is_no_patch(cache: Path, out: Path, tmp_path: Path, kind: str) -> None:
    patch = tmp_path / "the.patch"
    patch.write_bytes(NO_PATCHES[kind])
    refused(ask(build(cache, out, patch)), 2, "the.patch")
    assert files(cache) == set()
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["gone.patch", "."])
def test_a_patch_that_cannot_be_read(cache: Path, out: Path, tmp_path: Path, name: str) -> None:
    refused(ask(build(cache, out, tmp_path / name)), 2, str(tmp_path / name))


@pytest.mark.target
@pytest.mark.usefixtures("target_56")
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ((b"saved_command_line);", b"saved_cmdline);"), "does-not-apply"),
        ((b"fs/proc/cmdline.c", b"fs/proc/nothing.c"), "does-not-apply"),
        ((b"fs/proc/cmdline.c", b"../../../etc/passwd"), "does-not-apply"),
    ],
)
def test_a_patch_that_does_not_apply(
    cache: Path, out: Path, tmp_path: Path, change: tuple[bytes, bytes], rule: str
) -> None:
    patch = tmp_path / "the.patch"
    patch.write_bytes(CMDLINE.read_bytes().replace(*change))
    answer = ask([*build(cache, out, patch), "--json"])
    assert answer.status == 1
    (row,) = json.loads(answer.out)["refused"]
    assert row["rule"] == rule
    assert row["what"] and row["why"] and row["next_step"]
    assert files(cache) == set()
    assert left(cache) == []
    assert list(out.iterdir()) == []


# -- kernels and packages ----------------------------------------------------------------------------------

#: Nobody listens there.
CLOSED = "http://127.0.0.1:9"
#: The package archive is out of reach for apt and for kmend, this machine is not.
OFFLINE = {"http_proxy": CLOSED, "https_proxy": CLOSED, "no_proxy": "127.0.0.1", "KMEND_MIRROR": CLOSED}
RELEASE = "6.1.0-12-amd64"


def fetch(cache: Path, release: str = RELEASE) -> list[str]:
    return [*KMEND, "kernel", "fetch", release, "--cache", str(cache)]


@pytest.mark.parametrize("release", ["nonsense", "../6.1.0-56-amd64", "", "6.1.0-56-amd64/.."])
def test_what_is_no_release(tmp_path: Path, out: Path, release: str) -> None:
    for command in (fetch(tmp_path / "cache", release), build(tmp_path / "cache", out, release=release)):
        refused(ask(command, **OFFLINE), 3, "is no kernel release")
    assert not (tmp_path / "cache").exists()


def test_no_network(tmp_path: Path, out: Path) -> None:
    """In a network of its own, in which nothing is."""
    cache = tmp_path / "cache"
    answer = ask([*alone("-n"), *build(cache, out), "--json"])
    assert answer.status == 3
    (row,) = json.loads(answer.out)["refused"]
    assert row["rule"] == "no-network"
    assert "connect this machine" in row["next_step"]
    assert files(cache) == set()
    assert list(out.iterdir()) == []


def alone(*namespaces: str) -> list[str]:
    """The beginning of a command with namespaces of its own; skips the test where that is forbidden."""
    prefix = ["unshare", *([] if os.geteuid() == 0 else ["-r"]), *namespaces]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"this machine does not allow {' '.join(prefix)}")
    return prefix


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    made = Signer(tmp_path_factory.mktemp("key"))
    yield made
    made.close()


@dataclass(frozen=True, slots=True)
class Shelf:
    """A made-up archive with one kernel, whose packages are real ones but hold no kernel."""

    archive: Archive
    debs: dict[str, Deb]
    env: dict[str, str]

    def asked(self, name: str) -> int:
        """How often a package was asked for."""
        return sum(path.endswith(self.debs[name].file_name) for path in self.archive.asked)

    def damage(self, name: str) -> bytes:
        """A package's bytes with one of them changed."""
        data = bytearray(self.debs[name].data)
        data[len(data) // 2] ^= 1
        return bytes(data)


HEADERS = f"linux-headers-{RELEASE}"


@pytest.fixture
def shelf(signer: Signer, tmp_path: Path) -> Iterator[Shelf]:
    folder, version = tmp_path / "debs", "6.1.52-1"
    names = ((f"linux-image-{RELEASE}", "amd64"), (HEADERS, "amd64"), ("linux-source-6.1", "all"))
    debs = [
        make_deb(folder, name, version, arch, {"usr/src/readme": name.encode() * 99}) for name, arch in names
    ]
    with serving(Archive()) as archive:
        archive.publish(signer, "debian-security", "20230907T120000Z", "bookworm-security", debs)
        env = {**OFFLINE, "KMEND_MIRROR": archive.url, "KMEND_KEYRING": str(signer.keyring)}
        yield Shelf(archive, {deb.name: deb for deb in debs}, env)


def test_an_unknown_release(shelf: Shelf, tmp_path: Path, out: Path) -> None:
    cache = tmp_path / "cache"
    answer = ask([*build(cache, out, release="6.1.0-12345-amd64"), "--json"], **shelf.env)
    assert answer.status == 3
    (row,) = json.loads(answer.out)["refused"]
    assert row["rule"] == "unknown-release"
    assert "6.1.0-12345-amd64" in row["what"]
    assert shelf.archive.url in row["why"]
    assert files(cache) == set()


def test_a_damaged_package_in_the_cache_is_fetched_again(shelf: Shelf, tmp_path: Path) -> None:
    """Of the right size, so that only its hash tells; the sound one then turns out to hold no kernel."""
    cache = tmp_path / "cache"
    downloads = cache / "downloads" / RELEASE
    downloads.mkdir(parents=True)
    for deb in shelf.debs.values():
        (downloads / deb.file_name).write_bytes(shelf.damage(deb.name))
    answer = ask(fetch(cache), **shelf.env)
    refused(answer, 1, "is not what was expected")
    (used,) = [deb for deb in shelf.debs.values() if f"the package {deb.file_name} is" in answer.err]
    assert shelf.asked(used.name) == 1
    assert files(cache) == set()


def test_a_package_that_arrives_damaged_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    """A part that another one's failure cut short may stay, to be continued; it is not trusted."""
    cache = tmp_path / "cache"
    sound = dict(shelf.archive.files)
    for path in [path for path in shelf.archive.files if path.endswith(".deb")]:
        (deb,) = [deb for deb in shelf.debs.values() if path.endswith(deb.file_name)]
        shelf.archive.files[path] = shelf.damage(deb.name)
    answer = ask([*fetch(cache), "--json"], **shelf.env)
    assert answer.status == 1
    (row,) = json.loads(answer.out)["refused"]
    assert row["rule"] in ("corrupt-package", "download")
    assert "Hash Sum mismatch" in row["why"] or "SHA-256" in row["why"]
    assert row["next_step"]
    assert not list(cache.glob("targets/*/*"))
    shelf.archive.files.update(sound)
    refused(ask(fetch(cache), **shelf.env), 1, "is not what was expected")
    assert files(cache) == set()


@pytest.mark.parametrize("moment", [0.3, 2.0])
def test_a_killed_fetch_is_taken_up_again(shelf: Shelf, tmp_path: Path, moment: float) -> None:
    """Up to the point where the made-up packages are found to hold no kernel: as without a kill."""
    cache = tmp_path / "cache"
    kill_after(fetch(cache), moment, **shelf.env)
    refused(ask(fetch(cache), **shelf.env), 1, "is not what was expected")
    assert files(cache) == set()


def kill_after(command: Sequence[str], seconds: float, **more: str) -> int:
    """Start a command and kill it like ``kill -9``; its status (as Popen counts it)."""
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **more}
    )
    try:
        return child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


# -- disks and folders -------------------------------------------------------------------------------------


def on_a_disk(size: str, place: Path, command: Sequence[str], before: str = "true") -> Answer:
    """Run with a disk of its own at ``place``; what is left on it is listed behind the output."""
    script = (
        f'mount -t tmpfs -o size={size} kmend-test "$1" && cd "$1" && {before} && shift && "$@"; '
        'status=$?; echo "left:" $(find . -type f ! -name "*.lock*" ! -path "./objects/??/*"); exit $status'
    )
    return ask([*alone("-m"), "sh", "-c", script, "sh", place, *command])


def test_a_disk_without_room_for_a_kernel(shelf: Shelf, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    answer = on_a_disk("50m", cache, ["env", *(f"{k}={v}" for k, v in shelf.env.items()), *fetch(cache)])
    refused(answer, 1, "the disk that holds kmend's cache is full")
    assert "GB free, the kernel needs" in answer.err
    assert shelf.asked("linux-source-6.1") == 0, "nothing is downloaded that cannot be used"


@pytest.mark.target
@pytest.mark.usefixtures("target_56")
@pytest.mark.parametrize("size", ["4k", "64k", "300k"])
def test_the_cache_fills_up_while_building(config: Config, tmp_path: Path, out: Path, size: str) -> None:
    """The overlay, the compiler and the assembler meet it."""
    cache = tmp_path / "cache"
    cache.mkdir()
    answer = on_a_disk(size, cache, build(cache, out), before=f"ln -s {config.targets} targets")
    refused(answer, 1, "(disk-full): the disk that holds kmend's cache is full")
    assert "No space left on device" in answer.out
    assert answer.out.rstrip().endswith("left:")
    assert list(out.iterdir()) == []


@pytest.mark.target
@pytest.mark.usefixtures("target_56")
@pytest.mark.parametrize(("size", "which"), [("4k", "kmend_cmdline.ko"), ("8k", "kmend_cmdline.json")])
def test_the_output_fills_up(cache: Path, out: Path, size: str, which: str) -> None:
    """With room for nothing, and with room for the module but not for its report."""
    answer = on_a_disk(size, out, build(cache, out))
    refused(answer, 1, f"{which} cannot be written")
    assert "No space left on device" in answer.out + answer.err
    assert answer.out.rstrip().endswith("left:")


def test_an_output_that_is_no_folder(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "gone", "file/below"):
        refused(ask(build(cache, tmp_path / place)), 2, "is no folder that can be written")
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "gone").exists()


def test_an_output_that_may_not_be_written(cache: Path, out: Path) -> None:
    """A read-only mount: root heeds no modes."""
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && "$@"'
    answer = ask([*alone("-m"), "sh", "-c", script, "sh", out, *build(cache, out)])
    refused(answer, 2, f"{out} is no folder that can be written")


@pytest.mark.target
@pytest.mark.usefixtures("target_56")
def test_a_cache_that_may_not_be_written(cache: Path, out: Path) -> None:
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && "$@"'
    answer = ask([*alone("-m"), "sh", "-c", script, "sh", cache, *build(cache, out)])
    refused(answer, 1, "cannot be written")
    assert "Read-only file system" in answer.out
    assert list(out.iterdir()) == []


# -- modules and objects -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module(config: Config, target_56: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module as `kmend build` makes it."""
    folder = tmp_path_factory.mktemp("module")
    assert ask(build(config.cache, folder, release=target_56.release)).status == 0
    return folder / "kmend_cmdline.ko"


def judged(capsys: pytest.CaptureFixture[str], verb: str, *names: Path) -> tuple[int, str]:
    """Run a verb on files in this process: status and what it said on stderr."""
    status = main([verb, *map(str, names * 2 if verb == "diff" else names), "--quiet"])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert "inside kmend" not in said.err
    return status, said.err


@pytest.mark.parametrize("verb", ["check", "info", "try", "diff"])
def test_a_folder_as_module(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    status, said = judged(capsys, verb, tmp_path)
    assert status == 2
    assert said.startswith(f"kmend: {tmp_path} is a folder")
    assert "why: " in said and "next: " in said


@pytest.mark.target
@pytest.mark.parametrize("verb", ["check", "info", "try", "diff"])
def test_a_truncated_module(
    module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """Cut at forty places, the last of them one byte before the end."""
    data = module.read_bytes()
    cut = tmp_path / "cut.ko"
    for length in [*range(0, len(data), len(data) // 39), len(data) - 1]:
        cut.write_bytes(data[:length])
        status, said = judged(capsys, verb, cut)
        assert status == 2, length
        assert said.startswith(f"kmend: {cut} is no usable ELF file\n  why: ")
        assert "next: name a complete" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cut.ko"]


@pytest.mark.target
@pytest.mark.parametrize("verb", ["check", "info", "diff"])
def test_a_damaged_module_is_no_error_inside_kmend(
    module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """Files with some bytes changed at random: understood or refused, each with words of ours."""
    data = module.read_bytes()
    damaged = tmp_path / "damaged.ko"
    chance = random.Random(7)
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 4, 40))):
            # headers and tables lie at both ends and are the most fragile
            anywhere, behind = chance.randrange(len(data)), -chance.randrange(1, 3000)
            place = chance.choice((anywhere, chance.randrange(64), behind))
            changed[place] = chance.randrange(256)
        damaged.write_bytes(changed)
        status, said = judged(capsys, verb, damaged)
        assert status in (0, 1, 2, 3)
        if status > 1:
            assert said.startswith("kmend: ")


# -- a killed build ------------------------------------------------------------------------------------------


@pytest.mark.target
@pytest.mark.usefixtures("target_56")
def test_a_killed_build_is_no_obstacle(cache: Path, out: Path) -> None:
    """Killed at ten moments all over its time; each time the next run succeeds and cleans up."""
    begun = time.perf_counter()
    assert ask(build(cache, out)).status == 0
    took = time.perf_counter() - begun
    wanted = sorted(path.name for path in out.iterdir())
    for share in range(10):
        status = 0
        while status == 0:
            shutil.rmtree(cache / "objects")
            for path in out.iterdir():
                path.unlink()
            begun = time.perf_counter()
            status = kill_after(build(cache, out), took * (share + 1) / 11)
            took = min(took, time.perf_counter() - begun) if status == 0 else took  # sooner done than killed
        assert status == -signal.SIGKILL
        # complete or absent, also at the moment of the kill
        assert sorted(path.name for path in out.iterdir()) in ([], wanted[1:], wanted)
        answer = ask([*build(cache, out), "--json"])
        assert answer.status == 0
        assert json.loads(answer.out)["result"] == "built"
        assert sorted(path.name for path in out.iterdir()) == wanted
        assert left(cache) == []
        assert files(cache) == set()


STEPS = ("applying the patch", "compiling 1 unit", "comparing", "proving")


@pytest.mark.target
@pytest.mark.usefixtures("target_56")
@pytest.mark.parametrize("step", STEPS)
def test_a_build_killed_in_each_stage(cache: Path, out: Path, step: str) -> None:
    with subprocess.Popen(
        build(cache, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        assert any(step in line for line in child.stderr), "the step is told"
        child.kill()
    assert ask(build(cache, out)).status == 0
    assert left(cache) == []
    assert len(list(out.iterdir())) == 2
