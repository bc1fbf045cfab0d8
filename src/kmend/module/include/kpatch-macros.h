/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The names that patches written for kpatch use, on top of kmend's own: such a
 * patch builds unchanged. New patches include "kmend.h".
 */
#ifndef __KPATCH_MACROS_H_
#define __KPATCH_MACROS_H_

#include <linux/jiffies.h>
#include <linux/printk.h>
#include <linux/static_call.h>
#include <linux/version.h>
#include "kmend.h"
#include "kpatch-syscall.h"

/* kpatch gives callbacks this type; on a kernel with livepatch it is klp_object. */
typedef struct klp_object patch_object;

/* kpatch's end with their own semicolon, and patches rely on it. */
#define KPATCH_PRE_PATCH_CALLBACK(fn)		KMEND_PRE_PATCH(fn);
#define KPATCH_POST_PATCH_CALLBACK(fn)		KMEND_POST_PATCH(fn);
#define KPATCH_PRE_UNPATCH_CALLBACK(fn)		KMEND_PRE_UNPATCH(fn);
#define KPATCH_POST_UNPATCH_CALLBACK(fn)	KMEND_POST_UNPATCH(fn);

#define KPATCH_IGNORE_SECTION(name)		KMEND_IGNORE_SECTION(name);
#define KPATCH_IGNORE_FUNCTION(fn)		KMEND_IGNORE_FUNCTION(fn);

/*
 * Made kpatch's own core module skip its look at the stacks. The kernel's
 * livepatch core switches task by task and has nothing of the kind, so this only
 * makes the build warn.
 */
#define KPATCH_FORCE_UNSAFE(fn)						\
	static const void * const __kmend_force_##fn __used		\
		__section(".kmend.force") = (const void *)fn;

/*
 * printk() is a cold function: GCC moves the code around a call of it out of line,
 * and with it perhaps code of other functions. Behind a condition of which GCC
 * knows nothing only the call itself is cold.
 */
#define KPATCH_PRINTK(fmt, ...)						\
({									\
	if (jiffies)							\
		printk(fmt, ## __VA_ARGS__);				\
})

#define KPATCH_PRINTK_DEFERRED(fmt, ...)				\
({									\
	if (jiffies)							\
		printk_deferred(fmt, ## __VA_ARGS__);			\
})

/* A static call as an ordinary call through the pointer in its key. */
#define KPATCH_STATIC_CALL(name)					\
	((typeof(STATIC_CALL_TRAMP(name)) *)(STATIC_CALL_KEY(name).func))

#endif /* __KPATCH_MACROS_H_ */
