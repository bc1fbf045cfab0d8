// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Puts many kinds of system calls to sleep, each in a process of its own, and tells how each one ended.
 *
 *	sleepers FOLDER SECONDS [NAME...]	(all kinds but those with a star; or those that are named)
 *
 * Writes FOLDER/asleep (a line "NAME PID" for each) when all of them sleep. Then it waits for FOLDER/release,
 * lets each call end in the way that it is meant for, and writes FOLDER/results, a line for each:
 *
 *	NAME RETURN ERRNO MILLISECONDS TIMEOUT EARLY
 *
 * MILLISECONDS is how long the call took; TIMEOUT the timeout that it was given, in milliseconds, 0 for none;
 * EARLY is 1 when it had ended before it was released (for one with a timeout: before its time).
 * Calls with a timeout (SECONDS) are not released. They are waited for; with FOLDER/hurry those that still
 * sleep are told as "asleep" in the place of RETURN.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <mqueue.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/sendfile.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MANY 200000

struct slot {
	const struct kind *kind;
	pid_t pid, other;
	int a, b, c;		/* descriptors, or identifiers of System V */
	uint32_t word[2];	/* futexes */
	volatile int64_t began, ended;	/* monotonic clock, ns; 0: not yet */
	volatile long ret;
	volatile int err;
	int released;
};

struct kind {
	const char *name;
	void (*prepare)(struct slot *s);	/* in the parent */
	long (*wait)(struct slot *s);		/* in the child: it sleeps here */
	void (*release)(struct slot *s);	/* in the parent; NULL: the timeout ends it */
	int apart;				/* only when it is named */
};

static const char *folder;
static long seconds;
static char big[MANY];

static void die(const char *what)
{
	fprintf(stderr, "sleepers: %s: %s\n", what, strerror(errno));
	_exit(1);
}

/* what must not fail while things are prepared */
#define MUST(call) ({ __typeof__(call) r_ = (call); if (r_ == (__typeof__(call))-1) die(#call); r_; })

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static struct timespec span(void)
{
	return (struct timespec){ .tv_sec = seconds };
}

static struct timespec later(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	t.tv_sec += seconds;
	return t;
}

static const char *path(struct slot *s)
{
	static char text[256];

	snprintf(text, sizeof(text), "%s/%s", folder, s->kind->name);
	return text;
}

static void nothing(int signal)
{
	(void)signal;
}

static void no_preparation(struct slot *s)
{
	(void)s;
}

static void send_usr1(struct slot *s)
{
	kill(s->pid, SIGUSR1);
}

/* -- pipes, which many calls wait for ------------------------------------------------------------- */

static void with_pipe(struct slot *s)
{
	int fds[2];

	MUST(pipe2(fds, O_CLOEXEC));
	s->a = fds[0];
	s->b = fds[1];
}

static void fill(int fd)
{
	int flags = fcntl(fd, F_GETFL);

	fcntl(fd, F_SETFL, flags | O_NONBLOCK);
	while (write(fd, big, 4096) > 0 || write(fd, big, 1) > 0)
		;
	fcntl(fd, F_SETFL, flags);
}

/* Reads until the sleeper, which writes, has come to its end. */
static void drain_a(struct slot *s)
{
	int flags = fcntl(s->a, F_GETFL);
	int64_t end = now() + 5000000000LL;
	struct timespec t = { .tv_nsec = 5000000 };

	fcntl(s->a, F_SETFL, flags | O_NONBLOCK);
	while (now() < end && !s->ended)
		if (read(s->a, big, sizeof(big)) <= 0)
			nanosleep(&t, NULL);
	fcntl(s->a, F_SETFL, flags);
}

static void with_full_pipe(struct slot *s)
{
	with_pipe(s);
	fill(s->b);
}

static void write_byte(struct slot *s)
{
	MUST(write(s->b, "x", 1));
}

static long pipe_read(struct slot *s) { return read(s->a, big, 10); }
static long pipe_readv(struct slot *s)
{
	struct iovec v = { big, 10 };

	return readv(s->a, &v, 1);
}
static long pipe_write(struct slot *s) { return write(s->b, big, 1); }
static long pipe_write_part(struct slot *s) { return write(s->b, big, 100000); }

static long poll_forever(struct slot *s)
{
	struct pollfd p = { .fd = s->a, .events = POLLIN };

	return syscall(SYS_poll, &p, 1, -1);
}
static long poll_timeout(struct slot *s)
{
	struct pollfd p = { .fd = s->a, .events = POLLIN };

	return syscall(SYS_poll, &p, 1, seconds * 1000);
}
static long ppoll_forever(struct slot *s)
{
	struct pollfd p = { .fd = s->a, .events = POLLIN };
	sigset_t none;

	sigemptyset(&none);
	return syscall(SYS_ppoll, &p, 1, NULL, &none, 8);
}
static long ppoll_timeout(struct slot *s)
{
	struct pollfd p = { .fd = s->a, .events = POLLIN };
	struct timespec t = span();

	return syscall(SYS_ppoll, &p, 1, &t, NULL, 8);
}
static long select_forever(struct slot *s)
{
	fd_set set;

	FD_ZERO(&set);
	FD_SET(s->a, &set);
	return syscall(SYS_select, s->a + 1, &set, NULL, NULL, NULL);
}
static long select_timeout(struct slot *s)
{
	struct timeval t = { .tv_sec = seconds };
	fd_set set;

	FD_ZERO(&set);
	FD_SET(s->a, &set);
	return syscall(SYS_select, s->a + 1, &set, NULL, NULL, &t);
}
static long pselect_timeout(struct slot *s)
{
	struct timespec t = span();
	fd_set set;

	FD_ZERO(&set);
	FD_SET(s->a, &set);
	return syscall(SYS_pselect6, s->a + 1, &set, NULL, NULL, &t, NULL);
}

