// SPDX-License-Identifier: GPL-2.0
/*
 * A number that struct file has no room for: how often the file was read. It lives
 * in a shadow variable (Documentation/livepatch/shadow-vars.rst).
 *
 * Counting goes on only between the end of one transition and the beginning of the
 * next. While tasks differ, one that runs the old __fput() could close a file whose
 * counter a patched task has made, and another file would find it at that address.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/fdtable.h>
#include <linux/file.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>
#include "count.h"
#include "kmend.h"

/* Shadow variables are found by an object and a number that no other patch may use. */
#define READ_COUNT 0x76667372UL

static bool counting;
static atomic_t counters = ATOMIC_INIT(0);

static int counter_made(void *obj, void *shadow_data, void *ctor_data)
{
	atomic_inc(&counters);
	return 0;
}

static void counter_gone(void *obj, void *shadow_data)
{
	atomic_dec(&counters);
}

void count_read(struct file *file)
{
	atomic_long_t *reads;

	if (!READ_ONCE(counting))
		return;
	/* New ones are filled with zeros. */
	reads = klp_shadow_get_or_alloc(file, READ_COUNT, sizeof(*reads), GFP_KERNEL, counter_made, NULL);
	if (reads)
		atomic_long_inc(reads);
}

void count_forget(struct file *file)
{
	klp_shadow_free(file, READ_COUNT, counter_gone);
}

static void begin_counting(struct klp_object *obj)
{
	WRITE_ONCE(counting, true);
}
KMEND_POST_PATCH(begin_counting);

static void end_counting(struct klp_object *obj)
{
	WRITE_ONCE(counting, false);
}
KMEND_PRE_UNPATCH(end_counting);

static void free_counters(struct klp_object *obj)
{
	klp_shadow_free_all(READ_COUNT, counter_gone);
	pr_info("%d counters left\n", atomic_read(&counters));
}
KMEND_POST_UNPATCH(free_counters);

/* /sys/module/vfs_read_count/parameters/reads: the open files of the task that reads it. */
struct listing {
	char *text;
	int size;
};

static int list_one(const void *data, struct file *file, unsigned int fd)
{
	struct listing *listing = (struct listing *)data;
	atomic_long_t *reads = klp_shadow_get(file, READ_COUNT);

	if (reads)
		listing->size += scnprintf(listing->text + listing->size, PAGE_SIZE - listing->size,
					   "%u %ld\n", fd, atomic_long_read(reads));
	return 0;
}

static int show_reads(char *text, const struct kernel_param *kp)
{
	struct listing listing = { .text = text };

	iterate_fd(current->files, 0, list_one, &listing);
	return listing.size;
}

static const struct kernel_param_ops reads_ops = { .get = show_reads };
module_param_cb(reads, &reads_ops, NULL, 0444);
MODULE_PARM_DESC(reads, "file descriptor and number of reads, for each file of the task that looks");

static int show_counters(char *text, const struct kernel_param *kp)
{
	return scnprintf(text, PAGE_SIZE, "%d\n", atomic_read(&counters));
}

static const struct kernel_param_ops counters_ops = { .get = show_counters };
module_param_cb(counters, &counters_ops, NULL, 0444);
MODULE_PARM_DESC(counters, "open files that have a counter");
