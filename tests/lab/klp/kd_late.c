// SPDX-License-Identifier: GPL-2.0-or-later
/* A module that may be loaded before or after its patches. */
#include "kd.h"

/* what patches of this module use: a livepatch symbol, as nothing exports it */
int kd_late_mark = KD_MARK;

KD_FUNCTION(kd_m, kd_door()->sleep)
KD_FUNCTION(kd_n, kd_door()->sleep)

static int __init start(void)
{
	kd_show(kd_m);
	kd_show(kd_n);
	return 0;
}

static void __exit end(void)
{
	kd_hide(kd_m);
	kd_hide(kd_n);
}
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