static int epoll_on(int fd)
{
	struct epoll_event e = { .events = EPOLLIN };
	int ep = MUST(epoll_create1(0));

	MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
	return ep;
}
static long epoll_wait_forever(struct slot *s)
{
	struct epoll_event e;

	return syscall(SYS_epoll_wait, epoll_on(s->a), &e, 1, -1);
}
static long epoll_wait_timeout(struct slot *s)
{
	struct epoll_event e;

	return syscall(SYS_epoll_wait, epoll_on(s->a), &e, 1, seconds * 1000);
}
static long epoll_pwait_forever(struct slot *s)
{
	struct epoll_event e;
	sigset_t none;

	sigemptyset(&none);
	return syscall(SYS_epoll_pwait, epoll_on(s->a), &e, 1, -1, &none, 8);
}
static long epoll_pwait2_timeout(struct slot *s)
{
	struct timespec t = span();
	struct epoll_event e;

	return syscall(SYS_epoll_pwait2, epoll_on(s->a), &e, 1, &t, NULL, 8);
}

static void with_two_pipes(struct slot *s)
{
	int fds[2];

	with_pipe(s);
	MUST(pipe2(fds, O_CLOEXEC));
	s->c = fds[1];
}
static long splice_wait(struct slot *s) { return splice(s->a, NULL, s->c, NULL, 100, 0); }
static long tee_wait(struct slot *s) { return tee(s->a, s->c, 100, 0); }
static long vmsplice_wait(struct slot *s)
{
	struct iovec v = { big, 100 };

	return vmsplice(s->b, &v, 1, 0);
}
static long sendfile_wait(struct slot *s)
{
	int fd = open("/proc/self/exe", O_RDONLY);

	return sendfile(s->b, fd, NULL, 100);
}

/* -- time ----------------------------------------------------------------------------------------- */

static long nanosleep_wait(struct slot *s)
{
	struct timespec t = span();

	(void)s;
	return syscall(SYS_nanosleep, &t, NULL);
}
static long clock_nanosleep_wait(struct slot *s)
{
	struct timespec t = span();

	(void)s;
	return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &t, NULL);
}
static long clock_nanosleep_abs(struct slot *s)
{
	struct timespec t = later(CLOCK_REALTIME);

	(void)s;
	return syscall(SYS_clock_nanosleep, CLOCK_REALTIME, TIMER_ABSTIME, &t, NULL);
}
static long timerfd_read(struct slot *s)
{
	struct itimerspec t = { .it_value = span() };
	uint64_t n;
	int fd = timerfd_create(CLOCK_MONOTONIC, 0);

	(void)s;
	timerfd_settime(fd, 0, &t, NULL);
	return read(fd, &n, sizeof(n));
}

/* -- futexes -------------------------------------------------------------------------------------- */

static long futex(uint32_t *word, int op, uint32_t value, void *t, uint32_t value3)
{
	return syscall(SYS_futex, word, op, value, t, NULL, value3);
}
static long futex_forever(struct slot *s) { return futex(s->word, FUTEX_WAIT, 0, NULL, 0); }
static long futex_timeout(struct slot *s)
{
	struct timespec t = span();

	return futex(s->word, FUTEX_WAIT, 0, &t, 0);
}
static long futex_bitset_timeout(struct slot *s)
{
	struct timespec t = later(CLOCK_MONOTONIC);

	return futex(s->word, FUTEX_WAIT_BITSET, 0, &t, FUTEX_BITSET_MATCH_ANY);
}
static long waitv(struct slot *s, struct timespec *t)
{
	struct futex_waitv v[2] = {
		{ .uaddr = (uintptr_t)&s->word[0], .flags = FUTEX_32 },
		{ .uaddr = (uintptr_t)&s->word[1], .flags = FUTEX_32 },
	};

	return syscall(SYS_futex_waitv, v, 2, 0, t, CLOCK_MONOTONIC);
}
static long futex_waitv_forever(struct slot *s) { return waitv(s, NULL); }
static long futex_waitv_timeout(struct slot *s)
{
	struct timespec t = later(CLOCK_MONOTONIC);

	return waitv(s, &t);
}
static void futex_wake(struct slot *s)
{
	futex(s->word, FUTEX_WAKE, 1, NULL, 0);
}
static void with_pi_lock(struct slot *s) { MUST(futex(s->word, FUTEX_LOCK_PI, 0, NULL, 0)); }
static long futex_lock_pi(struct slot *s) { return futex(s->word, FUTEX_LOCK_PI, 0, NULL, 0); }
static void pi_unlock(struct slot *s) { futex(s->word, FUTEX_UNLOCK_PI, 0, NULL, 0); }

