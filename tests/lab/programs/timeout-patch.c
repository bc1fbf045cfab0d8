// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A livepatch of schedule_hrtimeout(), in which io_uring_enter() waits on Linux 6.1. There io_cqring_wait() is
 * inlined into __do_sys_io_uring_enter(), which is notrace, so that no patch can replace either of them.
 */
#include <linux/hrtimer.h>
#include <linux/livepatch.h>
#include <linux/module.h>

static int kmend_timeout(ktime_t *expires, const enum hrtimer_mode mode)
{
	int ret = schedule_hrtimeout_range(expires, 0, mode);

	barrier(); /* no tail call: it has to be on the stack */
	return ret;
}
static struct klp_func funcs[] = { { .old_name = "schedule_hrtimeout", .new_func = kmend_timeout }, { } };
static struct klp_object objs[] = { { .funcs = funcs }, { } };
static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs };
static int __init start(void) { return klp_enable_patch(&patch); }
static void __exit end(void) { }
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
