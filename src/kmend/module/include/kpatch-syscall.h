/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * System calls under the names of kpatch. The body of a SYSCALL_DEFINEn() is an
 * inline function, which makes it notrace; if GCC keeps it out of line all the
 * same, ftrace cannot redirect it. Here the kernel's own macro makes the entry
 * points, and its body only calls a new function with the patched text: so what
 * changes is an entry point, which ftrace knows.
 */
#ifndef __KPATCH_SYSCALL_H_
#define __KPATCH_SYSCALL_H_

#include <linux/syscalls.h>

#define KPATCH_SYSCALL_DEFINE1(name, ...) KPATCH_SYSCALL_DEFINEx(1, _##name, __VA_ARGS__)
#define KPATCH_SYSCALL_DEFINE2(name, ...) KPATCH_SYSCALL_DEFINEx(2, _##name, __VA_ARGS__)
#define KPATCH_SYSCALL_DEFINE3(name, ...) KPATCH_SYSCALL_DEFINEx(3, _##name, __VA_ARGS__)
#define KPATCH_SYSCALL_DEFINE4(name, ...) KPATCH_SYSCALL_DEFINEx(4, _##name, __VA_ARGS__)
#define KPATCH_SYSCALL_DEFINE5(name, ...) KPATCH_SYSCALL_DEFINEx(5, _##name, __VA_ARGS__)
#define KPATCH_SYSCALL_DEFINE6(name, ...) KPATCH_SYSCALL_DEFINEx(6, _##name, __VA_ARGS__)

#define KPATCH_SYSCALL_DEFINEx(x, sname, ...)					\
	static long __kpatch_do_sys##sname(__MAP(x, __SC_DECL, __VA_ARGS__));	\
	SYSCALL_DEFINEx(x, sname, __VA_ARGS__)					\
	{									\
		return __kpatch_do_sys##sname(__MAP(x, __SC_ARGS, __VA_ARGS__));\
	}									\
	static long __kpatch_do_sys##sname(__MAP(x, __SC_DECL, __VA_ARGS__))

#endif /* __KPATCH_SYSCALL_H_ */