/* -- sockets -------------------------------------------------------------------------------------- */

static void pair(struct slot *s, int type)
{
	int fds[2];

	MUST(socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, fds));
	s->a = fds[0];
	s->b = fds[1];
}
static void small(int fd, int which)
{
	int size = 8192;

	MUST(setsockopt(fd, SOL_SOCKET, which, &size, sizeof(size)));
}
static void unix_stream(struct slot *s)
{
	pair(s, SOCK_STREAM);
	small(s->b, SO_SNDBUF);
}
static void unix_datagram(struct slot *s) { pair(s, SOCK_DGRAM); }
static void limit(int fd, int which)
{
	struct timeval t = { .tv_sec = seconds };

	MUST(setsockopt(fd, SOL_SOCKET, which, &t, sizeof(t)));
}
static long sock_recv(struct slot *s) { return recv(s->a, big, 10, 0); }
static long sock_read(struct slot *s) { return read(s->a, big, 10); }
static long sock_recv_timeout(struct slot *s)
{
	limit(s->a, SO_RCVTIMEO);
	return recv(s->a, big, 10, 0);
}
static long sock_recvmsg(struct slot *s)
{
	struct iovec v = { big, 10 };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1 };

	return recvmsg(s->a, &m, 0);
}
static long sock_recvmmsg(struct slot *s)
{
	struct iovec v = { big, 10 };
	struct mmsghdr m = { .msg_hdr = { .msg_iov = &v, .msg_iovlen = 1 } };

	return recvmmsg(s->a, &m, 1, 0, NULL);
}
static void full_stream(struct slot *s)
{
	unix_stream(s);
	fill(s->b);
}
static void full_datagram(struct slot *s)
{
	unix_datagram(s);
	fill(s->b);
}
static long sock_send(struct slot *s) { return send(s->b, big, 4096, 0); }
static long sock_send_part(struct slot *s) { return send(s->b, big, MANY, 0); }
static long sock_send_timeout(struct slot *s)
{
	limit(s->b, SO_SNDTIMEO);
	return send(s->b, big, 4096, 0);
}

static struct sockaddr_in local(int port)
{
	return (struct sockaddr_in){
		.sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
}
static struct sockaddr_in bound(int fd)
{
	struct sockaddr_in where = local(0);
	socklen_t size = sizeof(where);

	MUST(bind(fd, (struct sockaddr *)&where, sizeof(where)));
	MUST(getsockname(fd, (struct sockaddr *)&where, &size));
	return where;
}
static void tcp_listening(struct slot *s)
{
	s->a = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	bound(s->a);
	MUST(listen(s->a, 5));
}
static long sock_accept(struct slot *s) { return accept4(s->a, NULL, NULL, SOCK_CLOEXEC) < 0 ? -1 : 0; }
static long sock_accept_timeout(struct slot *s)
{
	limit(s->a, SO_RCVTIMEO);
	return accept4(s->a, NULL, NULL, SOCK_CLOEXEC);
}
static void tcp_connect_to(struct slot *s)
{
	struct sockaddr_in where;
	socklen_t size = sizeof(where);

	s->b = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	MUST(getsockname(s->a, (struct sockaddr *)&where, &size));
	MUST(connect(s->b, (struct sockaddr *)&where, size));
}
static void tcp_pair(struct slot *s)
{
	int fd;

	tcp_listening(s);
	tcp_connect_to(s);
	fd = MUST(accept4(s->a, NULL, NULL, SOCK_CLOEXEC));
	close(s->a);
	s->a = fd;
}
static void full_tcp(struct slot *s)
{
	struct timespec t = { .tv_nsec = 50000000 };
	int at;

	tcp_pair(s);
	small(s->b, SO_SNDBUF);
	/* what was acknowledged meanwhile makes room again */
	for (at = 0; at < 4; at++) {
		fill(s->b);
		nanosleep(&t, NULL);
	}
}
static void udp(struct slot *s)
{
	struct sockaddr_in where;

	s->a = MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	s->b = MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	where = bound(s->a);
	MUST(connect(s->b, (struct sockaddr *)&where, sizeof(where)));
}
static struct sockaddr_un named(struct slot *s)
{
	struct sockaddr_un where = { .sun_family = AF_UNIX };

