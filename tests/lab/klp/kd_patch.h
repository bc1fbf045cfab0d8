/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A livepatch whose descriptors are made from its parameters: one module serves for every scenario. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt
#include "kd.h"
#include <linux/livepatch.h>

#define MOST 2
static char *vmlinux[MOST], *kd_base[MOST], *kd_late[MOST];
static unsigned int vmlinux_count, kd_base_count, kd_late_count;
module_param_array(vmlinux, charp, &vmlinux_count, 0);
module_param_array(kd_base, charp, &kd_base_count, 0);
module_param_array(kd_late, charp, &kd_late_count, 0);
static int replace, callbacks, state, version, ret_vmlinux, ret_kd_base, ret_kd_late;
module_param(replace, int, 0);
module_param(callbacks, int, 0);
module_param(state, int, 0);
module_param(version, int, 0);
module_param(ret_vmlinux, int, 0);
module_param(ret_kd_base, int, 0);
module_param(ret_kd_late, int, 0);

static int new_kd_f(int how, const char **version) KD_BODY
static int new_kd_g(int how, const char **version) KD_BODY
static int new_kd_m(int how, const char **version) KD_BODY
static int new_kd_n(int how, const char **version) KD_BODY
static int new_show(struct seq_file *m, void *v)
{
	seq_printf(m, "%s\n", THIS_MODULE->name);
	return 0;
}
static int new_show2(struct seq_file *m, void *v)
{
	seq_printf(m, "%s\n", THIS_MODULE->name);
	return 0;
}

static const struct { const char *name; void *code; } table[] = {
	{ "kd_f", new_kd_f }, { "kd_g", new_kd_g }, { "kd_m", new_kd_m }, { "kd_n", new_kd_n },
	{ "cmdline_proc_show", new_show }, { "version_proc_show", new_show2 },
};

static int pre_patch(struct klp_object *obj)
{
	pr_info("pre_patch_callback: %s\n", obj->name ?: "vmlinux");
	if (!obj->name)
		return ret_vmlinux;
	return strcmp(obj->name, "kd_base") ? ret_kd_late : ret_kd_base;
}
#define SAY(kind) static void kind(struct klp_object *obj) \
	{ pr_info(#kind "_callback: %s\n", obj->name ?: "vmlinux"); }
SAY(post_patch)
SAY(pre_unpatch)
SAY(post_unpatch)

static struct klp_func funcs[3][MOST + 1];
static struct klp_object objs[4];
static struct klp_state states[2];
static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs };

static int add(int at, const char *name, char **names, unsigned int count)
{
	int i, j;

	if (!count)
		return at;
	for (i = 0; i < count; i++)
		for (j = 0; j < ARRAY_SIZE(table); j++)
			if (!strcmp(names[i], table[j].name))
				funcs[at][i] = (struct klp_func){ .old_name = table[j].name, .new_func = table[j].code };
	objs[at].name = name;
	objs[at].funcs = funcs[at];
	if (callbacks)
		objs[at].callbacks = (struct klp_callbacks){ pre_patch, post_patch, pre_unpatch, post_unpatch };
	return at + 1;
}

static int __init start(void)
{
	int at = add(0, NULL, vmlinux, vmlinux_count);

	at = add(at, "kd_base", kd_base, kd_base_count);
	add(at, "kd_late", kd_late, kd_late_count);
	states[0] = (struct klp_state){ .id = state, .version = version };
	patch.states = states;
	patch.replace = replace;
	return klp_enable_patch(&patch);
}

static void __exit end(void)
{
}
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
