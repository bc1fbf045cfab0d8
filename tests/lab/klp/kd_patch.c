// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The replacements of every scenario's livepatches. Which of them a patch uses, and the name that it goes by, stand
 * in the kmend.toml that is written for it; the descriptors are kmend's.
 */
#include "kd.h"

/* static or not exported where they are defined, so livepatch symbols here */
extern int kd_sleep(int how, const char *version);
extern int kd_late_mark;

#ifdef WITH_KD_BASE
int livepatch_kd_f(int how, const char **version) KD_BODY(kd_sleep, THIS_MODULE->name)
int livepatch_kd_g(int how, const char **version) KD_BODY(kd_sleep, THIS_MODULE->name)
#endif

#ifdef WITH_KD_LATE
/* tells a relocation that leads astray, or that was not made */
#define CHECKED (READ_ONCE(kd_late_mark) == KD_MARK ? THIS_MODULE->name : "astray")
int livepatch_kd_m(int how, const char **version) KD_BODY(kd_door()->sleep, CHECKED)
int livepatch_kd_n(int how, const char **version) KD_BODY(kd_door()->sleep, CHECKED)
#endif

int livepatch_cmdline_proc_show(struct seq_file *m, void *v)
{
	seq_printf(m, "%s\n", THIS_MODULE->name);
	return 0;
}

int livepatch_version_proc_show(struct seq_file *m, void *v)
{
	seq_printf(m, "%s\n", THIS_MODULE->name);
	return 0;
}

#define SAY(kind) pr_info("%s: " #kind "_callback: %s\n", THIS_MODULE->name, obj->name ?: "vmlinux")
#define CALLBACKS(object, ret) \
	int object##_pre_patch(struct klp_object *obj) { SAY(pre_patch); return ret; } \
	void object##_post_patch(struct klp_object *obj) { SAY(post_patch); } \
	void object##_pre_unpatch(struct klp_object *obj) { SAY(pre_unpatch); } \
	void object##_post_unpatch(struct klp_object *obj) { SAY(post_unpatch); }
#ifdef RET_VMLINUX
CALLBACKS(vmlinux, RET_VMLINUX)
CALLBACKS(kd_base, RET_KD_BASE)
CALLBACKS(kd_late, RET_KD_LATE)
#endif