	snprintf(where.sun_path, sizeof(where.sun_path), "%s", path(s));
	return where;
}
static void unix_listening(struct slot *s)
{
	struct sockaddr_un where = named(s);

	s->a = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	MUST(bind(s->a, (struct sockaddr *)&where, sizeof(where)));
	MUST(listen(s->a, 0));
}
static long unix_connect(struct slot *s)
{
	struct sockaddr_un where = named(s);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	return connect(fd, (struct sockaddr *)&where, sizeof(where));
}
static void connect_release(struct slot *s)
{
	struct sockaddr_un where = named(s);

	s->b = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	MUST(connect(s->b, (struct sockaddr *)&where, sizeof(where)));
}
static void unix_full_backlog(struct slot *s)
{
	unix_listening(s);
	connect_release(s);
}
static void accept_one(struct slot *s) { MUST(accept4(s->a, NULL, NULL, SOCK_CLOEXEC)); }

/* -- System V and POSIX queues -------------------------------------------------------------------- */

struct message {
	long type;
	char text[1024];
};

static void with_queue(struct slot *s) { s->a = MUST(msgget(IPC_PRIVATE, 0600)); }
static void with_full_queue(struct slot *s)
{
	struct message m = { .type = 1 };

	with_queue(s);
	while (msgsnd(s->a, &m, sizeof(m.text), IPC_NOWAIT) == 0)
		;
}
static long msgrcv_wait(struct slot *s)
{
	struct message m;

	return msgrcv(s->a, &m, sizeof(m.text), 0, 0);
}
static long msgsnd_wait(struct slot *s)
{
	struct message m = { .type = 1 };

	return msgsnd(s->a, &m, sizeof(m.text), 0);
}
static void msg_put(struct slot *s)
{
	struct message m = { .type = 1 };

	MUST(msgsnd(s->a, &m, 10, 0));
}
static void msg_take(struct slot *s)
{
	struct message m;

	MUST(msgrcv(s->a, &m, sizeof(m.text), 0, 0));
}
static void with_semaphore(struct slot *s) { s->a = MUST(semget(IPC_PRIVATE, 1, 0600)); }
static long semop_wait(struct slot *s)
{
	struct sembuf op = { .sem_op = -1 };

	return syscall(SYS_semop, s->a, &op, 1);
}
static long semtimedop_wait(struct slot *s)
{
	struct sembuf op = { .sem_op = -1 };
	struct timespec t = span();

	return syscall(SYS_semtimedop, s->a, &op, 1, &t);
}
static void sem_up(struct slot *s)
{
	struct sembuf op = { .sem_op = 1 };

	MUST(semop(s->a, &op, 1));
}

static void with_mq(struct slot *s)
{
	struct mq_attr attr = { .mq_maxmsg = 1, .mq_msgsize = 16 };
	char name[64];

	snprintf(name, sizeof(name), "/%s-%d", s->kind->name, getpid());
	s->a = MUST(mq_open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600, &attr));
	mq_unlink(name);
}
static void with_full_mq(struct slot *s)
{
	with_mq(s);
	MUST(mq_send(s->a, "x", 1, 0));
}
static long mq_receive_wait(struct slot *s) { return syscall(SYS_mq_timedreceive, s->a, big, 16, NULL, NULL); }
static long mq_timedreceive_wait(struct slot *s)
{
	struct timespec t = later(CLOCK_REALTIME);

	return syscall(SYS_mq_timedreceive, s->a, big, 16, NULL, &t);
}
static long mq_send_wait(struct slot *s) { return syscall(SYS_mq_timedsend, s->a, "y", 1, 0, NULL); }
static long mq_timedsend_wait(struct slot *s)
{
	struct timespec t = later(CLOCK_REALTIME);

	return syscall(SYS_mq_timedsend, s->a, "y", 1, 0, &t);
}
static void mq_put(struct slot *s) { MUST(mq_send(s->a, "x", 1, 0)); }
static void mq_take(struct slot *s) { MUST(mq_receive(s->a, big, 16, NULL)); }

/* -- children ------------------------------------------------------------------------------------- */

static void child_of_child(struct slot *s)
{
	pid_t pid = fork();

	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		/* it may not sleep in what is patched: a stopped one sleeps nowhere */
		raise(SIGSTOP);
		_exit(0);
	}
	s->other = pid;
}
static long wait4_wait(struct slot *s)
{
	child_of_child(s);
	return syscall(SYS_wait4, s->other, NULL, 0, NULL) == s->other ? 0 : -1;
}
static long waitid_wait(struct slot *s)
{
	siginfo_t info;

	child_of_child(s);
	return syscall(SYS_waitid, P_PID, s->other, &info, WEXITED, NULL);
}
static long waitid_pidfd(struct slot *s)
{
	siginfo_t info;

	child_of_child(s);
	return syscall(SYS_waitid, 3 /* P_PIDFD */, syscall(SYS_pidfd_open, s->other, 0), &info, WEXITED, NULL);
}
static void kill_other(struct slot *s) { kill(s->other, SIGKILL); }

/* -- locks ---------------------------------------------------------------------------------------- */

static void with_file(struct slot *s) { s->a = MUST(open(path(s), O_RDWR | O_CREAT | O_CLOEXEC, 0600)); }
static void with_flock(struct slot *s)
{
	with_file(s);
	MUST(flock(s->a, LOCK_EX));
}
static long flock_wait(struct slot *s) { return flock(open(path(s), O_RDWR), LOCK_EX); }
static void flock_release(struct slot *s) { flock(s->a, LOCK_UN); }
static int record(int fd, int command, int type)
{
	struct flock lock = { .l_type = type, .l_len = 10 };

	return fcntl(fd, command, &lock);
}
static void with_posix_lock(struct slot *s)
{
	with_file(s);
	MUST(record(s->a, F_SETLK, F_WRLCK));
}
static long posix_lock_wait(struct slot *s) { return record(open(path(s), O_RDWR), F_SETLKW, F_WRLCK); }
static void posix_lock_release(struct slot *s) { record(s->a, F_SETLK, F_UNLCK); }
static void with_ofd_lock(struct slot *s)
{
	with_file(s);
	MUST(record(s->a, F_OFD_SETLK, F_WRLCK));
}
static long ofd_lock_wait(struct slot *s) { return record(open(path(s), O_RDWR), F_OFD_SETLKW, F_WRLCK); }
static void ofd_lock_release(struct slot *s) { record(s->a, F_OFD_SETLK, F_UNLCK); }
static void with_lease(struct slot *s)
{
	with_file(s);
	signal(SIGIO, SIG_IGN);
	MUST(fcntl(s->a, F_SETLEASE, F_WRLCK));
}
static long lease_wait(struct slot *s)
{
	close(s->a);
	/* who only wants to read looks each jiffy: a downgrade has no fl_break_time (__break_lease(), fs/locks.c) */
	return open(path(s), O_WRONLY) < 0 ? -1 : 0;
}
static void lease_release(struct slot *s) { fcntl(s->a, F_SETLEASE, F_UNLCK); }

