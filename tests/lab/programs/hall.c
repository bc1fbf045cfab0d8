// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * /proc/hall: who writes a word to it waits in hall_wait(): "wait" interruptibly, "hard" uninterruptibly,
 * "spin" without sleeping. "open" lets all of them go. A kernel thread (kmend-hall) sleeps there as well.
 */
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

static DECLARE_WAIT_QUEUE_HEAD(hall_queue);
static bool hall_open;
static struct task_struct *task;

noinline int hall_wait(char how);
noinline int hall_wait(char how)
{
	int ret = 0;

	switch (how) {
	case 'w':
		ret = wait_event_interruptible(hall_queue, READ_ONCE(hall_open));
		break;
	case 'h':
		wait_event(hall_queue, READ_ONCE(hall_open));
		break;
	case 's':
		/* it never sleeps: the kernel's grace periods of RCU-tasks wait until it is killed */
		while (!READ_ONCE(hall_open) && !signal_pending(current))
			cond_resched();
		break;
	case 'k':
		wait_event_interruptible(hall_queue, kthread_should_stop());
		break;
	case 'o':
		WRITE_ONCE(hall_open, true);
		wake_up_all(&hall_queue);
		break;
	}
	barrier();
	return ret;
}

static ssize_t hall_write(struct file *f, const char __user *from, size_t n, loff_t *o)
{
	char how;
	int ret;

	if (!n || get_user(how, from))
		return -EFAULT;
	ret = hall_wait(how);
	return ret ? ret : n;
}
static const struct proc_ops hall_ops = { .proc_write = hall_write };

static int work(void *data)
{
	while (!kthread_should_stop())
		hall_wait('k');
	return 0;
}

static int __init start(void)
{
	if (!proc_create("hall", 0200, NULL, &hall_ops))
		return -ENOMEM;
	task = kthread_run(work, NULL, "kmend-hall");
	return PTR_ERR_OR_ZERO(task);
}

static void __exit end(void)
{
	kthread_stop(task);
	remove_proc_entry("hall", NULL);
}
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
