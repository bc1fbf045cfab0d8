// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The ground of the differential runs: functions to be patched, a way to fall asleep in them, and a look at
 * the kernel's func stacks. /proc/kd/FUNCTION.HOW calls a function and shows whose code ran.
 */
#include "kd.h"
#include <linux/mutex.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>
#include "patch.h" /* kernel/livepatch/ */

static unsigned long ops, mutex;
module_param(ops, ulong, 0);
MODULE_PARM_DESC(ops, "address of klp_ops");
module_param(mutex, ulong, 0);
MODULE_PARM_DESC(mutex, "address of klp_mutex");

static struct {
	char version[MODULE_NAME_LEN];
	bool released;
} slots[KD_SLOTS];
static DECLARE_WAIT_QUEUE_HEAD(queue);

noinline int kd_sleep(int how, const char *version);
noinline int kd_sleep(int how, const char *version)
{
	int slot = (how - 1) / 2, ret = 0;

	strscpy(slots[slot].version, version, sizeof(slots[slot].version));
	if ((how - 1) & 1)
		wait_event(queue, READ_ONCE(slots[slot].released));
	else
		ret = wait_event_interruptible(queue, READ_ONCE(slots[slot].released));
	slots[slot].version[0] = 0;
	if (!ret)
		slots[slot].released = false;
	return ret;
}

KD_FUNCTION(kd_f, kd_sleep)
KD_FUNCTION(kd_g, kd_sleep)

static int slots_show(struct seq_file *m, void *v)
{
	int i;

	for (i = 0; i < KD_SLOTS; i++)
		seq_printf(m, "%s ", slots[i].version[0] ? slots[i].version : "-");
	seq_putc(m, '\n');
	return 0;
}

/* FUNCTION PATCH:NOP:TRANSITION ..., top first */
static int stacks_show(struct seq_file *m, void *v)
{
	struct klp_func *func;
	struct klp_ops *one;

	mutex_lock((struct mutex *)mutex);
	list_for_each_entry(one, (struct list_head *)ops, node) {
		bool first = true;

		list_for_each_entry(func, &one->func_stack, stack_node) {
			if (first)
				seq_printf(m, "%s", func->old_name);
			first = false;
			seq_printf(m, " %s:%d:%d", kobject_name(func->kobj.parent->parent),
				   func->nop, func->transition);
		}
		seq_putc(m, '\n');
	}
	mutex_unlock((struct mutex *)mutex);
	return 0;
}

static ssize_t release_write(struct file *file, const char __user *data, size_t count, loff_t *at)
{
	unsigned int slot;
	int ret = kstrtouint_from_user(data, count, 0, &slot);

	if (ret)
		return ret;
	if (slot >= KD_SLOTS)
		return -EINVAL;
	WRITE_ONCE(slots[slot].released, true);
	wake_up_all(&queue);
	return count;
}

static const struct proc_ops release_ops = { .proc_write = release_write };

static int __init start(void)
{
	struct kd_door *door = klp_shadow_alloc(&init_task, KD_MARK, sizeof(*door), GFP_KERNEL, NULL, NULL);
	struct proc_dir_entry *kd_folder;

	if (!door)
		return -ENOMEM;
	door->sleep = kd_sleep;
	door->folder = kd_folder = proc_mkdir("kd", NULL);
	proc_create_single("slots", 0444, kd_folder, slots_show);
	proc_create_single("stacks", 0444, kd_folder, stacks_show);
	proc_create("release", 0200, kd_folder, &release_ops);
	kd_show(kd_f);
	kd_show(kd_g);
	return 0;
}

static void __exit end(void)
{
	proc_remove(kd_door()->folder);
	klp_shadow_free(&init_task, KD_MARK, NULL);
}
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
