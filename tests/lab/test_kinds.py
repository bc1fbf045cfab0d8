"""Every kind of code that a patch may bring, run in a guest of both lines: it must do what the source says.

One module for each line: two units of vmlinux and a header, three units of ext4, one of dummy; one guest for
each, whose tests follow each other. Where to find the example of each kind:

===============================  ==============================================  ===========================
a patch that                     6.1                                             6.12
===============================  ==============================================  ===========================
changes a system call's body     here, ``sethostname``, ``getppid``              here
has a new static local           here, ``calls``                                 here
uses a once-macro                here, ``getppid``                               here (``.data..once``)
uses a static key of vmlinux     here, ``sched_schedstats``                      here
has a static key of its own      here, ``kinds_key``                             here
uses a static key of a module    refused: test_refused_keys.py                   the same code
uses a static call               here, ``cond_resched``, ``kinds_call``          here
uses a tracepoint                here, ``signal_generate``                       here (jump label as NOP)
warns (BUG table)                here                                            here
faults (exception table)         here                                            here (runtime constants)
has alternatives                 here, ``static_cpu_has``                        here
uses per-CPU variables           here: vmlinux's, ext4's, its own                here
has a ``.cold`` part             here                                            – (GCC makes none there)
has IBT, padding, call sites     –                                               here
uses an export of a namespace    here, ``dma_buf_get``                           here
must not be probed               here, ``kinds_note``, ``kinds_triple``          here
calls a new function of another  here, ``ext4_kinds_helper``                     here
unit
shares a new global between      here, ``kinds_note``, ``kinds_total``           here
vmlinux and a module
patches a module that comes      here, ext4 and dummy                            here
later; two modules
changes a header's inline        here, ``proc_fd``                               here
allocates shadow variables       test_callbacks.py, test_module_verb.py          the same code
has four callbacks               here, test_callbacks.py                         here
has a failing callback           test_callbacks.py                               the same code
patches one of several functions here, ``seq_show``                              here
of a name
adds a field to a structure      refused: tests/kernel/test_build.py             the same code
changes init code, a table       refused: tests/kernel/test_build.py             the same code
===============================  ==============================================  ===========================
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
from kmend.elf.model import ElfFile
from kmend.elf.reader import read
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel
from kmend.pipeline import BuildRequest, build

pytestmark = [pytest.mark.lab, pytest.mark.target]

#: static local, per-CPU variables of vmlinux and new, static calls, dynamic debug, WARN, exception table,
#: static keys, CPU features, a cold part, a function that is not exported, callbacks, globals for ext4
PROBE = r"""
#include <linux/kprobes.h>
#include "kmend.h"

DECLARE_STATIC_KEY_FALSE(sched_schedstats);
struct dma_buf *dma_buf_get(int fd);

int kinds_total;
int kinds_note(int number);
noinline int kinds_note(int number)
{
	return kinds_total += number;
}
EXPORT_SYMBOL_GPL(kinds_note);
NOKPROBE_SYMBOL(kinds_note);

static int kinds_double(int number)
{
	return number * 2;
}

static int __kprobes kinds_triple(int number)
{
	return number * 3;
}

DEFINE_STATIC_CALL(kinds_call, kinds_double);
static DEFINE_STATIC_KEY_FALSE(kinds_key);
DEFINE_PER_CPU(int, kinds_seen);
static int kinds_constant __ro_after_init = 42;

static int kinds_before(struct klp_object *obj)
{
	pr_info("kinds: pre-patch\n");
	return 0;
}
KMEND_PRE_PATCH(kinds_before);

static void kinds_after(struct klp_object *obj)
{
	pr_info("kinds: post-patch\n");
	pr_info("kinds: buffer %ld\n", PTR_ERR(dma_buf_get(-1)));
}
KMEND_POST_PATCH(kinds_after);

static void kinds_before_leaving(struct klp_object *obj)
{
	pr_info("kinds: pre-unpatch\n");
}
KMEND_PRE_UNPATCH(kinds_before_leaving);