/* -- signals -------------------------------------------------------------------------------------- */

static void blocked(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGUSR1);
	sigprocmask(SIG_BLOCK, set, NULL);
}
static long sigwait_forever(struct slot *s)
{
	sigset_t set;

	(void)s;
	blocked(&set);
	return syscall(SYS_rt_sigtimedwait, &set, NULL, NULL, 8);
}
static long sigtimedwait_wait(struct slot *s)
{
	struct timespec t = span();
	sigset_t set;

	(void)s;
	blocked(&set);
	return syscall(SYS_rt_sigtimedwait, &set, NULL, &t, 8);
}
static long sigsuspend_wait(struct slot *s)
{
	sigset_t set;

	(void)s;
	blocked(&set);
	sigemptyset(&set);
	return syscall(SYS_rt_sigsuspend, &set, 8);
}
static long pause_wait(struct slot *s)
{
	(void)s;
	return syscall(SYS_pause);
}
static long signalfd_read(struct slot *s)
{
	struct signalfd_siginfo info;
	sigset_t set;

	(void)s;
	blocked(&set);
	return read(signalfd(-1, &set, 0), &info, sizeof(info));
}

/* -- asynchronous I/O ------------------------------------------------------------------------------ */

static void with_eventfd(struct slot *s)
{
	s->a = MUST(eventfd(0, EFD_CLOEXEC));
	s->b = s->a;
}
static long eventfd_read_wait(struct slot *s)
{
	uint64_t n;

	return read(s->a, &n, sizeof(n));
}
static void event(struct slot *s)
{
	uint64_t one = 1;

	MUST(write(s->b, &one, sizeof(one)));
}
static aio_context_t aio(struct slot *s)
{
	static struct iocb block;
	struct iocb *rows = &block;
	aio_context_t context = 0;

	MUST(syscall(SYS_io_setup, 1, &context));
	block.aio_lio_opcode = 5; /* IOCB_CMD_POLL */
	block.aio_fildes = s->a;
	block.aio_buf = POLLIN;
	MUST(syscall(SYS_io_submit, context, 1, &rows));
	return context;
}
static long io_getevents_forever(struct slot *s)
{
	struct io_event e;

	return syscall(SYS_io_getevents, aio(s), 1, 1, &e, NULL);
}
static long io_getevents_timeout(struct slot *s)
{
	struct timespec t = span();
	struct io_event e;

	return syscall(SYS_io_getevents, aio(s), 1, 1, &e, &t);
}
static long io_pgetevents_forever(struct slot *s)
{
	struct { const sigset_t *set; size_t size; } mask;
	struct io_event e;
	sigset_t none;

	sigemptyset(&none);
	mask.set = &none;
	mask.size = 8;
	return syscall(SYS_io_pgetevents, aio(s), 1, 1, &e, NULL, &mask);
}

struct ring {
	int fd;
	unsigned *tail, *mask, *array;
	struct io_uring_sqe *sqes;
};
static struct ring uring(void)
{
	struct io_uring_params p = { 0 };
	struct ring r;
	char *sq;

	r.fd = MUST((int)syscall(SYS_io_uring_setup, 4, &p));
	sq = mmap(NULL, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
		  r.fd, IORING_OFF_SQ_RING);
	r.sqes = mmap(NULL, p.sq_entries * sizeof(*r.sqes), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_POPULATE, r.fd, IORING_OFF_SQES);
	if (sq == MAP_FAILED || r.sqes == MAP_FAILED)
		die("io_uring");
	r.tail = (unsigned *)(sq + p.sq_off.tail);
	r.mask = (unsigned *)(sq + p.sq_off.ring_mask);
	r.array = (unsigned *)(sq + p.sq_off.array);
	return r;
}
/* A read of the eventfd is in flight; whether it has been submitted is the caller's choice. */
static struct ring uring_with_read(struct slot *s, int submit)
{
	static uint64_t value;
	struct ring r = uring();
	unsigned at = *r.tail & *r.mask;

