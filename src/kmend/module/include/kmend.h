/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the source of a live patch can tell kmend beside its code. Include it in a
 * patched .c file (or in a file of `kmend module`): #include "kmend.h"
 *
 * Each macro stands at file scope. What they leave in the object file is read by
 * src/kmend/diff/declared.py and does not become a part of the module.
 */
#ifndef KMEND_H
#define KMEND_H

#include <linux/compiler.h>
#include <linux/livepatch.h>
#include <linux/types.h>

typedef int (*kmend_pre_patch_fn)(struct klp_object *obj);
typedef void (*kmend_callback_fn)(struct klp_object *obj);

/* A pointer in a section of ours; a function of another type does not compile. */
#define __KMEND_CALLBACK(kind, type, fn)				\
	static const type __kmend_##kind##_##fn __used			\
		__section(".kmend.callbacks." #kind) = fn

/*
 * Functions that the kernel calls for the object (vmlinux or the module) that
 * this file is linked into; one of each kind for an object. They may sleep.
 *
 * KMEND_PRE_PATCH(fn): int fn(struct klp_object *obj), before its functions are
 *   replaced. Anything but 0 stops the load: the patch is refused with that
 *   errno. When the object is a module that comes later, that module is refused.
 * KMEND_POST_PATCH(fn): void fn(struct klp_object *obj), when all tasks run the
 *   new code.
 * KMEND_PRE_UNPATCH(fn): before the way back begins.
 * KMEND_POST_UNPATCH(fn): when no task runs the new code any more.
 *
 * What pre-patch sets up, post-unpatch takes down; what post-patch sets up,
 * pre-unpatch takes down (Documentation/livepatch/callbacks.rst).
 */
#define KMEND_PRE_PATCH(fn)	__KMEND_CALLBACK(pre_patch, kmend_pre_patch_fn, fn)
#define KMEND_POST_PATCH(fn)	__KMEND_CALLBACK(post_patch, kmend_callback_fn, fn)
#define KMEND_PRE_UNPATCH(fn)	__KMEND_CALLBACK(pre_unpatch, kmend_callback_fn, fn)
#define KMEND_POST_UNPATCH(fn)	__KMEND_CALLBACK(post_unpatch, kmend_callback_fn, fn)

/*
 * KMEND_STATE(id, version): the patch changes the system state of that number
 * (struct klp_state, Documentation/livepatch/system-state.rst). Both are integer
 * constants; id is not 0, and one word, a number or a macro's name.
 *
 * Callbacks ask for it with klp_get_state(&kmend_patch, id), and for that of the
 * patch which is being replaced with klp_get_prev_state(id).
 */
struct kmend_state {
	u64 id;
	u64 version;
};

#define KMEND_STATE(number, revision)					\
	static const struct kmend_state __kmend_state_##number __used	\
		__section(".kmend.states") = { .id = (number), .version = (revision) }

/* The module's own struct klp_patch. */
extern struct klp_patch kmend_patch;

/*
 * KMEND_IGNORE_FUNCTION(fn): the function stays as it is in the running kernel,
 * although it comes out differently. KMEND_IGNORE_SECTION("name"): the same for
 * the data of a section. The author answers for both; the build warns.
 */
#define KMEND_IGNORE_FUNCTION(fn)					\
	static const void * const __kmend_ignore_##fn __used		\
		__section(".kmend.ignore.functions") = (const void *)fn

#define KMEND_IGNORE_SECTION(name)					\
	asm(".pushsection .kmend.ignore.sections, \"a\"\n\t"		\
	    ".asciz \"" name "\"\n\t"					\
	    ".popsection")

#endif /* KMEND_H */
