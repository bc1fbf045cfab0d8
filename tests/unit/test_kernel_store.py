"""The cache: targets complete or absent, locks that outlive nobody, parts of a custom target compared."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kmend.cli import main
from kmend.core.config import Config
from kmend.core.errors import Failed, Refused, Unable, UsageError
from kmend.core.progress import Silent
from kmend.core.run import Children
from kmend.core.target import Release, Target
from kmend.kernel import custom, prepare, prepared, store, work
from kmend.kernel import folder as folder_of
from kmend.kernel.work import Work

RELEASE = Release("6.1.0-55-amd64")
BANNER = (
    "Linux version 6.1.0-55-amd64 (debian-kernel@lists.debian.org) "
    "(gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0, GNU ld (GNU Binutils for Debian) 2.40) "
    "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-1 (2026-11-14)"
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tmp_path / "cache", tmp_path / "state", 1, "http://127.0.0.1:9")


def a_target(config: Config, key: str, source_version: str = "6.1.192-1") -> Target:
    """A prepared target of empty files."""
    folder = config.targets / key
    (folder / "source").mkdir(parents=True)
    (folder / "modules").mkdir()
    for name in ("source/.config", "config", "symvers", "vmlinux"):
        (folder / name).touch()
    target = Target(
        release=RELEASE, source_version=source_version, banner=BANNER, build_id="ab", folder=folder,
        source=folder / "source", config=folder / "config", symvers=folder / "symvers",
        vmlinux=folder / "vmlinux", vmlinuz=None, modules=folder / "modules", compiler="gcc-12",
    )  # fmt: skip
    folder_of.write_target(target, origin="test")
    return target


# --- open, list ------------------------------------------------------------------------------------


def test_a_target_is_read_as_it_was_written(config: Config) -> None:
    target = a_target(config, RELEASE)
    assert store.open_target(config, RELEASE) == target
    assert store.list_targets(config) == (target,)
    assert store.fetch(config, RELEASE, Silent()) == target
    assert store.record_of(target)["origin"] == "test"
    assert isinstance(store.record_of(target)["size"], int)


def test_the_cache_may_be_moved(config: Config, tmp_path: Path) -> None:
    a_target(config, RELEASE)
    config.cache.rename(tmp_path / "moved")
    moved = store.open_target(Config(tmp_path / "moved", tmp_path, 1, ""), RELEASE)
    assert moved.vmlinux == tmp_path / "moved" / "targets" / RELEASE / "vmlinux"


def test_opening_takes_milliseconds(config: Config) -> None:
    a_target(config, RELEASE)
    began = time.perf_counter()
    for _ in range(20):
        store.fetch(config, RELEASE, Silent())
    assert (time.perf_counter() - began) / 20 < 0.02


@pytest.mark.parametrize("missing", ["target.json", "vmlinux", "source/.config", "config", "symvers"])
def test_a_target_with_a_part_missing_is_no_target(config: Config, missing: str) -> None:
    target = a_target(config, RELEASE)
    (target.folder / missing).unlink()
    assert store.list_targets(config) == ()
    with pytest.raises(Unable) as caught:
        store.open_target(config, RELEASE)
    assert (caught.value.rule, caught.value.exit_status) == ("unknown-target", 3)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "indexes": 1}'])
def test_a_damaged_record_is_no_target(config: Config, text: str) -> None:
    target = a_target(config, RELEASE)
    (target.folder / "target.json").write_text(text)
    assert store.list_targets(config) == ()


def test_an_unknown_target_names_those_that_are_there(config: Config) -> None:
    a_target(config, RELEASE)
    a_target(config, f"{RELEASE}@custom", "custom")
    with pytest.raises(Unable) as caught:
        store.open_target(config, Release("6.1.0-99-amd64"))
    assert "6.1.0-55-amd64, 6.1.0-55-amd64@custom" in caught.value.why
    for hostile in ("../targets/6.1.0-55-amd64", "", ".", "/etc"):
        with pytest.raises(Unable):
            store.open_target(config, Release(hostile))


def test_a_custom_target_serves_its_release_unless_a_packaged_one_is_there(config: Config) -> None:
    custom = a_target(config, f"{RELEASE}@custom", "custom")
    assert store.open_target(config, RELEASE) == custom
    assert store.fetch(config, RELEASE, Silent()) == custom
    packaged = a_target(config, RELEASE)
    assert store.open_target(config, RELEASE) == packaged
    assert store.fetch(config, RELEASE, Silent()) == packaged
    assert store.open_target(config, Release(f"{RELEASE}@custom")) == custom


def test_indexes_of_an_older_form_are_made_anew(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    target = a_target(config, RELEASE)
    made: list[str] = []
    monkeypatch.setattr(store, "index_image", lambda target, progress: made.append("image"))
    monkeypatch.setattr(store, "index_source", lambda target, progress: made.append("source"))
    monkeypatch.setattr(store, "INDEXES", prepared.INDEXES + 1)
    monkeypatch.setattr(prepared.read, "__kwdefaults__", {"indexes": prepared.INDEXES + 1})
    assert store.list_targets(config) == ()
    assert store.fetch(config, RELEASE, Silent()) == target
    assert made == ["image", "source"]
    assert store.fetch(config, RELEASE, Silent()) == target
    assert made == ["image", "source"]
    assert store.record_of(target)["origin"] == "test"


# --- stages ----------------------------------------------------------------------------------------


def stage(folder: Path, build: Callable[[], dict[str, str]], key: str = "k") -> dict[str, str]:
    return store._stage(Work(), folder, "image", key, ("image",), build)


def test_a_part_is_made_once_per_key(tmp_path: Path) -> None:
    made: list[str] = []

    def build() -> dict[str, str]:
        assert not (tmp_path / "image").exists(), "what an earlier run left must be gone"
        (tmp_path / "image").mkdir()
        made.append("x")
        return {"n": str(len(made))}

    (tmp_path / "image").mkdir()  # left by a killed run
    assert [stage(tmp_path, build), stage(tmp_path, build), stage(tmp_path, build, "other")] == [
        {"n": "1"},
        {"n": "1"},
        {"n": "2"},
    ]


def test_a_part_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build() -> dict[str, str]:
        (tmp_path / "image" / "lib").mkdir(parents=True)
        raise Failed("no")

    with pytest.raises(Failed):
        stage(tmp_path, build)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_done(config: Config) -> None:
    config.targets.mkdir(parents=True)
    folder_of.need_room(config, 1)
    with pytest.raises(Failed) as caught:
        folder_of.need_room(config, 10**18)
    assert (caught.value.rule, caught.value.exit_status) == ("disk-full", 1)


def test_a_tool_that_finds_the_disk_full_is_understood() -> None:
    with pytest.raises(Failed) as caught:
        Work().shell("echo one >&2; echo 'tar: x: No space left on device' >&2; echo three >&2; exit 2")
    assert caught.value.rule == "disk-full"
    assert caught.value.why == "tar: x: No space left on device"
    with pytest.raises(Failed) as caught:
        Work().shell("false | cat")
    assert caught.value.rule == "subprocess"


# --- locks and children ------------------------------------------------------------------------------

HOLD = """
import subprocess, sys, time
from pathlib import Path
from kmend.kernel.work import Work, owned
with owned(Path(sys.argv[1]), on_wait=lambda: None) as lock:
    child = subprocess.Popen(
        ["sleep", "60"], pass_fds=(lock,), start_new_session=True, stdout=subprocess.DEVNULL
    )
    print(child.pid, flush=True)
    time.sleep(float(sys.argv[2]))
    child.kill()
    child.wait()