	memset(&r.sqes[at], 0, sizeof(r.sqes[at]));
	r.sqes[at].opcode = IORING_OP_READ;
	r.sqes[at].fd = s->a;
	r.sqes[at].addr = (uintptr_t)&value;
	r.sqes[at].len = sizeof(value);
	r.array[at] = at;
	__atomic_store_n(r.tail, *r.tail + 1, __ATOMIC_RELEASE);
	if (submit)
		MUST(syscall(SYS_io_uring_enter, r.fd, 1, 0, 0, NULL, 0));
	return r;
}
static long uring_wait(struct slot *s)
{
	return syscall(SYS_io_uring_enter, uring_with_read(s, 1).fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0);
}
static long uring_wait_mask(struct slot *s)
{
	sigset_t none;

	sigemptyset(&none);
	return syscall(SYS_io_uring_enter, uring_with_read(s, 1).fd, 0, 1, IORING_ENTER_GETEVENTS, &none, 8);
}
static long uring_submit_and_wait(struct slot *s)
{
	return syscall(SYS_io_uring_enter, uring_with_read(s, 0).fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0);
}
static long uring_timeout(struct slot *s)
{
	struct timespec t = span();
	struct io_uring_getevents_arg arg = { .ts = (uintptr_t)&t };

	return syscall(SYS_io_uring_enter, uring_with_read(s, 1).fd, 0, 1,
		       IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &arg, sizeof(arg));
}

/* -- files that tell of events --------------------------------------------------------------------- */

static void with_inotify(struct slot *s)
{
	close(MUST(open(path(s), O_WRONLY | O_CREAT | O_CLOEXEC, 0600)));
	s->a = MUST(inotify_init1(IN_CLOEXEC));
	MUST(inotify_add_watch(s->a, path(s), IN_OPEN));
}
static long event_read(struct slot *s) { return read(s->a, big, 4096) > 0 ? 0 : -1; }
static void open_it(struct slot *s)
{
	int fd = MUST(open(path(s), O_RDONLY | O_CLOEXEC));

	close(fd);
}
static void with_fanotify(struct slot *s)
{
	close(MUST(open(path(s), O_WRONLY | O_CREAT | O_CLOEXEC, 0600)));
	s->a = MUST(fanotify_init(FAN_CLASS_NOTIF | FAN_CLOEXEC, O_RDONLY));
	MUST(fanotify_mark(s->a, FAN_MARK_ADD, FAN_OPEN, AT_FDCWD, path(s)));
}
static void with_terminal(struct slot *s)
{
	s->b = MUST(posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
	MUST(grantpt(s->b));
	MUST(unlockpt(s->b));
	s->a = MUST(open(ptsname(s->b), O_RDWR | O_NOCTTY | O_CLOEXEC));
}
static long terminal_read(struct slot *s) { return read(s->a, big, 10); }
static void type_line(struct slot *s) { MUST(write(s->b, "x\n", 2)); }
static void with_fifo(struct slot *s) { MUST(mkfifo(path(s), 0600)); }
static long fifo_open_read(struct slot *s) { return open(path(s), O_RDONLY) < 0 ? -1 : 0; }
static long fifo_open_write(struct slot *s) { return open(path(s), O_WRONLY) < 0 ? -1 : 0; }
static void fifo_release(struct slot *s) { s->a = MUST(open(path(s), O_RDWR | O_CLOEXEC)); }
static void *fault_page;
static int touch(void *unused)
{
	(void)unused;
	syscall(SYS_kill, syscall(SYS_getpid), SIGSTOP);
	*(volatile char *)fault_page = 1;
	return 0;
}
static long userfaultfd_read(struct slot *s)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct uffd_msg message;
	int err;
	long ret;
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	pid_t pid;

	(void)s;
	fault_page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	range.range.start = (uintptr_t)fault_page;
	range.range.len = 4096;
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range))
		die("userfaultfd");
	/* of this address space: it faults when it is let go on, and is killed with us */
	pid = clone(touch, big + sizeof(big) - 1024, CLONE_VM | SIGCHLD, NULL);
	s->other = pid;
	ret = read(fd, &message, sizeof(message));
	err = errno;

	kill(pid, SIGKILL);
	errno = err;
	return ret;
}
static void continue_other(struct slot *s) { kill(s->other, SIGCONT); }

