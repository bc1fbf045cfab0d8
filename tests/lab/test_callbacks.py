"""Callbacks, states and shadow variables declared in a patch: built, loaded, seen at work, taken back."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from patching import load, said, unload

from kmend.core.config import Config
from kmend.core.progress import Silent
from kmend.core.report import BuildReport, Outcome
from kmend.core.target import Target
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel
from kmend.pipeline import BuildRequest, build

pytestmark = [pytest.mark.lab, pytest.mark.target]

KINDS = ("pre-patch", "post-patch", "pre-unpatch", "post-unpatch")

Edit = tuple[str, str]
Make = Callable[..., BuildReport]


@pytest.fixture(scope="module")
def make(target_55: Target, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Builds a patch that replaces texts in files of the target's tree."""
    out = tmp_path_factory.mktemp("modules")

    def build_edits(name: str, edits: Mapping[str, list[Edit]]) -> BuildReport:
        patch = ""
        for path, rows in edits.items():
            old = new = (target_55.source / path).read_text()
            for before, after in rows:
                assert new.count(before) == 1, before
                new = new.replace(before, after)
            patch += "".join(
                difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{path}", f"b/{path}")
            )
        request = BuildRequest(((name, patch.encode()),), target_55.release, out, name=name)
        return build(request, config, Silent())

    return build_edits


@pytest.fixture(scope="module")
def guest(kernel_55: LabKernel, config: Config) -> Iterator[Guest]:
    with Guest.of(kernel_55, config.lab) as running:
        yield running


def module_of(report: BuildReport) -> Path:
    assert report.result is Outcome.BUILT, report.refused
    return Path(report.module or "")


def calls(guest: Guest, start: int) -> list[str]:
    """What the callbacks and the transition said, in order."""
    words = []
    for line in said(guest, start):
        if line.startswith("test: "):
            words.append(line.removeprefix("test: "))
        elif line.startswith("livepatch: ") and ("complete" in line or "starting" in line):
            words.append(line.rpartition("': ")[2])
    return words


#: Four callbacks that name their object; %s: what pre-patch returns.
CALLBACKS = """
#include "kmend.h"

static int before_patch(struct klp_object *obj)
{
	pr_info("test: pre-patch %%s\\n", obj->name ?: "vmlinux");
	return %s;
}
KMEND_PRE_PATCH(before_patch);

static void after_patch(struct klp_object *obj)
{
	pr_info("test: post-patch %%s\\n", obj->name ?: "vmlinux");
}
KMEND_POST_PATCH(after_patch);

static void before_unpatch(struct klp_object *obj)
{
	pr_info("test: pre-unpatch %%s\\n", obj->name ?: "vmlinux");
}
KMEND_PRE_UNPATCH(before_unpatch);

static void after_unpatch(struct klp_object *obj)
{
	pr_info("test: post-unpatch %%s\\n", obj->name ?: "vmlinux");
}
KMEND_POST_UNPATCH(after_unpatch);
"""
CMDLINE = "fs/proc/cmdline.c"
INCLUDE = "#include <linux/seq_file.h>\n"
SHOWN: Edit = ("seq_putc(m, '\\n');", 'seq_puts(m, " patched\\n");')
IN_ORDER = [
    "pre-patch {0}",
    "starting patching transition",
    "post-patch {0}",
    "patching complete",
    "pre-unpatch {0}",
    "starting unpatching transition",
    "post-unpatch {0}",
    "unpatching complete",
]


def test_all_four_are_called_in_their_order(make: Make, guest: Guest) -> None:
    report = make("four", {CMDLINE: [(INCLUDE, INCLUDE + CALLBACKS % "0"), SHOWN]})
    rows = {f.name: f.why for f in report.objects[0].functions}
    assert rows["before_patch"] == "pre-patch callback"
    assert rows["cmdline_proc_show"] == "edited"
    start = len(guest.dmesg())
    assert load(guest, module_of(report)).status == 0
    assert guest.run("cat /proc/cmdline").text.endswith(" patched")
    assert unload(guest, "four").status == 0
    assert calls(guest, start) == [line.format("vmlinux") for line in IN_ORDER]


def test_a_patch_may_consist_of_callbacks_alone(make: Make, guest: Guest) -> None:
    report = make("alone", {CMDLINE: [(INCLUDE, INCLUDE + CALLBACKS % "0")]})
    start = len(guest.dmesg())
    assert load(guest, module_of(report)).status == 0
    assert unload(guest, "alone").status == 0
    assert calls(guest, start) == [line.format("vmlinux") for line in IN_ORDER]


def test_a_failing_pre_patch_callback_stops_the_load_and_leaves_nothing(make: Make, guest: Guest) -> None:
    report = make("failing", {CMDLINE: [(INCLUDE, INCLUDE + CALLBACKS % "-ENODEV"), SHOWN]})
    stock = guest.run("cat /proc/cmdline").text
    start = len(guest.dmesg())
    done = load(guest, module_of(report))
    assert done.status != 0
    assert "No such device" in done.errors
    assert calls(guest, start) == ["pre-patch vmlinux", "unpatching complete"]
    assert "livepatch: pre-patch callback failed for object 'vmlinux'" in said(guest, start)
    assert guest.run("ls /sys/kernel/livepatch; ls -d /sys/module/failing").text == ""
    assert guest.run("cat /proc/cmdline").text == stock


