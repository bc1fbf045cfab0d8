/* SPDX-License-Identifier: GPL-2.0 */
#ifndef COUNT_H
#define COUNT_H

struct file;

/* A read of the file has come to its end. May sleep. */
void count_read(struct file *file);
/* The file is closed for good. */
void count_forget(struct file *file);

#endif
