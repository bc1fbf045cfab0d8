"""Modules written by hand: built as `kmend module` does, loaded in a guest, seen at work, taken back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patching import load, said, unload

from kmend.core.config import Config
from kmend.core.errors import KmendError
from kmend.core.progress import Silent
from kmend.core.report import BuildReport, Outcome
from kmend.core.run import run
from kmend.core.target import Target
from kmend.handmade import ModuleRequest, build_module
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel

pytestmark = [pytest.mark.lab, pytest.mark.target]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAMPLES = "samples/livepatch"
SELFTESTS = "tools/testing/selftests/livepatch"
KINDS = ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch")

Hand = Callable[[Path], Path]


@pytest.fixture(scope="module")
def hand(target_55: Target, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Hand:
    """Builds what lies at a path; each only once."""
    folder = tmp_path_factory.mktemp("by-hand")
    made: dict[Path, Path] = {}

    def build(path: Path) -> Path:
        if path not in made:
            report = build_module(ModuleRequest(path, target_55.release, folder), config, Silent())
            assert report.result is Outcome.BUILT, report.refused
            made[path] = Path(report.module or "")
        return made[path]

    return build


@pytest.fixture(scope="module")
def guest(kernel_55: LabKernel, config: Config) -> Iterator[Guest]:
    with Guest.of(kernel_55, config.lab) as running:
        yield running


def folder(base: Path, name: str, code: str, toml: str = "") -> Path:
    place = base / name
    place.mkdir()
    (place / f"{name}.c").write_text(code)
    if toml:
        (place / "kmend.toml").write_text(toml)
    return place


#: Looks through the kernel's own table of shadow variables, which is static in kernel/livepatch/shadow.c, and
#: refuses to be loaded: its pre-patch callback fails with ENOMEM.
LEFT_OVER = """
#include <linux/hashtable.h>
#include <linux/livepatch.h>
#include "kmend.h"

struct klp_shadow {
	struct hlist_node node;
	struct rcu_head rcu_head;
	void *obj;
	unsigned long id;
	char data[];
};

extern struct hlist_head klp_shadow_hash[1 << 12];

static int look(struct klp_object *obj)
{
	struct klp_shadow *shadow;
	int bucket, number = 0;

	hash_for_each(klp_shadow_hash, bucket, shadow, node)
		number++;
	pr_info("shadow variables: %d\\n", number);
	return -ENOMEM;
}
KMEND_PRE_PATCH(look);
"""


def test_vfs_read_counts_while_tasks_sleep_in_it(hand: Hand, guest: Guest, tmp_path: Path) -> None:
    """The classical example: counts right, none leaked after the last close and the unload."""
    look = hand(folder(tmp_path, "left_over", LEFT_OVER))

    def shadows() -> int:
        """The kernel's own count; the loading is refused with the callback's errno and leaves nothing."""
        done = load(guest, look)
        assert done.status != 0
        assert "Cannot allocate memory" in done.errors
        assert guest.run("ls -d /sys/kernel/livepatch/left_over /sys/module/left_over").text == ""
        return int([line for line in said(guest) if line.startswith("shadow variables: ")][-1].split()[-1])

    assert shadows() == 0
    sleepers = guest.run(
        "mkfifo fifo; sleep 600 3<>fifo & exec 3<>fifo\n"
        "for i in 1 2 3 4 5; do dd bs=2 count=1 <fifo >got$i 2>/dev/null 3<&- & done; usleep 300000\n"
        "grep -lw vfs_read /proc/[0-9]*/stack | wc -l",
        check=True,
    )
    assert int(sleepers.text) >= 5
    module = hand(EXAMPLES / "vfs-read-count")
    assert load(guest, module).status == 0
    of = "/sys/module/vfs_read_count/parameters"
    counted = guest.run(
        "head -c 64 /dev/zero >data; exec 5<data; exec 6<data\n"
        "for i in 1 2 3 4; do dd bs=1 count=1 <&5 of=/dev/null 2>/dev/null; done\n"
        f"dd bs=1 count=2 <&6 of=/dev/null 2>/dev/null; cat {of}/reads; cat {of}/counters >open\n"
        f"exec 5<&-; exec 6<&-; cat {of}/reads; cat {of}/counters >closed; cat open closed"
    ).text.split("\n")
    assert counted[:2] == ["5 4", "6 2"]
    opened, closed = (int(text) for text in counted[2:])
    assert opened - closed == 2
    assert closed >= 1  # the agent's own channel is read all the time
    # those that slept in the old function while the patch came: each gets its two bytes
    woken = guest.run("printf 1122334455 >fifo; usleep 300000; cat got1 got2 got3 got4 got5 | wc -c")
    assert woken.text == "10"
    assert shadows() >= closed
    assert unload(guest, "vfs_read_count").status == 0
    assert "vfs_read_count: 0 counters left" in said(guest)
    assert shadows() == 0


#: ext4_inode_cachep is static in ext4, nr_processes() and saved_command_line are not exported by vmlinux.
UNEXPORTED = """
#include <linux/fs.h>
#include <linux/init.h>
#include <linux/sched/stat.h>
#include <linux/slab.h>

