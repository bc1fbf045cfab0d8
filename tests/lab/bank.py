"""Livepatch modules for what a live kernel can meet: built by hand, once for all tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from kmend.core.run import run
from kmend.core.target import Target

HEAD = """
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched/task.h>
#include <linux/seq_file.h>
#include <linux/uio.h>
"""
TAIL = """
static struct klp_patch patch = {{ .mod = THIS_MODULE, .objs = objs, {patch} }};
static int __init start(void) {{ return klp_enable_patch(&patch); }}
static void __exit end(void) {{ }}
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
{mark}
"""


@dataclass(frozen=True)
class Wish:
    """A module: (old function, sympos, code of its replacement) for each function; what else it has."""

    functions: tuple[tuple[str, int, str], ...]
    object: str = ""
    patch: str = ""
    before: str = ""
    mark: str = 'MODULE_INFO(livepatch, "Y");'

    def source(self) -> str:
        """The C file."""
        rows = "".join(
            f'{{ .old_name = "{old}", .new_func = f{at}, .old_sympos = {sympos} }}, '
            for at, (old, sympos, _) in enumerate(self.functions)
        )
        code = "\n".join(text.format(f=f"f{at}") for at, (_, _, text) in enumerate(self.functions))
        return (
            f"{HEAD}{code}\n{self.before}\n"
            f"static struct klp_func funcs[] = {{ {rows}{{ }} }};\n"
            f"static struct klp_object objs[] = {{ {{ {self.object} .funcs = funcs }}, {{ }} }};\n"
            + TAIL.format(patch=self.patch, mark=self.mark)
        )


def show(body: str) -> str:
    return "static int {f}(struct seq_file *m, void *v) {{ " + body + " return 0; }}"


CMDLINE = ("cmdline_proc_show", 0, show('seq_puts(m, "patched\\n");'))
NOTHING = "static void {f}(void) {{ }}"
WISHES = {
    "one": Wish((CMDLINE,)),
    "other": Wish((("uptime_proc_show", 0, show('seq_puts(m, "other\\n");')),)),
    "all_new": Wish(
        (("version_proc_show", 0, show('seq_puts(m, "cumulative\\n");')),), patch=".replace = true,"
    ),
    "sleepy": Wish((("cmdline_proc_show", 0, show('ssleep(25); seq_puts(m, "sleepy\\n");')),)),
    # only a kill ends it; kmend itself never reads this file
    "doze": Wish((("loadavg_proc_show", 0, show("schedule_timeout_killable(1000 * HZ);")),)),
    "naps": Wish(
        (("hrtimer_nanosleep", 0, "static long {f}(ktime_t r, int mode, clockid_t c) {{ return 0; }}"),)
    ),
    "vforks": Wish(
        (("kernel_clone", 0, "static int {f}(struct kernel_clone_args *a) {{ return -EAGAIN; }}"),)
    ),
    "unknown": Wish((("kmend_no_such_function", 0, NOTHING),)),
    "several": Wish((("c_start", 0, NOTHING),)),
    "nowhere": Wish((("cmdline_proc_show", 2, show("")),)),
    "notrace": Wish((("do_syscall_64", 0, NOTHING),)),
    "twice": Wish((CMDLINE, CMDLINE)),
    "refusing": Wish(
        (CMDLINE,),
        object=".callbacks = { .pre_patch = no }, ",
        before="static int no(struct klp_object *o) { return -ENODEV; }",
    ),
    "unmarked": Wish((CMDLINE,), mark=""),
    # more than the guest's memory: vmalloc() refuses it at once, without looking for anything to free
    "huge": Wish(
        (("cmdline_proc_show", 0, "static char large[1 << 30];\n" + show("seq_write(m, large, 1);")),)
    ),
    "warning": Wish(
        (CMDLINE,),
        object=".callbacks = { .post_patch = warn }, ",
        before='static void warn(struct klp_object *o) { WARN(1, "kmend test"); }',
    ),
}
#: A kprobe with a post handler: it needs IPMODIFY, as a livepatch does.
PROBE = """
#include <linux/kprobes.h>
#include <linux/module.h>
static void after(struct kprobe *p, struct pt_regs *r, unsigned long f) { }
static struct kprobe probe = { .symbol_name = "cmdline_proc_show", .post_handler = after };
static int __init start(void) { return register_kprobe(&probe); }
static void __exit end(void) { unregister_kprobe(&probe); }
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
"""
#: Another user of ftrace that decides where a function goes.
HOOK = """
#include <linux/ftrace.h>
#include <linux/module.h>
static void notrace enter(unsigned long ip, unsigned long from, struct ftrace_ops *o, struct ftrace_regs *r)
{
}
static struct ftrace_ops ops = { .func = enter, .flags = FTRACE_OPS_FL_SAVE_REGS | FTRACE_OPS_FL_IPMODIFY };
static char name[] = "cmdline_proc_show";
static int __init start(void)
{
	int err = ftrace_set_filter(&ops, name, sizeof(name) - 1, 1);
	return err ? err : register_ftrace_function(&ops);
}
static void __exit end(void) { unregister_ftrace_function(&ops); }
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
"""
#: A kernel thread that sleeps in cmdline_proc_show()'s place: in a function of its own that can be patched.
SLEEPER = """
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/module.h>
static struct task_struct *task;
noinline void kmend_nap(void);
noinline void kmend_nap(void) { schedule_timeout_idle(HZ / 2); barrier(); }
static int work(void *data) { while (!kthread_should_stop()) kmend_nap(); return 0; }
static int __init start(void)
{
	task = kthread_run(work, NULL, "kmend-sleeper");
	return PTR_ERR_OR_ZERO(task);
}
static void __exit end(void) { kthread_stop(task); }
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
"""
#: Patches the loop itself, which never returns: the thread never leaves it.
WISHES["kthread"] = Wish(
    (("work", 0, "static int {f}(void *d) {{ return 0; }}"),), object='.name = "sleeper",'
)
WISHES["kthread_all"] = replace(WISHES["kthread"], patch=".replace = true,")

#: Modules that are no livepatches.
OTHERS = {"probe": PROBE, "hook": HOOK, "sleeper": SLEEPER}


def build(target: Target, folder: Path) -> dict[str, Path]:
    """All of them by name. ``make M=`` writes nothing into the target's tree."""
    sources = {name: wish.source() for name, wish in WISHES.items()} | OTHERS
    for name, text in sources.items():
        (folder / f"{name}.c").write_text(text)
    (folder / "Makefile").write_text("obj-m := " + " ".join(f"{name}.o" for name in sources) + "\n")
    run(
        ["make", "-s", "-j2", "-C", target.source, f"M={folder}", f"CC={target.compiler}", "modules"],
        timeout=600,
    )
    return {name: folder / f"{name}.ko" for name in sources}
