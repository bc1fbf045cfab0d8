"""Every kind of code that a patch may bring, run in a guest: it must do what the source says.

One module for two units of vmlinux, one unit whose function shares its name with others, two units of ext4
and one of zsmalloc; one guest, whose tests follow each other.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kmend.core.config import Config
from kmend.core.kmsg import ReportKind, reports
from kmend.core.progress import Silent
from kmend.core.report import BuildReport, Outcome
from kmend.core.target import Target
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel
from kmend.pipeline import BuildRequest, build

pytestmark = [pytest.mark.lab, pytest.mark.target]

#: static local, per-CPU variable of vmlinux, static call, dynamic debug, WARN, exception table, static key,
#: CPU feature, a function that is not exported
PROBE = r"""
DECLARE_STATIC_KEY_FALSE(sched_schedstats);

static noinline void kinds_probe(const char __user *name, int len)
{
	static unsigned int calls;
	unsigned long total = 0;
	int cpu, fault = 0;
	char first = 0;

	calls++;
	for_each_possible_cpu(cpu)
		total += per_cpu(process_counts, cpu);
	this_cpu_inc(process_counts);
	this_cpu_dec(process_counts);
	cond_resched();
	pr_debug("kinds: debug %u\n", calls);
	WARN_ON(len == 7);
	if (user_access_begin(name, 1)) {
		unsafe_get_user(first, name, bad);
		user_access_end();
	}
	goto out;
bad:
	user_access_end();
	fault = 1;
out:
	pr_info("kinds: call %u key %d cpu %d count %d fault %d first %c\n", calls,
		static_branch_unlikely(&sched_schedstats) ? 1 : 0,
		static_cpu_has(X86_FEATURE_FPU) ? 1 : 0,
		total == nr_processes(), fault, first ? first : '-');
}