extern struct kmem_cache *ext4_inode_cachep;
extern int nr_processes(void);

int livepatch_ext4_sync_fs(struct super_block *sb, int wait)
{
	pr_info("by hand: %u bytes, %s, %s\\n", kmem_cache_size(ext4_inode_cachep),
		nr_processes() > 1 ? "processes" : "none", strstr(saved_command_line, "console") ? "line" : "none");
	return 0;
}
"""


def test_what_is_not_exported_is_reached_also_in_a_module_that_comes_later(
    hand: Hand, guest: Guest, tmp_path: Path
) -> None:
    toml = '[[object]]\nname = "ext4"\n[[object.func]]\nold_name = "ext4_sync_fs"\n'
    assert guest.run("grep -c ext4 /proc/modules").text == "0"
    assert load(guest, hand(folder(tmp_path, "unexported", UNEXPORTED, toml))).status == 0
    mount = """
modprobe ext4 && size=$(awk '$1 == "ext4_inode_cache" { print $4 }' /proc/slabinfo)
[ -f image ] || { truncate -s 8M image && /usr/sbin/mkfs.ext4 -q image; }
mkdir -p at && mount -o loop -t ext4 image at && sync && umount at && rmmod ext4 && echo $size
"""
    start = len(guest.dmesg())
    size = guest.run(mount, check=True).text
    assert any(line.startswith("by hand: ") and "processes, line" in line for line in said(guest, start))
    words = next(line for line in said(guest, start) if line.startswith("by hand: ")).split()
    # object_size, which is what kmem_cache_size() returns, is at most the distance of two objects
    assert 500 < int(words[2]) <= int(size)
    start = len(guest.dmesg())
    guest.run(mount, check=True)  # once more: the module went and came while the patch stayed
    assert any(line.startswith("by hand: ") for line in said(guest, start))
    assert unload(guest, "unexported").status == 0
    start = len(guest.dmesg())
    guest.run(mount, check=True)
    assert not any(line.startswith("by hand: ") for line in said(guest, start))


def test_the_kernels_samples(hand: Hand, guest: Guest, target_55: Target) -> None:
    """samples/livepatch: a file with its own module_init each, and the ordinary modules that they patch."""

    def sample(name: str) -> Path:
        return hand(target_55.source / SAMPLES / f"{name}.c")

    stock = guest.run("cat /proc/cmdline").text
    assert load(guest, sample("livepatch-sample")).status == 0
    assert guest.run("cat /proc/cmdline").text == "this has been live patched"
    assert unload(guest, "livepatch_sample").status == 0
    assert guest.run("cat /proc/cmdline").text == stock

    start = len(guest.dmesg())
    for name in ("livepatch-shadow-mod", "livepatch-shadow-fix1", "livepatch-shadow-fix2"):
        assert load(guest, sample(name)).status == 0
    objects = guest.run("cat /sys/kernel/livepatch/livepatch_shadow_fix*/livepatch_shadow_mod/patched").text
    assert objects == "1\n1"
    assert unload(guest, "livepatch_shadow_fix2").status == 0
    assert unload(guest, "livepatch_shadow_fix1").status == 0
    assert guest.run("rmmod livepatch_shadow_mod").status == 0
    assert "'livepatch_shadow_fix1': unpatching complete" in "\n".join(said(guest, start))

    start = len(guest.dmesg())
    for name in ("livepatch-callbacks-mod", "livepatch-callbacks-demo"):
        assert load(guest, sample(name)).status == 0
    assert unload(guest, "livepatch_callbacks_demo").status == 0
    assert guest.run("rmmod livepatch_callbacks_mod").status == 0
    calls = [line for line in said(guest, start) if "callback: livepatch_callbacks_mod" in line]
    kinds = [line.split(": ")[1] for line in calls]
    assert kinds == [
        f"{kind}_callback" for kind in ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch")
    ]


#: The scripts that take about half of the time each; test-syscall came with 6.12.
HALVES = (
    ("test-callbacks", "test-syscall"),
    ("test-livepatch", "test-shadow-vars", "test-state", "test-ftrace", "test-sysfs"),
)


@pytest.mark.parametrize("line", ["target_55", "target_612"])
def test_the_kernels_selftests_pass(
    request: pytest.FixtureRequest, line: str, config: Config, tmp_path: Path
) -> None:
    """tools/testing/selftests/livepatch with its modules (up to 6.8: lib/livepatch), in two guests."""
    target: Target = request.getfixturevalue(line)
    scripts = target.source / SELFTESTS
    sources = sorted((scripts / "test_modules").glob("*.c"))
    if not sources:
        sources = sorted((target.source / "lib/livepatch").glob("*.c"))
    assert len(sources) >= 10
    for source in sources:
        report = build_module(ModuleRequest(source, target.release, tmp_path), config, Silent())
        assert report.result is Outcome.BUILT, report.refused
    files = {f"selftests/{f.name}": f.read_bytes() for f in scripts.iterdir() if f.is_file()}
    place = f"/usr/lib/modules/{target.release}"
    for module in tmp_path.glob("*.ko"):
        files[f"selftests/test_modules/{module.name}"] = files[f"{place}/{module.name}"] = module.read_bytes()
    if "selftests/test_klp-call_getpid.c" in files:
        run(["gcc", "-o", tmp_path / "getpid", scripts / "test_klp-call_getpid.c"])
        files["selftests/test_klp-call_getpid"] = (tmp_path / "getpid").read_bytes()
    results: dict[str, str] = {}
    errors: list[KmendError] = []

    def run_half(half: tuple[str, ...]) -> None:
        try:
            with Guest.of(LabKernel.of(target), config.lab) as own:
                # the folder "build" tells newer scripts that modules could be compiled here
                own.run(f"mount -t tmpfs tmpfs {place} && mkdir {place}/build", check=True)
                for name, data in files.items():
                    own.put(name if name.startswith("/") else f"/root/{name}", data, 0o755)
                own.run("/usr/sbin/depmod", check=True)
                for script in half:
                    if f"selftests/{script}.sh" in files:
                        done = own.run(f"cd selftests && /usr/bin/bash ./{script}.sh", timeout=240)
                        results[script] = f"{done.status}\n{done.text}\n{done.errors}"
        except KmendError as error:
            errors.append(error)

    threads = [threading.Thread(target=run_half, args=(half,)) for half in HALVES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(results) == {f.stem for f in scripts.glob("test-*.sh")}
    for script, text in results.items():
        status, _, output = text.partition("\n")
        tests = [row for row in output.splitlines() if row.startswith("TEST:")]
        assert status == "0", f"{script}: {output}"
        assert tests, script
        assert all(row.rstrip().endswith("ok") for row in tests), output


def refused(target: Target, config: Config, path: Path, out: Path) -> BuildReport:
    report = build_module(ModuleRequest(path, target.release, out), config, Silent())
    assert report.result is Outcome.REFUSED
    assert list(out.glob("*.ko")) == []
    return report


def test_what_cannot_be_resolved_is_refused_by_name(
    target_55: Target, config: Config, tmp_path: Path
) -> None:
    code = """