static const struct kind kinds[] = {
	{ "nanosleep", no_preparation, nanosleep_wait },
	{ "clock_nanosleep", no_preparation, clock_nanosleep_wait },
	{ "clock_nanosleep-abs", no_preparation, clock_nanosleep_abs },
	{ "poll", with_pipe, poll_forever, write_byte },
	{ "poll-timeout", with_pipe, poll_timeout },
	{ "ppoll", with_pipe, ppoll_forever, write_byte },
	{ "ppoll-timeout", with_pipe, ppoll_timeout },
	{ "select", with_pipe, select_forever, write_byte },
	{ "select-timeout", with_pipe, select_timeout },
	{ "pselect-timeout", with_pipe, pselect_timeout },
	{ "epoll_wait", with_pipe, epoll_wait_forever, write_byte },
	{ "epoll_wait-timeout", with_pipe, epoll_wait_timeout },
	{ "epoll_pwait", with_pipe, epoll_pwait_forever, write_byte },
	{ "epoll_pwait2-timeout", with_pipe, epoll_pwait2_timeout },
	{ "futex", no_preparation, futex_forever, futex_wake },
	{ "futex-timeout", no_preparation, futex_timeout },
	{ "futex-bitset-timeout", no_preparation, futex_bitset_timeout },
	{ "futex_waitv", no_preparation, futex_waitv_forever, futex_wake },
	{ "futex_waitv-timeout", no_preparation, futex_waitv_timeout },
	{ "futex-lock-pi", with_pi_lock, futex_lock_pi, pi_unlock },
	{ "pipe-read", with_pipe, pipe_read, write_byte },
	{ "pipe-readv", with_pipe, pipe_readv, write_byte },
	{ "pipe-write", with_full_pipe, pipe_write, drain_a },
	{ "pipe-write-part", with_pipe, pipe_write_part, drain_a },
	{ "splice", with_two_pipes, splice_wait, write_byte },
	{ "tee", with_two_pipes, tee_wait, write_byte },
	{ "vmsplice", with_full_pipe, vmsplice_wait, drain_a },
	{ "sendfile", with_full_pipe, sendfile_wait, drain_a },
	{ "timerfd-read", no_preparation, timerfd_read },
	{ "unix-recv", unix_stream, sock_recv, write_byte },
	{ "unix-read", unix_stream, sock_read, write_byte },
	{ "unix-recv-timeout", unix_stream, sock_recv_timeout },
	{ "unix-recvmsg", unix_datagram, sock_recvmsg, write_byte },
	{ "unix-recvmmsg", unix_datagram, sock_recvmmsg, write_byte },
	{ "unix-send", full_stream, sock_send, drain_a },
	{ "unix-send-part", unix_stream, sock_send_part, drain_a },
	{ "unix-send-timeout", full_stream, sock_send_timeout },
	{ "unix-send-datagram", full_datagram, sock_send, drain_a },
	{ "unix-accept", unix_listening, sock_accept, connect_release },
	{ "unix-connect", unix_full_backlog, unix_connect, accept_one },
	{ "tcp-recv", tcp_pair, sock_recv, write_byte },
	{ "tcp-recv-timeout", tcp_pair, sock_recv_timeout },
	{ "tcp-send", full_tcp, sock_send, drain_a },
	{ "tcp-accept", tcp_listening, sock_accept, tcp_connect_to },
	{ "tcp-accept-timeout", tcp_listening, sock_accept_timeout },
	{ "udp-recv", udp, sock_recv, write_byte },
	{ "udp-recv-timeout", udp, sock_recv_timeout },
	{ "msgrcv", with_queue, msgrcv_wait, msg_put },
	{ "msgsnd", with_full_queue, msgsnd_wait, msg_take },
	{ "semop", with_semaphore, semop_wait, sem_up },
	{ "semtimedop", with_semaphore, semtimedop_wait },
	{ "mq_receive", with_mq, mq_receive_wait, mq_put },
	{ "mq_timedreceive", with_mq, mq_timedreceive_wait },
	{ "mq_send", with_full_mq, mq_send_wait, mq_take },
	{ "mq_timedsend", with_full_mq, mq_timedsend_wait },
	{ "wait4", no_preparation, wait4_wait, kill_other },
	{ "waitid", no_preparation, waitid_wait, kill_other },
	{ "waitid-pidfd", no_preparation, waitid_pidfd, kill_other },
	{ "flock", with_flock, flock_wait, flock_release },
	{ "fcntl-setlkw", with_posix_lock, posix_lock_wait, posix_lock_release },
	{ "fcntl-ofd-setlkw", with_ofd_lock, ofd_lock_wait, ofd_lock_release },
	{ "open-lease", with_lease, lease_wait, lease_release },
	{ "sigwaitinfo", no_preparation, sigwait_forever, send_usr1 },
	{ "sigtimedwait", no_preparation, sigtimedwait_wait },
	{ "sigsuspend", no_preparation, sigsuspend_wait, send_usr1 },
	{ "pause", no_preparation, pause_wait, send_usr1 },
	{ "signalfd-read", no_preparation, signalfd_read, send_usr1 },
	{ "eventfd-read", with_eventfd, eventfd_read_wait, event },
	{ "io_getevents", with_eventfd, io_getevents_forever, event },
	{ "io_getevents-timeout", with_eventfd, io_getevents_timeout },
	{ "io_pgetevents", with_eventfd, io_pgetevents_forever, event },
	{ "inotify-read", with_inotify, event_read, open_it },
	{ "fanotify-read", with_fanotify, event_read, open_it },
	{ "terminal-read", with_terminal, terminal_read, type_line },
	{ "fifo-open-read", with_fifo, fifo_open_read, fifo_release },
	{ "fifo-open-write", with_fifo, fifo_open_write, fifo_release },
	{ "userfaultfd-read", no_preparation, userfaultfd_read, continue_other },
	{ "io_uring", with_eventfd, uring_wait, event, 1 },
	{ "io_uring-mask", with_eventfd, uring_wait_mask, event, 1 },
	{ "io_uring-submit", with_eventfd, uring_submit_and_wait, event, 1 },
	{ "io_uring-timeout", with_eventfd, uring_timeout, NULL, 1 },
};
#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

static int wanted(const struct kind *kind, char **names)
{
	if (!*names)
		return !kind->apart;
	for (; *names; names++)
		if (strcmp(*names, kind->name) == 0)
			return 1;
	return 0;
}