DUMMY = "drivers/net/dummy.c"
#: Also reads a static variable of the module, which is there only once the module is.
LATE = CALLBACKS.replace("return %s;", 'pr_info("test: %%d devices\\n", numdummies);\n\treturn %s;')


def test_those_of_a_module_are_called_when_it_comes_and_goes(make: Make, guest: Guest) -> None:
    define = "static int numdummies = 1;\n"
    report = make("late", {DUMMY: [(define, define + LATE % "0"), ("DRV_NAME, sizeof", '"late", sizeof')]})
    assert [row.name for row in report.objects] == ["dummy"]
    assert guest.run("grep -c ^dummy /proc/modules").text == "0"
    start = len(guest.dmesg())
    assert load(guest, module_of(report)).status == 0
    assert not any("dummy" in line for line in calls(guest, start))
    for _ in range(2):  # it must be possible to load it again while the patch stays
        start = len(guest.dmesg())
        guest.run("modprobe dummy numdummies=3", check=True)
        coming = ["pre-patch dummy", "1 devices", "post-patch dummy"]  # before the parameters are read
        assert calls(guest, start) == coming
        guest.run("rmmod dummy", check=True)
        assert calls(guest, start) == [*coming, "pre-unpatch dummy", "post-unpatch dummy"]
    guest.run("modprobe dummy", check=True)
    start = len(guest.dmesg())
    assert unload(guest, "late").status == 0
    assert calls(guest, start) == [line.format("dummy") for line in IN_ORDER[4:]]
    guest.run("rmmod dummy", check=True)


def test_a_failing_callback_of_a_late_module_refuses_that_module(make: Make, guest: Guest) -> None:
    define = "static int numdummies = 1;\n"
    report = make("late_failing", {DUMMY: [(define, define + LATE % "-EPERM")]})
    assert load(guest, module_of(report)).status == 0
    done = guest.run("modprobe dummy")
    assert done.status != 0
    assert guest.run("grep -c ^dummy /proc/modules").text == "0"
    assert unload(guest, "late_failing").status == 0
    guest.run("modprobe dummy && rmmod dummy", check=True)


#: As the guide for authors of kpatch patches has it: its own header, type and macros.
KPATCH = """
#include "kpatch-macros.h"

static bool kpatch_entered;

static int kpatch_pre(patch_object *obj)
{
	KPATCH_PRINTK("test: kpatch pre\\n");
	kpatch_entered = true;
	return 0;
}
static void kpatch_post(patch_object *obj)
{
	if (kpatch_entered)
		KPATCH_PRINTK("test: kpatch post\\n");
}
KPATCH_PRE_PATCH_CALLBACK(kpatch_pre);
KPATCH_POST_UNPATCH_CALLBACK(kpatch_post);
KPATCH_FORCE_UNSAFE(do_getpgid);

"""
SYSCALL: Edit = (
    "SYSCALL_DEFINE1(getpgid, pid_t, pid)\n{\n",
    '#include "kpatch-syscall.h"\n' + KPATCH + "KPATCH_SYSCALL_DEFINE1(getpgid, pid_t, pid)\n{\n"
    "\tif (pid == -77)\n\t\treturn 4711;\n",
)


def test_a_patch_written_for_kpatch_builds_unchanged(make: Make, guest: Guest) -> None:
    report = make("kpatch_style", {"kernel/sys.c": [SYSCALL]})
    changed = {f.name for f in report.objects[0].functions if f.status == "changed"}
    assert "__x64_sys_getpgid" in changed
    assert [w.rule for w in report.warnings if w.rule == "force-unsafe"] == ["force-unsafe"]
    ask = "/usr/bin/python3 -c 'import os; print(os.getpgid(0) > 0); print(os.getpgid(-77))'"
    assert "No such process" in guest.run(ask).errors
    start = len(guest.dmesg())
    assert load(guest, module_of(report)).status == 0
    assert guest.run(ask).text == "True\n4711"
    assert unload(guest, "kpatch_style").status == 0
    assert [line for line in calls(guest, start) if "kpatch" in line] == ["kpatch pre", "kpatch post"]
    assert "No such process" in guest.run(ask).errors