static void kinds_after_leaving(struct klp_object *obj)
{
	pr_info("kinds: post-unpatch\n");
}
KMEND_POST_UNPATCH(kinds_after_leaving);

static noinline void kinds_probe(const char __user *name, int len)
{
	static unsigned int calls;
	unsigned long total = 0;
	int cpu, fault = 0, seen = 0;
	char first = 0;

	calls++;
	kinds_note(1);
	this_cpu_inc(kinds_seen);
	for_each_possible_cpu(cpu) {
		total += per_cpu(process_counts, cpu);
		seen += per_cpu(kinds_seen, cpu);
	}
	this_cpu_inc(process_counts);
	this_cpu_dec(process_counts);
	cond_resched();
	pr_debug("kinds: debug %u\n", calls);
	WARN_ON(len == 7);
	if (len == 9) {
		static_branch_enable(&kinds_key);
		static_call_update(kinds_call, kinds_triple);
	}
	if (unlikely(len > 60))
		pr_warn("kinds: cold %d\n", len);
	if (user_access_begin(name, 1)) {
		unsafe_get_user(first, name, bad);
		user_access_end();
	}
	goto out;
bad:
	user_access_end();
	fault = 1;
out:
	pr_info("kinds: features %d %d constant %d seen %d\n", static_cpu_has(X86_FEATURE_SMAP) ? 1 : 0,
		static_cpu_has(X86_FEATURE_XENPV) ? 1 : 0, kinds_constant, seen == calls);
	pr_info("kinds: call %u key %d own %d %d count %d fault %d first %c\n", calls,
		static_branch_unlikely(&sched_schedstats) ? 1 : 0,
		static_branch_unlikely(&kinds_key) ? 1 : 0, static_call(kinds_call)(5),
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
SENT = "static int __send_signal_locked("
SYNC = "int ext4_sync_file(struct file *file, loff_t start, loff_t end, int datasync)\n{"
STOP = "int __ext4_journal_stop("
ENTER = "\ttrace_ext4_sync_file_enter(file, datasync);"
FREED = "\tthis_cpu_inc(discard_pa_seq);\n\te4b->bd_info->bb_free += count;"
DUMMY = "static int dummy_dev_init(struct net_device *dev)\n{\n"
SHARED = """#include <linux/utsname.h>

extern int ext4_kinds_helper(int x);
extern int kinds_note(int number);
extern int kinds_total;

"""
HELPER = "noinline int ext4_kinds_helper(int x)\n{\n\treturn x + 41;\n}\n\n"
CHANGES: dict[str, list[tuple[str, str]]] = {
    "kernel/sys.c": [(HEAD, PROBE.lstrip("\n")), (PPID, '\tpr_info_once("kinds: getppid\\n");\n' + PPID)],
    "kernel/signal.c": [
        (SENT, "static atomic_t kinds_sent;\n\n" + SENT),
        (SIGNAL, "\tatomic_inc(&kinds_sent);\n" + SIGNAL),
    ],
    "fs/proc/fd.h": [
        (
            "\treturn PROC_I(inode)->fd;",
            '\tpr_info_once("kinds: descriptor\\n");\n\treturn PROC_I(inode)->fd;',
        )
    ],
    "fs/ext4/fsync.c": [
        (SYNC, SHARED + SYNC),
        (
            ENTER,
            ENTER
            + "\n\twhile (datasync && utsname()->nodename[0] != 'w')"
            + "\n\t\tschedule_timeout_uninterruptible(HZ / 5);"
            + '\n\tpr_info("kinds: noted %d of %d\\n", kinds_note(100), kinds_total);'
            + '\n\tpr_info("kinds: ext4 %d\\n", ext4_kinds_helper(datasync));',
        ),
    ],
    "fs/ext4/ext4_jbd2.c": [
        (STOP, "int ext4_kinds_helper(int x);\n" + HELPER + STOP),
        ("\n\terr = handle->h_err;", '\n\tpr_info_once("kinds: journal stop\\n");\n\terr = handle->h_err;'),
    ],
    "fs/ext4/mballoc.c": [
        (
            FREED,
            "\t{\n\t\tu64 kinds_before = ext4_get_discard_pa_seq_sum();\n\n"
            "\t\tthis_cpu_inc(discard_pa_seq);\n"
            '\t\tpr_info_once("kinds: freed %llu\\n", ext4_get_discard_pa_seq_sum() - kinds_before);\n\t}\n'
            + FREED.partition("\n")[2],
        )
    ],
    "drivers/net/dummy.c": [(DUMMY, DUMMY + '\tpr_info("kinds: dummy\\n");\n')],
}
LIVE = "/sys/kernel/livepatch/kmend_kinds"
#: What the kernel says when something of a module does not fit.
BAD = (
    *("x86/modules: ", "refusing to load", "jump_label:", "Failed to fixup", "static_call:"),
    *("General protection fault in user access", "Invalid padding area", "missing return thunk"),
)


def patch_text(target: Target) -> bytes:
    out = []
    for path, changes in CHANGES.items():
        old = new = (target.source / path).read_text()
        for before, after in changes:
            at = new.index(before)  # of a prototype and its function, the prototype
            assert new.count(before) == 1 or before == SENT, (path, before)
            new = new[:at] + after + new[at + len(before) :]
        lines = difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{path}", f"b/{path}"
        )
        out.append("".join(lines))
    return "".join(out).encode()


@pytest.fixture(scope="module", params=["target_55", "target_612"])
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def built(target: Target, config: Config, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    folder = tmp_path_factory.mktemp("kinds")
    request = BuildRequest((("kinds.patch", patch_text(target)),), target.release, folder)
    report = build(request, config, Silent())
    assert report.result is Outcome.BUILT, report.refused
    return report


@pytest.fixture(scope="module")
def guest(target: Target, config: Config, built: BuildReport) -> Iterator[Guest]:
    """A guest with the module loaded and the transition over; ext4 and dummy come later."""
    with Guest.of(LabKernel.of(target), config.lab) as running:
        running.put("/root/kinds.ko", Path(built.module or "").read_bytes())
        running.run("insmod /root/kinds.ko", check=True)
        eventually(lambda: running.run(f"cat {LIVE}/transition").text == "0")
        yield running


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def said(guest: Guest) -> list[str]:
    """What the patched code said so far."""
    return [m.text[m.text.index("kinds: ") :] for m in guest.dmesg() if "kinds: " in m.text]


def last(guest: Guest, command: str) -> str:
    """The probe's last words after a command."""
    guest.run(command, check=True)
    return [line for line in said(guest) if line.startswith("kinds: call")][-1].partition("call ")[2]


def places(elf: ElfFile, section: str) -> set[tuple[str, int]]:
    """Where the relocations of a section's entries lead: section and offset."""
    found = set()
    for entry in elf.sections:
        for reloc in entry.relocs if entry.name == section else ():
            symbol = elf.symbols[reloc.symbol]
            if symbol.defined:
                found.add((elf.sections[symbol.section].name, symbol.value + reloc.addend))
    return found


def livepatched(elf: ElfFile, obj: str) -> set[tuple[str, int]]:
    """The fields that are relocated when an object comes: section and offset."""
    out = set()
    for section in elf.sections:
        if section.name.startswith(f".klp.rela.{obj}."):
            for at in range(0, len(section.data), 24):
                out.add(
                    (elf.sections[section.info].name, int.from_bytes(section.data[at : at + 8], "little"))
                )
    return out


def test_what_was_built(built: BuildReport) -> None:
    rows = {o.name: {f.name: (f.status, f.sympos) for f in o.functions} for o in built.objects}
    assert set(rows) == {"vmlinux", "ext4", "dummy"}
    assert set(rows["vmlinux"]) >= {
        *("__send_signal_locked", "__do_sys_getppid", "__x64_sys_sethostname", "__ia32_sys_sethostname"),
        *("kinds_probe", "kinds_note", "seq_show", "proc_fd_link"),
    }
    assert rows["vmlinux"]["seq_show"][1] >= 1  # kernel/cgroup or drivers have one as well
    assert rows["ext4"]["ext4_kinds_helper"][0] == "new"
    assert built.verified.functions == built.verified.identical >= 9
    assert "tracepoint-silent" in {w.rule for w in built.warnings}


def test_an_export_of_a_namespace(built: BuildReport, guest: Guest) -> None:
    """A module that does not import the namespace is not loaded (kernel/module/main.c)."""
    assert b"\0import_ns=DMA_BUF\0" in Path(built.module or "").read_bytes()
    assert "kinds: buffer -9" in said(guest)  # -EBADF


def test_how_its_code_is_laid_out(built: BuildReport, target: Target) -> None:
    elf = read(Path(built.module or "").read_bytes(), "kinds")
    functions = {s.name: s for s in elf.symbols}
    probe = functions["kinds_probe"]
    section = elf.sections[probe.section]
    per_cpu = elf.sections[functions["kinds_seen"].section]
    assert per_cpu.name == ".data..percpu"
    assert elf.sections[functions["kinds_constant"].section].name == ".data..ro_after_init"
    if "CONFIG_CALL_THUNKS=y" not in target.config.read_text():
        assert elf.section(".call_sites") is None
        assert "kinds_probe.cold" in functions  # with -fpatchable-function-entry GCC splits nothing off
        return
    replaced = functions["__x64_sys_sethostname"]
    assert section.data[replaced.value : replaced.value + 4] == bytes.fromhex("f30f1efa")  # ENDBR64
    assert section.data[probe.value - 16 : probe.value] == b"\x90" * 16  # room for call depth accounting
    # a call into a module that may come later has no target while call sites are looked at
    calls = places(elf, ".call_sites")
    late = {(name, at - 1) for obj in ("ext4", "dummy") for name, at in livepatched(elf, obj)}
    assert len(calls) > 20
    assert late
    assert not calls & late
    # and no runtime constant is left as the compiler was told to write it
    assert bytes.fromhex("efcdab8967452301") not in section.data
    assert ("USER_PTR_MAX", 0) in {(s.name, s.section) for s in elf.symbols}


def test_state_keys_and_per_cpu_variables(guest: Guest) -> None:
    first = last(guest, "hostname a")
    assert first == "1 key 0 own 0 10 count 1 fault 0 first a"
    guest.run("echo 1 > /proc/sys/kernel/sched_schedstats", check=True)
    assert last(guest, "hostname b") == "2 key 1 own 0 10 count 1 fault 0 first b"
    guest.run("echo 0 > /proc/sys/kernel/sched_schedstats", check=True)
    assert last(guest, "hostname c") == "3 key 0 own 0 10 count 1 fault 0 first c"
    assert guest.run("hostname").text == "c"


def test_features_constants_and_a_per_cpu_variable_of_its_own(guest: Guest) -> None:
    smap = 1 if guest.run("grep -qw smap /proc/cpuinfo").status == 0 else 0
    found = [line for line in said(guest) if "features" in line]
    assert found == [f"kinds: features {smap} 0 constant 42 seen 1"] * 3


def test_a_fault_finds_its_fixup(guest: Guest) -> None:
    """In the probe, and in ``copy_from_user()`` of the system call itself."""
    before = guest.run("hostname").text
    call = (
        "python3 -c 'import ctypes; c = ctypes.CDLL(None, use_errno=True); "
        "print(c.syscall(170, ctypes.c_ulong({}), 5), ctypes.get_errno())'"
    )
    assert guest.run(call.format(16), check=True).text == "-1 14"
    assert said(guest)[-1].endswith("fault 1 first -")
    # an address that no program has: refused by its number, not touched (6.12: against a runtime constant)
    for address in (1 << 56, 0xFFFF888000000000, (1 << 47) + 8):
        assert guest.run(call.format(address), check=True).text == "-1 14"
        assert said(guest)[-1].endswith("fault 0 first -")
    assert guest.run("hostname").text == before


def test_a_static_key_and_a_static_call_of_its_own(guest: Guest) -> None:
    assert last(guest, "hostname 123456789").split(" count")[0].endswith("own 1 15")
    assert last(guest, "hostname a").split(" count")[0].endswith("own 1 15")


def test_what_must_not_be_probed_cannot_be(guest: Guest) -> None:
    """``NOKPROBE_SYMBOL(kinds_note)``, and ``kinds_triple()`` of ``.kprobes.text``."""
    guest.run("[ -e /sys/kernel/tracing/trace ] || mount -t tracefs t /sys/kernel/tracing", check=True)
    probe = "echo 'p:kinds kmend_kinds:{}' >> /sys/kernel/tracing/kprobe_events"
    for name in ("kinds_note", "kinds_triple"):
        refused = guest.run(probe.format(name))
        assert refused.status != 0
        assert "Invalid argument" in refused.errors
    guest.run(probe.format("kinds_double"), check=True)
    guest.run("echo '-:kinds' >> /sys/kernel/tracing/kprobe_events", check=True)


def test_static_calls_of_the_kernel_follow(guest: Guest) -> None:
    """``cond_resched()`` becomes a NOP and a call again: its site in the module as well."""
    mode = "/sys/kernel/debug/sched/preempt"
    guest.run("[ -e /sys/kernel/debug/sched ] || mount -t debugfs d /sys/kernel/debug", check=True)
    before = guest.run(f"sed 's/.*(\\(.*\\)).*/\\1/' {mode}", check=True).text
    for name in ("full", "none", before):
        guest.run(f"echo {name} > {mode}", check=True)
        assert f"({name})" in guest.run(f"cat {mode}").text
        assert last(guest, "hostname a").endswith("fault 0 first a")


def test_a_system_call_without_arguments_says_it_once(guest: Guest) -> None:
    for _ in range(2):
        guest.run("python3 -c 'import os; assert os.getppid() > 1'", check=True)
    assert said(guest).count("kinds: getppid") == 1


def test_a_cold_part_is_reached(guest: Guest) -> None:
    name = "x" * 62
    assert last(guest, f"hostname {name}").endswith("first x")
    assert "kinds: cold 62" in said(guest)
    assert guest.run("hostname").text == name


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


def test_an_inline_of_a_header_in_a_function_whose_name_others_have(guest: Guest, built: BuildReport) -> None:
    """``seq_show()`` of fs/proc/fd.c, not that of the other files."""
    vmlinux = next(o for o in built.objects if o.name == "vmlinux")
    position = next(f.sympos for f in vmlinux.functions if f.name == "seq_show")
    assert guest.run(f"[ -d {LIVE}/vmlinux/seq_show,{position} ]").status == 0
    assert guest.run("head -1 /proc/self/fdinfo/0 | cut -c1-4").text == "pos:"
    assert said(guest).count("kinds: descriptor") >= 1


def test_a_tracepoint_of_the_kernel_stays_alive(guest: Guest) -> None:
    guest.run("[ -e /sys/kernel/tracing/trace ] || mount -t tracefs t /sys/kernel/tracing")
    event = "/sys/kernel/tracing/events/signal/signal_generate/enable"
    seen = guest.run(
        f"echo 1 > {event}; sleep 100 & kill $!; wait; echo 0 > {event}; cat /sys/kernel/tracing/trace"
    )
    assert "signal_generate: sig=15" in seen.text


def test_two_files_of_one_module_and_what_it_takes_from_others(guest: Guest) -> None:
    """``jbd2_journal_stop()`` is jbd2's: its relocation has to be applied when ext4 arrives."""
    calls = int([line for line in said(guest) if line.startswith("kinds: call")][-1].split()[2])
    guest.run("modprobe loop; modprobe ext4", check=True)
    assert guest.run(f"cat {LIVE}/ext4/patched").text == "1"
    guest.run(
        "dd if=/dev/zero of=/root/img bs=1M count=32; mkfs.ext4 -q /root/img; mkdir -p /root/m;"
        " mount -o loop /root/img /root/m && echo hi > /root/m/f && sync /root/m/f && rm /root/m/f"
        " && umount /root/m",
        check=True,
    )
    # the module's own per-CPU variable grew by one between two looks at it, in one line of code
    assert {"kinds: ext4 41", "kinds: journal stop", "kinds: freed 1"} <= set(said(guest))
    # the number that vmlinux's code counts up, with what ext4's code added to it
    noted = next(line for line in said(guest) if line.startswith("kinds: noted")).split()
    assert int(noted[2]) == calls + 100
    assert last(guest, "hostname a").startswith(f"{calls + 1} ")


def test_another_module_that_comes_later(guest: Guest) -> None:
    assert guest.run(f"cat {LIVE}/dummy/patched").text == "0"
    guest.run("modprobe dummy numdummies=2", check=True)
    assert guest.run(f"cat {LIVE}/dummy/patched").text == "1"
    assert said(guest).count("kinds: dummy") == 2
    guest.run("rmmod dummy && modprobe dummy numdummies=1", check=True)
    assert said(guest).count("kinds: dummy") == 3


def test_it_can_be_taken_back_and_the_log_is_clean(guest: Guest) -> None:
    guest.run(f"echo 0 > {LIVE}/enabled", check=True)
    eventually(lambda: guest.run(f"[ -e {LIVE} ]").status != 0)
    guest.run("rmmod kmend_kinds", check=True)
    assert [line for line in said(guest) if "patch" in line] == [
        f"kinds: {kind}" for kind in ("pre-patch", "post-patch", "pre-unpatch", "post-unpatch")
    ]
    before = len(said(guest))
    guest.run("hostname e && sync && modprobe -r dummy && modprobe dummy", check=True)
    assert len(said(guest)) == before
    log = guest.dmesg()
    assert [r.headline for r in reports(log) if "kinds_probe" not in r.headline] == []
    assert not [m.text for m in log if any(word in m.text for word in BAD)]


def test_a_task_asleep_in_replaced_code_survives_a_forced_end(
    target: Target, config: Config, built: BuildReport
) -> None:
    """It wakes up in the middle of ``ext4_sync_file()`` and goes on to call what only relocations reach."""
    with Guest.of(LabKernel.of(target), config.lab) as guest:
        guest.put("/root/kinds.ko", Path(built.module or "").read_bytes())
        guest.run("insmod /root/kinds.ko; modprobe loop; modprobe ext4", check=True)
        eventually(lambda: guest.run(f"cat {LIVE}/transition").text == "0")
        guest.run(
            "dd if=/dev/zero of=/root/img bs=1M count=32; mkfs.ext4 -q /root/img; mkdir -p /root/m;"
            " mount -o loop /root/img /root/m; echo hi > /root/m/f",
            check=True,
        )
        guest.run("(sync -d /root/m/f; echo $? > /root/done) >/dev/null 2>&1 &", check=True)
        time.sleep(1)
        guest.run(f"echo 0 > {LIVE}/enabled && sleep 1 && echo 1 > {LIVE}/force", check=True)
        eventually(lambda: guest.run(f"[ -e {LIVE} ]").status != 0)
        assert guest.run("[ -e /root/done ]").status != 0, "the task has to be asleep until here"
        guest.run("hostname wake", check=True)
        eventually(lambda: guest.run("cat /root/done").text == "0")
        assert reports(guest.dmesg()) == ()
        assert "kinds: ext4 42" in said(guest)
