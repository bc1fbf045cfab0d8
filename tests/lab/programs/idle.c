// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Tasks that wait: idle vfork (a parent whose vfork child does not let go), idle threads N (N threads asleep),
 * idle sleep (asleep).
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static void *asleep(void *unused)
{
	struct timespec t = { .tv_sec = 100000 };

	nanosleep(&t, NULL);
	return unused;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "sleep";
	pthread_attr_t attributes;
	pthread_t thread;
	long number;

	prctl(PR_SET_NAME, mode);
	if (strcmp(mode, "vfork") == 0) {
		if (vfork() == 0) {
			/* pause() only: the parent's memory is in use */
			for (;;)
				pause();
		}
	} else if (strcmp(mode, "threads") == 0) {
		pthread_attr_init(&attributes);
		pthread_attr_setstacksize(&attributes, 16384);
		for (number = atol(argv[2]); number > 1; number--)
			if (pthread_create(&thread, &attributes, asleep, NULL)) {
				fprintf(stderr, "idle: %ld threads lack\n", number);
				return 1;
			}
		puts("ready");
		fflush(stdout);
		asleep(NULL);
	} else {
		asleep(NULL);
	}
	return 0;
}