SHADOW = "#include <linux/livepatch.h>\n#define SHADOW_BIRTH 0x62697274\n\n"
FORK: list[Edit] = [
    ("pid_t kernel_clone(", SHADOW + "pid_t kernel_clone("),
    (
        "\ttrace_sched_process_fork(current, p);\n",
        "\t{\n\t\tstatic atomic_t births = ATOMIC_INIT(1000);\n"
        "\t\tint *birth = klp_shadow_get_or_alloc(p, SHADOW_BIRTH, sizeof(*birth), GFP_KERNEL,\n"
        "\t\t\t\t\t\t     NULL, NULL);\n\n\t\tif (birth)\n\t\t\t*birth = atomic_inc_return(&births);\n\t}\n"
        "\ttrace_sched_process_fork(current, p);\n",
    ),
]
EXIT: list[Edit] = [
    (
        "void __noreturn do_exit(long code)\n",
        SHADOW + "static int forgotten;\n\nvoid __noreturn do_exit(long code)\n",
    ),
    (
        "\tsynchronize_group_exit(tsk, code);\n",
        "\tsynchronize_group_exit(tsk, code);\n"
        "\tif (klp_shadow_get(tsk, SHADOW_BIRTH)) {\n"
        "\t\tklp_shadow_free(tsk, SHADOW_BIRTH, NULL);\n"
        '\t\tpr_info_once("test: forgotten %d\\n", ++forgotten);\n\t}\n',
    ),
]
ARRAY: list[Edit] = [
    (
        "static inline void task_context_switch_counts(",
        SHADOW + "static inline void task_context_switch_counts(",
    ),
    (
        "p->nivcsw);\n\tseq_putc(m, '\\n');\n",
        "p->nivcsw);\n\tseq_putc(m, '\\n');\n"
        "\t{\n\t\tint *birth = klp_shadow_get(p, SHADOW_BIRTH);\n\n"
        '\t\tif (birth)\n\t\t\tseq_printf(m, "Birth:\\t%d\\n", *birth);\n\t}\n',
    ),
    ("static int do_task_stat(", "KMEND_POST_UNPATCH(forget_births);\n\nstatic int do_task_stat("),
    (
        "static void task_cpus_allowed(",
        '#include "kmend.h"\nstatic void forget_births(struct klp_object *obj)\n'
        "{\n\tklp_shadow_free_all(SHADOW_BIRTH, NULL);\n}\n\nstatic void task_cpus_allowed(",
    ),
]


def test_a_shadow_variable_lives_from_fork_to_exit(make: Make, guest: Guest) -> None:
    """Three files: one allocates it, one shows it, one frees it; a callback frees what is left."""
    report = make("births", {"kernel/fork.c": FORK, "kernel/exit.c": EXIT, "fs/proc/array.c": ARRAY})
    start = len(guest.dmesg())
    assert load(guest, module_of(report)).status == 0
    seen = guest.run(
        "sleep 100 & a=$!; sleep 100 & b=$!\n"
        "sed -n 's/^Birth:.//p' /proc/$a/status /proc/$b/status /proc/1/status; kill $a $b; wait"
    ).text.split()
    assert len(seen) == 2  # init is older than the patch
    assert int(seen[0]) > 1000
    assert int(seen[1]) == int(seen[0]) + 1
    assert "forgotten 1" in calls(guest, start)
    assert unload(guest, "births").status == 0
    assert guest.run("sleep 100 & grep -c ^Birth /proc/$!/status; kill $!").text == "0"


SHOW_UPTIME = "static int uptime_proc_show"


def test_two_of_a_kind_for_one_object_are_refused(make: Make) -> None:
    report = make(
        "twice",
        {
            CMDLINE: [(INCLUDE, INCLUDE + CALLBACKS % "0")],
            "fs/proc/uptime.c": [(SHOW_UPTIME, CALLBACKS % "0" + SHOW_UPTIME)],
        },
    )
    assert report.result is Outcome.REFUSED
    refused = [(row.rule, row.what) for row in report.refused]
    assert refused == [("duplicate-callback", f"{kind} callback of vmlinux") for kind in KINDS]


def test_states_are_found_by_the_patch_and_by_the_one_that_replaces_it(make: Make, guest: Guest) -> None:
    """klp_get_state() and klp_get_prev_state(); a patch with an older version of a state cannot replace."""

    def text(version: int) -> str:
        return f"""
#include "kmend.h"

KMEND_STATE(0x1234, {version});

static int before_patch(struct klp_object *obj)
{{
	struct klp_state *mine = klp_get_state(&kmend_patch, 0x1234);
	struct klp_state *theirs = klp_get_prev_state(0x1234);

	pr_info("test: state %u, before %u\\n", mine->version, theirs ? theirs->version : 0);
	return 0;
}}
KMEND_PRE_PATCH(before_patch);
"""

    first = module_of(make("state_first", {CMDLINE: [(INCLUDE, INCLUDE + text(1)), SHOWN]}))
    second = module_of(make("state_second", {CMDLINE: [(INCLUDE, INCLUDE + text(2)), SHOWN]}))
    start = len(guest.dmesg())
    assert load(guest, first).status == 0
    assert load(guest, second).status == 0
    assert [line for line in calls(guest, start) if "state" in line] == [
        "state 1, before 0",
        "state 2, before 1",
    ]
    guest.run("rmmod state_first", check=True)
    done = load(guest, first)
    assert done.status != 0
    assert any("not compatible with the already installed" in line for line in said(guest, start))
    assert unload(guest, "state_second").status == 0