"""


def hold(lock: Path, seconds: float) -> tuple[subprocess.Popen[str], int]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    return holder, int(holder.stdout.readline())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_that_a_killed_run_left_behind_is_ended(tmp_path: Path) -> None:
    holder, orphan = hold(tmp_path / "lock", 60)
    holder.kill()
    holder.communicate()
    assert alive(orphan)
    waited: list[str] = []
    began = time.monotonic()
    with work.owned(tmp_path / "lock", on_wait=lambda: waited.append("x")):
        assert not alive(orphan)
    assert time.monotonic() - began < 5
    assert waited == [], "a dead run is not waited for"


def test_a_living_run_is_waited_for_and_its_child_left_alone(tmp_path: Path) -> None:
    holder, child = hold(tmp_path / "lock", 1.0)
    seen: list[bool] = []
    with work.owned(tmp_path / "lock", on_wait=lambda: seen.append(alive(child))):
        assert holder.wait(timeout=10) == 0
    holder.communicate()
    assert seen == [True]


def test_stopping_ends_the_children_of_other_threads() -> None:
    children = Children()
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(Work(children=children).run, ["sleep", "60"]) for _ in range(2)]
        time.sleep(0.3)
        children.stop()
        for future in running:
            with pytest.raises(Failed) as caught:
                future.result(timeout=10)
            assert caught.value.rule == "stopped"
    with pytest.raises(Failed):
        Work(children=children).run(["true"])
    assert time.monotonic() - began < 10


def test_a_cache_that_cannot_be_written_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    config = Config(tmp_path / "file", tmp_path, 1, "")
    with pytest.raises(Failed) as caught:
        store.fetch(config, RELEASE, Silent())
    assert caught.value.rule == "unwritable"
    with pytest.raises(Failed):
        store.list_targets(config)


# --- custom targets ------------------------------------------------------------------------------------

CONFIG = (
    "#\n# Linux/x86 6.1.192 Kernel Configuration\n#\n"
    'CONFIG_CC_VERSION_TEXT="gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0"\n'
    "CONFIG_X86_64=y\nCONFIG_LIVEPATCH=y\nCONFIG_SMP=y\nCONFIG_MODVERSIONS=y\n"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tree = tmp_path / "linux"
    tree.mkdir()
    (tree / "Makefile").write_text("VERSION = 6\nPATCHLEVEL = 1\nSUBLEVEL = 192\nEXTRAVERSION =\n")
    (tree / "Kbuild").touch()
    return tree


def contradictions(source: Path, config: str, vmlinux: bytes = b"", banner: str = BANNER) -> list[str]:
    try:
        custom._belong_together(source, config, vmlinux, prepare.parse_banner(banner), None)
    except Refused as refused:
        assert {r.rule for r in refused.refusals} == {"custom-mismatch"}
        return [f"{r.what}: {r.why}" for r in refused.refusals]
    return []


def test_parts_of_one_build_are_accepted(source: Path) -> None:
    assert contradictions(source, CONFIG) == []
    embedded = b"IKCFG_ST" + gzip.compress(CONFIG.encode()) + b"IKCFG_ED"
    assert contradictions(source, CONFIG, embedded) == []
    ubuntu = BANNER.replace("6.1.0-55-amd64", "6.1.0-31-generic").replace("Debian 6.1.192-1", "Ubuntu")
    assert contradictions(source, CONFIG, banner=ubuntu) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("6.1.192", "6.1.190", "made for 6.1.190"),
        ("CONFIG_SMP=y\n", "", "CONFIG_SMP"),
        ("CONFIG_LIVEPATCH=y\n", "", "live-patched"),
        ("CONFIG_X86_64=y\n", "", "amd64"),
        ("12.2.0-14+deb12u1) 12.2.0", "13.1.0-1) 13.1.0", "compilers"),
        ("CONFIG_SMP=y\n", 'CONFIG_SMP=y\nCONFIG_BUILD_SALT="6.1.0-56-amd64"\n', "6.1.0-56-amd64"),
        ("CONFIG_SMP=y\n", "CONFIG_SMP=y\nCONFIG_PREEMPT_RT=y\n", "CONFIG_PREEMPT_RT"),
    ],
)
def test_a_configuration_of_another_build_is_refused(source: Path, old: str, new: str, said: str) -> None:
    (found,) = contradictions(source, CONFIG.replace(old, new))
    assert said in found


def test_a_source_of_another_version_is_refused(source: Path) -> None:
    makefile = source / "Makefile"
    makefile.write_text(makefile.read_text().replace("192", "190"))
    assert any("is not that of the vmlinux" in text for text in contradictions(source, CONFIG))


def test_a_vmlinux_with_another_configuration_inside_is_refused(source: Path) -> None:
    embedded = (
        b"IKCFG_ST" + gzip.compress(CONFIG.replace("SMP=y", "SMP=y\nCONFIG_Z=y").encode()) + b"IKCFG_ED"
    )
    (found,) = contradictions(source, CONFIG, embedded)
    assert "CONFIG_Z: y -> not set" in found


def test_all_contradictions_are_told_at_once(source: Path) -> None:
    assert len(contradictions(source, "CONFIG_SMP=y\n")) == 2


def test_wrong_paths_are_wrong_usage(config: Config, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for paths in (
        {"source": file, "config_file": file, "vmlinux": file},
        {"source": tmp_path, "config_file": file, "vmlinux": file},
        {"source": source, "config_file": tmp_path, "vmlinux": file},
        {"source": source, "config_file": file, "vmlinux": tmp_path / "absent"},
        {"source": source, "config_file": file, "vmlinux": file, "modules": source},
        {"source": source, "config_file": file, "vmlinux": file, "symvers": source},
    ):
        with pytest.raises(UsageError) as caught:
            store.custom(config, **paths, progress=Silent())
        assert caught.value.rule == "custom-paths"
    assert not config.cache.exists()


# --- the verb --------------------------------------------------------------------------------------------


def test_list_and_show_as_a_user_sees_them(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["--cache", str(config.cache)]
    assert main(["kernel", "list", *cache]) == 0
    assert "no kernel is prepared" in capsys.readouterr().out
    a_target(config, RELEASE)
    assert main(["kernel", "list", *cache]) == 0
    assert "6.1.0-55-amd64  6.1.192-1  ab" in capsys.readouterr().out
    assert main(["kernel", "show", RELEASE, "--json", *cache]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["target"]["build_id"] == "ab"
    assert document["target"]["version"] == "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-1 (2026-11-14)"
    assert document["target"]["size"] > 0
    assert main(["kernel", "show", RELEASE, *cache]) == 0
    assert BANNER in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["show", "6.1.0-99-amd64"], 3),
        (["fetch", "foo"], 3),
        (["fetch", "--source", "/nowhere"], 2),
        (["fetch", "--source", "/nowhere", "--config", "/nowhere", "--vmlinux", "/nowhere"], 2),
        (["forget"], 2),
        ([], 2),
    ],
)
def test_wrong_requests(
    config: Config, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int
) -> None:
    assert main(["kernel", *arguments, "--cache", str(config.cache)]) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("kmend: ")
    assert "Traceback" not in said.err
    assert not config.cache.exists()
