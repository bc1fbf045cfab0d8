// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What every module that kmend makes has in common. Compiled once for each target
 * with the flags of a loadable module of that kernel; src/kmend/module/assemble.py
 * joins it to the patched functions and fills in the name and the descriptors.
 *
 * The numbers in .kmend.layout tell Python how this kernel lays out the structures;
 * src/kmend/module/layout.py reads them in this order.
 */
#define INCLUDE_VERMAGIC
#include <linux/build_bug.h>
#include <linux/bug.h>
#include <linux/elf.h>
#include <linux/jump_label.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/static_call.h>
#include <linux/stddef.h>
#include <linux/string.h>
#include <linux/vermagic.h>
#include <asm/alternative.h>
#include <asm/extable.h>
#include <asm/orc_types.h>
#include <asm/text-patching.h>

#ifndef KMEND_OWN_INIT
extern struct klp_patch kmend_patch;

static int __init kmend_init(void)
{
	return klp_enable_patch(&kmend_patch);
}

static void __exit kmend_exit(void)
{
}

module_init(kmend_init);
module_exit(kmend_exit);
#endif

#ifdef KMEND_FORGET
/*
 * Before Linux 6.3 the livepatch core leaves what it relocated in us for a module as it
 * is when that module goes; and when the module comes again, the loader refuses to
 * relocate fields that are not zero, and with them the module: it could not be loaded
 * again while the patch is. (0c05e7bd2d01 "livepatch,x86: Clear relocation targets on a
 * module removal" mended it.) So this post-unpatch callback of every such object puts
 * zeros there, when the module goes (or its load fails) and nothing runs the code.
 *
 * Not when the patch is disabled: the callback is called then too, with the module alive,
 * and after a forced transition a task may still be asleep in our code and go on.
 *
 * The tables are written by src/kmend/module/output.py.
 */
struct kmend_spot {
	const char *object;
	void *where;
	unsigned long size;
};

struct kmend_after {
	const char *object;
	void (*callback)(struct klp_object *obj);
};

extern const struct kmend_spot kmend_spots[];
extern const struct kmend_after kmend_afters[];

void kmend_forget(struct klp_object *obj);
void kmend_forget(struct klp_object *obj)
{
	const struct kmend_after *after;
	const struct kmend_spot *spot;

	for (after = kmend_afters; after->callback; after++)
		if (!strcmp(after->object, obj->name))
			after->callback(obj);
	if (!obj->mod || obj->mod->state == MODULE_STATE_LIVE)
		return;
	for (spot = kmend_spots; spot->where; spot++)
		if (!strcmp(spot->object, obj->name))
			text_poke_set(spot->where, 0, spot->size);
}
#endif
MODULE_INFO(vermagic, VERMAGIC_STRING);
#ifdef CONFIG_RETPOLINE
MODULE_INFO(retpoline, "Y");
#elif defined(CONFIG_MITIGATION_RETPOLINE)
MODULE_INFO(retpoline, "Y");
#endif

__visible struct module __this_module __section(".gnu.linkonce.this_module") = {
	.name = KBUILD_MODNAME,
	.init = init_module,
#ifdef CONFIG_MODULE_UNLOAD
	.exit = cleanup_module,
#endif
	.arch = MODULE_ARCH_INIT,
};

static const u32 kmend_layout[] __used __section(".kmend.layout") = {
	sizeof(struct klp_patch),
	offsetof(struct klp_patch, mod),
	offsetof(struct klp_patch, objs),
	offsetof(struct klp_patch, replace),
	sizeof(struct klp_object),
	offsetof(struct klp_object, name),
	offsetof(struct klp_object, funcs),
	sizeof(struct klp_func),
	offsetof(struct klp_func, old_name),
	offsetof(struct klp_func, new_func),
	offsetof(struct klp_func, old_sympos),
	sizeof(struct module),
	offsetof(struct module, name),
	sizeof(((struct module *)0)->name),
	sizeof(struct modversion_info),
	offsetof(struct modversion_info, name),
	sizeof(struct exception_table_entry),
	sizeof(struct bug_entry),
	sizeof(struct alt_instr),
	sizeof(struct jump_entry),
	sizeof(struct static_call_site),
	sizeof(struct orc_entry),
	offsetof(struct klp_object, callbacks),
	offsetof(struct klp_callbacks, pre_patch),
	offsetof(struct klp_callbacks, post_patch),
	offsetof(struct klp_callbacks, pre_unpatch),
	offsetof(struct klp_callbacks, post_unpatch),
	offsetof(struct klp_patch, states),
	sizeof(struct klp_state),
	offsetof(struct klp_state, id),
	offsetof(struct klp_state, version),
};