SYSCALL_DEFINE2(sethostname, char __user *, name, int, len)
{
	int errno;
	char tmp[__NEW_UTS_LEN];

	kinds_probe(name, len);
"""
HEAD = PROBE[PROBE.index("SYSCALL_DEFINE2") : PROBE.index("\n\tkinds_probe(name")]
PPID = "\trcu_read_lock();\n\tpid = task_tgid_vnr(rcu_dereference(current->real_parent));"
SIGNAL = "\tresult = TRACE_SIGNAL_IGNORED;\n\tif (!prepare_signal(sig, t, force))"
SYNC = "int ext4_sync_file(struct file *file, loff_t start, loff_t end, int datasync)\n{"
STOP = "int __ext4_journal_stop("
ENTER = "\ttrace_ext4_sync_file_enter(file, datasync);"
HELPER = "noinline int ext4_kinds_helper(int x)\n{\n\treturn x + 41;\n}\n\n"
CHANGES: dict[str, list[tuple[str, str]]] = {
    "kernel/sys.c": [(HEAD, PROBE.lstrip("\n")), (PPID, '\tpr_info_once("kinds: getppid\\n");\n' + PPID)],
    "mm/vmalloc.c": [('seq_printf(m, "0x%pK-0x%pK %7ld",', 'seq_printf(m, "kinds 0x%pK-0x%pK %7ld",')],
    "kernel/signal.c": [(SIGNAL, "\tatomic_inc(&kinds_sent);\n" + SIGNAL)],
    "fs/ext4/fsync.c": [
        (SYNC, "extern int ext4_kinds_helper(int x);\n\n" + SYNC),
        (
            ENTER,
            ENTER
            + "\n\tif (datasync)\n\t\tschedule_timeout_uninterruptible(8 * HZ);"
            + '\n\tpr_info("kinds: ext4 %d\\n", ext4_kinds_helper(datasync));',
        ),
    ],
    "fs/ext4/ext4_jbd2.c": [
        (STOP, "int ext4_kinds_helper(int x);\n" + HELPER + STOP),
        ("\n\terr = handle->h_err;", '\n\tpr_info_once("kinds: journal stop\\n");\n\terr = handle->h_err;'),
    ],
    "mm/zsmalloc.c": [
        (
            "\tarea = this_cpu_ptr(&zs_map_area);\n\tarea->vm_mm = mm;",
            '\tpr_info_once("kinds: map\\n");\n\tarea = this_cpu_ptr(&zs_map_area);\n\tarea->vm_mm = mm;',
        )
    ],
}
SENT = "static int __send_signal_locked("


def patch_text(target: Target) -> bytes:
    out = []
    for path, changes in CHANGES.items():
        old = (target.source / path).read_text()
        new = old
        if path == "kernel/signal.c":
            new = new.replace(SENT, "static atomic_t kinds_sent;\n\n" + SENT, 1)
        for before, after in changes:
            assert new.count(before) == 1, (path, before)
            new = new.replace(before, after)
        lines = difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{path}", f"b/{path}"
        )
        out.append("".join(lines))
    return "".join(out).encode()


@pytest.fixture(scope="module")
def built(target_55: Target, config: Config, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    folder = tmp_path_factory.mktemp("kinds")
    request = BuildRequest((("kinds.patch", patch_text(target_55)),), target_55.release, folder)
    report = build(request, config, Silent())
    assert report.result is Outcome.BUILT, report.refused
    return report


@pytest.fixture(scope="module")
def guest(kernel_55: LabKernel, config: Config, built: BuildReport) -> Iterator[Guest]:
    """A guest with the module loaded and the transition over; ext4 and zsmalloc come later."""
    with Guest.of(kernel_55, config.lab) as running:
        running.put("/root/kinds.ko", Path(built.module or "").read_bytes())
        running.run("insmod /root/kinds.ko", check=True)
        eventually(lambda: running.run("cat /sys/kernel/livepatch/kmend_kinds/transition").text == "0")
        yield running


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def said(guest: Guest) -> list[str]:
    return [m.text for m in guest.dmesg() if "kinds: " in m.text]


def last(guest: Guest, command: str) -> str:
    """The probe's last words after a command."""
    guest.run(command, check=True)
    return [line for line in said(guest) if "kinds: call" in line][-1].partition("call ")[2]


def test_what_was_built(built: BuildReport) -> None:
    rows = {o.name: {f.name: (f.status, f.sympos) for f in o.functions} for o in built.objects}
    assert set(rows) == {"vmlinux", "ext4", "zsmalloc"}
    assert set(rows["vmlinux"]) == {
        *("__send_signal_locked", "__do_sys_getppid", "__x64_sys_sethostname", "__ia32_sys_sethostname"),
        *("kinds_probe", "s_show"),
    }
    assert rows["vmlinux"]["s_show"][1] > 1  # kernel/kallsyms.c and others have one as well
    assert rows["ext4"]["ext4_kinds_helper"][0] == "new"
    assert {w.rule for w in built.warnings} == {"tracepoint-silent"}


def test_state_keys_features_and_per_cpu_variables(guest: Guest) -> None:
    first = last(guest, "hostname a")
    assert first == "1 key 0 cpu 1 count 1 fault 0 first a"
    guest.run("echo 1 > /proc/sys/kernel/sched_schedstats", check=True)
    assert last(guest, "hostname b") == "2 key 1 cpu 1 count 1 fault 0 first b"
    guest.run("echo 0 > /proc/sys/kernel/sched_schedstats", check=True)
    assert last(guest, "hostname c") == "3 key 0 cpu 1 count 1 fault 0 first c"
    assert guest.run("hostname").text == "c"


def test_a_fault_finds_its_fixup(guest: Guest) -> None:
    before = guest.run("hostname").text
    words = last(guest, "python3 -c 'import ctypes; ctypes.CDLL(None).syscall(170, 16, 5)'")
    assert words.endswith("fault 1 first -")
    assert guest.run("hostname").text == before


def test_a_system_call_without_arguments(guest: Guest) -> None:
    guest.run("python3 -c 'import os; assert os.getppid() > 1'", check=True)
    assert any("kinds: getppid" in line for line in said(guest))


def test_a_warning_names_the_new_line(guest: Guest) -> None:
    guest.run("hostname sevench", check=True)
    found = [r for r in reports(guest.dmesg()) if r.kind is ReportKind.WARNING]
    assert len(found) == 1
    assert "at kernel/sys.c:" in found[0].headline
    assert "kinds_probe+" in found[0].headline


def test_dynamic_debug_is_the_modules_own(guest: Guest) -> None:
    assert not any("kinds: debug" in line for line in said(guest))
    guest.run("echo 'module kmend_kinds +p' > /proc/dynamic_debug/control; hostname d", check=True)
    assert any("kinds: debug" in line for line in said(guest))


def test_a_name_that_several_functions_have(guest: Guest) -> None:
    assert guest.run("head -1 /proc/vmallocinfo").text.startswith("kinds 0x")
    assert "kinds" not in guest.run("head -3 /proc/kallsyms").text


def test_a_tracepoint_of_the_kernel_stays_alive(guest: Guest) -> None:
    guest.run("[ -e /sys/kernel/tracing/trace ] || mount -t tracefs t /sys/kernel/tracing")
    event = "/sys/kernel/tracing/events/signal/signal_generate/enable"
    seen = guest.run(
        f"echo 1 > {event}; sleep 100 & kill $!; wait; echo 0 > {event}; cat /sys/kernel/tracing/trace"
    )
    assert "signal_generate: sig=15" in seen.text


def test_two_files_of_one_module_and_what_it_takes_from_another(guest: Guest) -> None:
    """``jbd2_journal_stop()`` is jbd2's: its relocation has to be applied when ext4 arrives."""
    guest.run("modprobe loop; modprobe ext4", check=True)
    assert guest.run("cat /sys/kernel/livepatch/kmend_kinds/ext4/patched").text == "1"
    guest.run(
        "dd if=/dev/zero of=/root/img bs=1M count=32; mkfs.ext4 -q /root/img; mkdir -p /root/m;"
        " mount -o loop /root/img /root/m && echo hi > /root/m/f && sync /root/m/f && umount /root/m",
        check=True,
    )
    assert {"kinds: ext4 41", "kinds: journal stop"} <= {line[line.index("kinds") :] for line in said(guest)}


def test_a_per_cpu_variable_of_a_module(guest: Guest) -> None:
    done = guest.run(
        "modprobe zram && echo 16M > /sys/block/zram0/disksize && head -c 999424 /bin/busybox > /root/d"
        " && dd if=/root/d of=/dev/zram0 bs=4096 && sync && echo 3 > /proc/sys/vm/drop_caches"
        " && dd if=/dev/zram0 bs=4096 count=244 | cmp - /root/d",
        check=True,
    )
    assert done.status == 0
    assert any("kinds: map" in line for line in said(guest))


def test_it_can_be_taken_back_and_the_log_is_clean(guest: Guest) -> None:
    guest.run("echo 0 > /sys/kernel/livepatch/kmend_kinds/enabled", check=True)
    eventually(lambda: guest.run("[ -e /sys/kernel/livepatch/kmend_kinds ]").status != 0)
    guest.run("rmmod kmend_kinds", check=True)
    assert not guest.run("head -1 /proc/vmallocinfo").text.startswith("kinds")
    before = len(said(guest))
    guest.run("hostname e", check=True)
    assert len(said(guest)) == before
    log = guest.dmesg()
    assert [r.headline for r in reports(log) if "kinds_probe" not in r.headline] == []
    bad = ("x86/modules: ", "refusing to load", "jump_label:", "Failed to fixup", "static_call:")
    assert not [m.text for m in log if any(word in m.text for word in bad)]


def test_a_task_asleep_in_replaced_code_survives_a_forced_end(
    kernel_55: LabKernel, config: Config, built: BuildReport
) -> None:
    """It wakes up in the middle of ``ext4_sync_file()`` and goes on to call what only relocations reach."""
    with Guest.of(kernel_55, config.lab) as guest:
        guest.put("/root/kinds.ko", Path(built.module or "").read_bytes())
        guest.run("insmod /root/kinds.ko; modprobe loop; modprobe ext4", check=True)
        state = "/sys/kernel/livepatch/kmend_kinds"
        eventually(lambda: guest.run(f"cat {state}/transition").text == "0")
        guest.run(
            "dd if=/dev/zero of=/root/img bs=1M count=32; mkfs.ext4 -q /root/img; mkdir -p /root/m;"
            " mount -o loop /root/img /root/m; echo hi > /root/m/f",
            check=True,
        )
        guest.run("(sync -d /root/m/f; echo $? > /root/done) >/dev/null 2>&1 &", check=True)
        time.sleep(1)
        guest.run(f"echo 0 > {state}/enabled && sleep 1 && echo 1 > {state}/force", check=True)
        eventually(lambda: guest.run(f"[ -e {state} ]").status != 0)
        assert guest.run("[ -e /root/done ]").status != 0, "the task has to be asleep until here"
        eventually(lambda: guest.run("cat /root/done").text == "0")
        assert reports(guest.dmesg()) == ()
        assert "kinds: ext4 42" in {line[line.index("kinds") :] for line in said(guest)}