static char state_of(pid_t pid)
{
	char text[512], *end;
	int fd;
	ssize_t n;

	snprintf(text, sizeof(text), "/proc/%d/stat", pid);
	fd = open(text, O_RDONLY | O_CLOEXEC);
	n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n <= 0)
		return 'X';
	text[n] = 0;
	end = strrchr(text, ')');
	return end ? end[2] : 'X';
}

static void loopback_up(void)
{
	struct ifreq request = { .ifr_name = "lo" };
	int fd = MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));

	request.ifr_flags = IFF_UP | IFF_RUNNING;
	MUST(ioctl(fd, SIOCSIFFLAGS, &request));
	close(fd);
}

static void begin(struct slot *s)
{
	pid_t pid;

	s->kind->prepare(s);
	pid = MUST(fork());
	if (pid) {
		s->pid = pid; /* the slot is shared: the child must not write here */
		return;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	prctl(PR_SET_NAME, s->kind->name);
	signal(SIGUSR1, nothing);
	s->began = now();
	errno = 0;
	s->ret = s->kind->wait(s);
	s->err = s->ret < 0 ? errno : 0;
	s->ended = now();
	_exit(0);
}

static void rest(long milliseconds)
{
	struct timespec t = { .tv_sec = milliseconds / 1000, .tv_nsec = milliseconds % 1000 * 1000000 };

	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

/* A file that is there completely or not at all. */
static FILE *created(const char *name)
{
	char text[256];

	snprintf(text, sizeof(text), "%s/%s.new", folder, name);
	return fopen(text, "we");
}
static void finished(FILE *file, const char *name)
{
	char from[256], to[256];

	snprintf(from, sizeof(from), "%s/%s.new", folder, name);
	snprintf(to, sizeof(to), "%s/%s", folder, name);
	if (fclose(file) || rename(from, to))
		die(to);
}

int main(int argc, char **argv)
{
	struct slot *slots, *s;
	int64_t end;
	int hurry, asleep;
	size_t at;
	char text[256];
	FILE *file;

	if (argc < 3)
		return 2;
	folder = argv[1];
	seconds = atol(argv[2]);
	signal(SIGPIPE, SIG_IGN);
	loopback_up();
	slots = mmap(NULL, KINDS * sizeof(*slots), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (at = 0; at < KINDS; at++) {
		if (!wanted(&kinds[at], argv + 3))
			continue;
		slots[at].kind = &kinds[at];
		slots[at].a = slots[at].b = slots[at].c = -1;
		begin(&slots[at]);
	}
	for (at = 0; at < KINDS; at++) {
		s = &slots[at];
		end = now() + 20000000000LL;
		/* asleep twice in a row: it is not on the way in */
		for (asleep = 0; s->kind && !s->ended && now() < end; rest(10)) {
			asleep = s->began && state_of(s->pid) == 'S' ? asleep + 1 : 0;
			if (asleep == 2)
				break;
		}
		if (s->kind && (s->ended || asleep < 2)) {
			fprintf(stderr, "sleepers: %s does not sleep: state %c, %s %ld, %s\n", s->kind->name,
				state_of(s->pid), s->ended ? "returned" : "not returned", s->ret, strerror(s->err));
			return 1;
		}
	}
	file = created("asleep");
	for (s = slots; s < slots + KINDS; s++)
		if (s->kind)
			fprintf(file, "%s %d\n", s->kind->name, s->pid);
	finished(file, "asleep");

	snprintf(text, sizeof(text), "%s/release", folder);
	while (access(text, F_OK))
		rest(50);
	for (s = slots; s < slots + KINDS; s++) {
		if (!s->kind || !s->kind->release)
			continue;
		/* one that ended by itself may have closed what releasing would wait for */
		s->released = !s->ended;
		if (s->released)
			s->kind->release(s);
	}
	snprintf(text, sizeof(text), "%s/hurry", folder);
	hurry = !access(text, F_OK);
	end = now() + (2 * seconds + 20) * 1000000000LL;
	for (s = slots; s < slots + KINDS; s++)
		while (s->kind && !s->ended && now() < end && !(hurry && !s->kind->release) &&
		       state_of(s->pid) != 'Z')
			rest(10);
	file = created("results");
	for (s = slots; s < slots + KINDS; s++) {
		if (!s->kind)
			continue;
		long took = s->ended ? (s->ended - s->began) / 1000000 : -1;
		long timeout = s->kind->release ? 0 : seconds * 1000;

		if (!s->ended)
			fprintf(file, "%s %s 0 -1 %ld 0\n", s->kind->name,
				hurry && timeout ? "asleep" : "never", timeout);
		else
			fprintf(file, "%s %ld %d %ld %ld %d\n", s->kind->name, s->ret, s->err, took, timeout,
				timeout ? took < timeout : !s->released);
	}
	finished(file, "results");
	for (s = slots; s < slots + KINDS; s++) {
		if (!s->kind)
			continue;
		kill(s->pid, SIGKILL);
		if (s->other)
			kill(s->other, SIGKILL);
		if (strncmp(s->kind->name, "msg", 3) == 0)
			msgctl(s->a, IPC_RMID, NULL);
		if (strncmp(s->kind->name, "sem", 3) == 0)
			semctl(s->a, 0, IPC_RMID);
	}
	return 0;
}