extern void no_such_function(void);
extern int seq_show(void *, void *);
int livepatch_vfs_read(void);
int livepatch_vfs_read(void) { no_such_function(); return seq_show(0, 0); }
"""
    toml = '[[object]]\n[[object.func]]\nold_name = "vfs_read"\n'
    out = tmp_path / "out"
    out.mkdir()
    report = refused(target_55, config, folder(tmp_path, "lost", code, toml), out)
    assert {(row.rule, row.what) for row in report.refused} == {
        ("symbol-missing", "no_such_function"),
        ("ambiguous-symbol", "seq_show"),
    }
    assert "[symbols] seq_show" in next(r for r in report.refused if r.what == "seq_show").next_step
    code = "int livepatch_vfs_read(void);\nint livepatch_vfs_read(void) { return 0; }\n"
    toml = '[[object]]\n[[object.func]]\nold_name = "no_such_function"\nnew_func = "livepatch_vfs_read"\n'
    report = refused(target_55, config, folder(tmp_path, "absent", code, toml), out)
    assert [(row.rule, row.what) for row in report.refused] == [("old-function", "no_such_function")]
    toml = '[[object]]\n[[object.func]]\nold_name = "vfs_read"\nnew_func = "misspelt"\n'
    report = refused(target_55, config, folder(tmp_path, "misspelt_", code, toml), out)
    assert [(row.rule, row.what) for row in report.refused] == [("new-func-missing", "misspelt")]
    toml = '[[object]]\nname = "no_such_module"\n[[object.func]]\nold_name = "vfs_read"\n'
    report = refused(target_55, config, folder(tmp_path, "nowhere", code, toml), out)
    assert [(row.rule, row.what) for row in report.refused] == [("unknown-module", "no_such_module")]
