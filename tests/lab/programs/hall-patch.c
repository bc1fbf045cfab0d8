// SPDX-License-Identifier: GPL-2.0-or-later
/* A livepatch of hall_wait() in the module hall: nobody waits there any more. */
#include <linux/livepatch.h>
#include <linux/module.h>

static int no_wait(char how)
{
	return 0;
}
static struct klp_func funcs[] = { { .old_name = "hall_wait", .new_func = no_wait }, { } };
static struct klp_object objs[] = { { .name = "hall", .funcs = funcs }, { } };
static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs };
static int __init start(void) { return klp_enable_patch(&patch); }
static void __exit end(void) { }
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
