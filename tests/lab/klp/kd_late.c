// SPDX-License-Identifier: GPL-2.0-or-later
/* A module that may be loaded before or after its patches. */
#include "kd.h"

KD_FUNCTION(kd_m)
KD_FUNCTION(kd_n)

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
