/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/wait.h>

#define KD_SLOTS 3
/* how: 0 returns at once; 1 + 2 * slot sleeps there interruptibly, 2 + 2 * slot uninterruptibly */
#define KD_HOWS (1 + 2 * KD_SLOTS)
#define KD_MARK 0x6b64

typedef int (*kd_fn)(int how, const char **version);
struct kd_call { kd_fn fn; int how; };

/*
 * Nothing is exported: modules of kmend get only what the kernel exports. What kd_base has for the others lies in
 * a shadow variable.
 */
struct kd_door {
	int (*sleep)(int how, const char *version);
	struct proc_dir_entry *folder;
};
static inline struct kd_door *kd_door(void)
{
	return klp_shadow_get(&init_task, KD_MARK);
}

/* the sleep is a call, not a jump: see cflags in kmend.toml */
#define KD_BODY(sleeping, whose) { \
	int ret = 0; \
	*version = whose; \
	if (how) \
		ret = sleeping(how, *version); \
	barrier(); \
	return ret; \
}
#define KD_FUNCTION(function, sleeping) \
	noinline int function(int how, const char **version); \
	noinline int function(int how, const char **version) KD_BODY(sleeping, THIS_MODULE->name) \
	static struct kd_call function##_calls[KD_HOWS];

static inline int kd_call_show(struct seq_file *m, void *v)
{
	struct kd_call *call = m->private;
	const char *version = "";
	int ret = call->fn(call->how, &version);

	if (!ret)
		seq_printf(m, "%s\n", version);
	return ret;
}

#define kd_show(name) do { int i; char file[32]; \
	for (i = 0; i < KD_HOWS; i++) { \
		name##_calls[i] = (struct kd_call){ name, i }; \
		snprintf(file, sizeof(file), #name ".%d", i); \
		proc_create_single_data(file, 0444, kd_door()->folder, kd_call_show, &name##_calls[i]); \
	} } while (0)
#define kd_hide(name) do { int i; char file[32]; \
	for (i = 0; i < KD_HOWS; i++) { \
		snprintf(file, sizeof(file), #name ".%d", i); \
		remove_proc_entry(file, kd_door()->folder); \
	} } while (0)
