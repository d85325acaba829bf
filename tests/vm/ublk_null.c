/*
 * A null block device on ublk: the smallest server that exercises csrc/transport/ublk/ublk_ctrl, and a yardstick for the driver.
 *
 * One queue, one worker thread with one DEFER_TASKRUN ring; the main thread only controls and waits for signals.
 * Data is not kept. What is read is a pattern: every 8 bytes hold their own byte offset on the disk; with --check
 * what is written must be that pattern as well, else -EIO. So data paths can be verified across a server's death
 * without any state. Without --check the bytes are moved (as a real target must) but not looked at.
 *
 *   ublk_null add N [--copy] [--check] [--bare] [--file PATH [--auto]] [--depth D] [--sectors S]
 *                           serve a new device until SIGTERM; --file: reads are answered from there, --auto: without
 *                           a copy of ours, by automatic buffer registration
 *   ublk_null recover N [--check]                                           serve one whose server is dead
 *   ublk_null features | info N | stop N | del N | resize N SECTORS | quiesce N
 *   ublk_null hang N        START_DEV without fetches must time out; exit 0 if it does
 *   ublk_null mute N        START_DEV of a server that fetches but does not answer; see cmd_mute
 *
 * A server prints "ready ..." once its device is up. SIGTERM stops and deletes the device; if the slots are retired by
 * somebody else (stop, quiesce) it closes the device, prints "released" and exits.
 *
 * cc -O2 -pthread -I csrc -o ublk_null tests/vm/ublk_null.c csrc/transport/ublk/ublk_ctrl.c -luring
 */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "pattern.h"
#include "transport/ublk/ublk_ctrl.h"

#define MAX_DEPTH 256u
#define MAX_BYTES (512u << 10)
#define START_MS 60000u

struct options {
	bool copy, check, bare, automatic;
	const char *file;
	unsigned depth;
	uint64_t sectors;
};

struct server {
	struct ublk_dev_info info;
	struct options opt;
	int fd, file;
	const struct ublk_io_desc *desc;
	size_t desc_bytes;
	unsigned char *bufs; /* one of MAX_BYTES per tag */
	pthread_t worker;
	int worker_error;
	atomic_bool muted;
};

static int complain(const char *what, int err)
{
	fprintf(stderr, "ublk_null: %s: %s (%d)\n", what, strerror(-err), err);
	return 1;
}

static unsigned char *buffer(const struct server *s, unsigned tag)
{
	return s->bufs + (size_t)tag * MAX_BYTES;
}

static bool user_copy(const struct server *s)
{
	return s->info.flags & UBLK_F_USER_COPY;
}

/* ---- one request ---- */

/* Moves all of a request's bytes between it and buf; ublkc transfers can be short. */
static int copy_data(const struct server *s, unsigned tag, unsigned char *buf, size_t len, bool to_request)
{
	for (size_t done = 0; done < len;) {
		off_t pos = (off_t)UBLK_USER_COPY_POS(0, tag, done);
		ssize_t n = to_request ? pwrite(s->fd, buf + done, len - done, pos)
				       : pread(s->fd, buf + done, len - done, pos);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		done += (size_t)n;
	}
	return 0;
}

static int serve_request(const struct server *s, unsigned tag)
{
	const struct ublk_io_desc *d = &s->desc[tag];
	size_t len = (size_t)d->nr_sectors << 9;
	uint64_t start = d->start_sector << 9;
	unsigned char *buf = buffer(s, tag);
	int err = 0;

	switch (UBLK_IO_OP(d)) {
	case UBLK_IO_OP_READ:
		if (s->opt.bare)
			return (int)len;
		if (s->opt.check)
			fill_pattern(buf, start, len);
		if (s->opt.file && pread(s->file, buf, len, (off_t)start) != (ssize_t)len)
			return -EIO;
		if (user_copy(s))
			err = copy_data(s, tag, buf, len, true);
		return err ? err : (int)len;
	case UBLK_IO_OP_WRITE:
		if (s->opt.bare)
			return (int)len;
		if (user_copy(s))
			err = copy_data(s, tag, buf, len, false);
		if (!err && s->opt.check && !is_pattern(buf, start, len))
			err = -EIO;
		return err ? err : (int)len;
	case UBLK_IO_OP_FLUSH:
	case UBLK_IO_OP_DISCARD:
	case UBLK_IO_OP_WRITE_ZEROES:
		return 0;
	default:
		return -EOPNOTSUPP;
	}
}

/* ---- worker ---- */

static void push(struct io_uring *ring, const struct server *s, unsigned tag, uint32_t op, int result)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
	struct ublk_io_cmd *cmd;

	assert(sqe);
	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->off = op;
	sqe->user_data = tag;
	cmd = (struct ublk_io_cmd *)sqe->cmd;
	cmd->tag = (uint16_t)tag;
	cmd->result = result;
	/* The same buffer in FETCH and COMMIT: the kernel takes READ data from the address in the COMMIT. */
	if (!user_copy(s))
		cmd->addr = (uint64_t)(uintptr_t)buffer(s, tag);
	if (s->opt.automatic)
		sqe->addr = UBLK_AUTO_BUF_REG_ADDR(tag, 0);
}

#define FILE_READ (1u << 31) /* in user_data */

/* A read goes from the file into the guest's pages, which the driver has registered under the tag. */
static void push_file_read(struct io_uring *ring, const struct server *s, unsigned tag)
{
	const struct ublk_io_desc *d = &s->desc[tag];
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);

	assert(sqe);
	io_uring_prep_read_fixed(sqe, 1, NULL, d->nr_sectors << 9, d->start_sector << 9, (int)tag);
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->user_data = tag | FILE_READ;
}

static void answer(struct io_uring *ring, const struct server *s, unsigned tag)
{
	if (s->opt.automatic && UBLK_IO_OP(&s->desc[tag]) == UBLK_IO_OP_READ)
		push_file_read(ring, s, tag);
	else
		push(ring, s, tag, UBLK_IO_COMMIT_AND_FETCH_REQ, serve_request(s, tag));
}

static int serve(struct server *s, struct io_uring *ring)
{
	unsigned retired = 0;

	for (unsigned tag = 0; tag < s->info.queue_depth; tag++)
		push(ring, s, tag, UBLK_IO_FETCH_REQ, 0);
	while (retired < s->info.queue_depth) {
		struct io_uring_cqe *cqe;
		unsigned head, n = 0;
		int err = io_uring_submit_and_wait(ring, 1);

		if (err < 0 && err != -EINTR)
			return err;
		io_uring_for_each_cqe(ring, head, cqe) {
			unsigned tag = (unsigned)cqe->user_data;

			n++;
			while (atomic_load(&s->muted))
				usleep(1000);
			if (tag & FILE_READ)
				push(ring, s, tag & ~FILE_READ, UBLK_IO_COMMIT_AND_FETCH_REQ, cqe->res);
			else if (cqe->res == UBLK_IO_RES_OK)
				answer(ring, s, tag);
			else if (cqe->res == -ENODEV)
				retired++;
			else
				return cqe->res;
		}
		io_uring_cq_advance(ring, n);
	}
	return 0;
}

static void *worker(void *arg)
{
	struct server *s = arg;
	struct io_uring_params p = {.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN};
	struct io_uring ring;
	int err;

	/* Best effort: keeps reclaim from waiting for the device that is served here. */
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
	err = io_uring_queue_init_params(MAX_DEPTH, &ring, &p);
	if (!err) {
		err = io_uring_register_files(&ring, (int[]){s->fd, s->file}, s->opt.file ? 2 : 1);
		if (!err && s->opt.automatic)
			err = io_uring_register_buffers_sparse(&ring, MAX_DEPTH);
		if (!err)
			err = serve(s, &ring);
		io_uring_unregister_files(&ring);
		io_uring_queue_exit(&ring);
	}
	s->worker_error = err;
	kill(getpid(), SIGUSR1);
	return NULL;
}

/* ---- main thread ---- */

static int server_open(struct server *s)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	void *p;

	if (s->info.queue_depth > MAX_DEPTH || s->info.nr_hw_queues != 1)
		return -EINVAL;
	p = mmap(NULL, (size_t)s->info.queue_depth * MAX_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		 -1, 0);
	if (p == MAP_FAILED)
		return -errno;
	s->bufs = p;
	s->file = s->opt.file ? open(s->opt.file, O_RDONLY) : -1;
	if (s->opt.file && s->file < 0)
		return -errno;
	s->fd = ublk_open_char(s->info.dev_id);
	if (s->fd < 0)
		return s->fd;
	s->desc_bytes = ublk_desc_bytes(s->info.queue_depth, page);
	p = mmap(NULL, s->desc_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, s->fd, (off_t)ublk_desc_offset(0, page));
	if (p == MAP_FAILED)
		return -errno;
	s->desc = p;
	return -pthread_create(&s->worker, NULL, worker, s);
}

static void server_close(struct server *s)
{
	pthread_join(s->worker, NULL);
	munmap((void *)(uintptr_t)s->desc, s->desc_bytes);
	close(s->fd);
	if (s->worker_error)
		complain("worker", s->worker_error);
}

/* Serves until SIGTERM, or until somebody else has retired all slots. */
static int server_run(struct ublk_ctrl *ctrl, struct server *s)
{
	uint32_t id = s->info.dev_id;
	sigset_t set;
	int sig, err;

	printf("ready id=%u pid=%d depth=%u flags=0x%llx mode=%s\n", id, getpid(), s->info.queue_depth,
	       (unsigned long long)s->info.flags, user_copy(s) ? "user-copy" : "copy");
	fflush(stdout);
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGUSR1);
	sigwait(&set, &sig);
	if (sig == SIGUSR1) {
		server_close(s);
		printf("released\n");
		return s->worker_error ? 1 : 0;
	}
	err = ublk_ctrl_stop(ctrl, id, 0);
	if (err)
		return complain("stop", err);
	server_close(s);
	err = ublk_ctrl_del(ctrl, id, 0);
	if (err)
		return complain("del", err);
	printf("deleted\n");
	return s->worker_error ? 1 : 0;
}

static int device_add(struct ublk_ctrl *ctrl, struct server *s, uint32_t id)
{
	uint64_t features = 0;
	struct ublk_params p = {
		.types = UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_DISCARD,
		.basic = {.attrs = UBLK_ATTR_VOLATILE_CACHE | UBLK_ATTR_FUA, .logical_bs_shift = 12,
			  .physical_bs_shift = 12, .io_opt_shift = 17, .io_min_shift = 12,
			  .max_sectors = MAX_BYTES >> 9, .dev_sectors = s->opt.sectors},
		.discard = {.discard_granularity = 4096, .max_discard_sectors = 1u << 20,
			    .max_write_zeroes_sectors = 1u << 20, .max_discard_segments = 1},
	};
	int err = ublk_ctrl_features(ctrl, &features);

	if (err)
		return err;
	s->info = (struct ublk_dev_info){.nr_hw_queues = 1, .queue_depth = (uint16_t)s->opt.depth, .dev_id = id,
					 .max_io_buf_bytes = MAX_BYTES, .ublksrv_flags = 0x676c696465};
	s->info.flags = UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE | (features & UBLK_F_QUIESCE);
	if (!s->opt.copy)
		s->info.flags |= features & UBLK_F_USER_COPY;
	if (s->opt.automatic)
		s->info.flags |= UBLK_F_AUTO_BUF_REG;
	err = ublk_ctrl_add(ctrl, &s->info);
	if (err)
		return err;
	err = ublk_ctrl_set_params(ctrl, s->info.dev_id, &p);
	if (err)
		ublk_ctrl_del(ctrl, s->info.dev_id, 0);
	return err;
}

static int cmd_add(struct ublk_ctrl *ctrl, struct server *s, uint32_t id)
{
	int err = device_add(ctrl, s, id);

	if (err)
		return complain("add", err);
	err = server_open(s);
	if (!err)
		err = ublk_ctrl_start(ctrl, s->info.dev_id, getpid(), START_MS);
	if (err) {
		complain("start", err);
		ublk_ctrl_del_async(ctrl, s->info.dev_id);
		return 1;
	}
	return server_run(ctrl, s);
}

static int cmd_recover(struct ublk_ctrl *ctrl, struct server *s, uint32_t id)
{
	int err = ublk_ctrl_get_info(ctrl, id, &s->info);

	if (!err)
		err = ublk_ctrl_start_recovery(ctrl, id, START_MS);
	if (err)
		return complain("start_recovery", err);
	err = server_open(s);
	if (!err)
		err = ublk_ctrl_end_recovery(ctrl, id, getpid(), START_MS);
	if (err)
		return complain("end_recovery", err);
	return server_run(ctrl, s);
}

static int cmd_info(struct ublk_ctrl *ctrl, uint32_t id)
{
	struct ublk_dev_info info;
	struct ublk_params params;
	int err = ublk_ctrl_get_info(ctrl, id, &info);

	if (!err)
		err = ublk_ctrl_get_params(ctrl, id, &params);
	if (err)
		return complain("info", err);
	printf("state=%u pid=%d depth=%u queues=%u flags=0x%llx opaque=0x%llx sectors=%llu disk=%u:%u\n", info.state,
	       info.ublksrv_pid, info.queue_depth, info.nr_hw_queues, (unsigned long long)info.flags,
	       (unsigned long long)info.ublksrv_flags, (unsigned long long)params.basic.dev_sectors,
	       params.devt.disk_major, params.devt.disk_minor);
	return 0;
}

/* START_DEV waits for fetches that never come: it must end by its timeout, and the handle must stay usable. */
static int cmd_hang(struct ublk_ctrl *ctrl, struct server *s, uint32_t id)
{
	int err = device_add(ctrl, s, id), del;

	if (err)
		return complain("add", err);
	err = ublk_ctrl_start(ctrl, s->info.dev_id, getpid(), 500);
	ublk_ctrl_stop(ctrl, s->info.dev_id, 0);
	del = ublk_ctrl_del(ctrl, s->info.dev_id, 0);
	printf("start=%d del=%d\n", err, del);
	return err == -ETIMEDOUT && del == 0 ? 0 : 1;
}

/*
 * Up to 6.12 START_DEV reads the partition table itself, uninterruptibly: with a mute server it can be neither waited
 * for nor cancelled. The call must give up all the same, the handle must go on working, and the memory of the
 * abandoned command must stay sound until the kernel is done with it. Later kernels scan elsewhere: start=0.
 */
static int cmd_mute(struct ublk_ctrl *ctrl, struct server *s, uint32_t id)
{
	uint64_t features;
	int err = device_add(ctrl, s, id), start, feat, stop, del;

	if (err)
		return complain("add", err);
	atomic_store(&s->muted, true);
	err = server_open(s);
	if (err)
		return complain("open", err);
	start = ublk_ctrl_start(ctrl, s->info.dev_id, getpid(), 500);
	feat = ublk_ctrl_features(ctrl, &features);
	atomic_store(&s->muted, false);
	stop = ublk_ctrl_stop(ctrl, s->info.dev_id, 0);
	server_close(s);
	del = ublk_ctrl_del(ctrl, s->info.dev_id, 0);
	printf("start=%d features=%d stop=%d del=%d\n", start, feat, stop, del);
	return (start == 0 || start == -ETIMEDOUT) && !feat && !stop && !del ? 0 : 1;
}

static int run(struct ublk_ctrl *ctrl, struct server *s, const char *verb, uint32_t id, const char *arg)
{
	uint64_t features;
	int err = -EINVAL;

	if (!strcmp(verb, "add"))
		return cmd_add(ctrl, s, id);
	if (!strcmp(verb, "recover"))
		return cmd_recover(ctrl, s, id);
	if (!strcmp(verb, "info"))
		return cmd_info(ctrl, id);
	if (!strcmp(verb, "hang"))
		return cmd_hang(ctrl, s, id);
	if (!strcmp(verb, "mute"))
		return cmd_mute(ctrl, s, id);
	if (!strcmp(verb, "features")) {
		err = ublk_ctrl_features(ctrl, &features);
		if (!err)
			printf("0x%llx\n", (unsigned long long)features);
	} else if (!strcmp(verb, "stop")) {
		err = ublk_ctrl_stop(ctrl, id, 0);
	} else if (!strcmp(verb, "del")) {
		err = ublk_ctrl_del(ctrl, id, 0);
	} else if (!strcmp(verb, "resize") && arg) {
		err = ublk_ctrl_update_size(ctrl, id, strtoull(arg, NULL, 0));
	} else if (!strcmp(verb, "quiesce")) {
		err = ublk_ctrl_quiesce(ctrl, id, 0);
	}
	return err ? complain(verb, err) : 0;
}

static bool *flag_of(struct options *o, const char *word)
{
	return !strcmp(word, "--copy")    ? &o->copy
	       : !strcmp(word, "--check") ? &o->check
	       : !strcmp(word, "--bare")  ? &o->bare
	       : !strcmp(word, "--auto")  ? &o->automatic
					  : NULL;
}

int main(int argc, char **argv)
{
	static struct server s = {.opt = {.depth = 64, .sectors = 2 << 20}};
	struct ublk_ctrl *ctrl;
	const char *arg = NULL;
	uint32_t id = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 0) : UBLK_DEV_ID_ANY;
	sigset_t set;
	int err;

	for (int i = 3; i < argc; i++) {
		bool *on = flag_of(&s.opt, argv[i]);

		if (on)
			*on = true;
		else if (!strcmp(argv[i], "--file") && i + 1 < argc)
			s.opt.file = argv[++i];
		else if (!strcmp(argv[i], "--depth") && i + 1 < argc)
			s.opt.depth = (unsigned)strtoul(argv[++i], NULL, 0);
		else if (!strcmp(argv[i], "--sectors") && i + 1 < argc)
			s.opt.sectors = strtoull(argv[++i], NULL, 0);
		else
			arg = argv[i];
	}
	if (argc < 2) {
		fprintf(stderr, "usage: ublk_null VERB [ID] [OPTIONS]\n");
		return 2;
	}
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	err = ublk_ctrl_open(&ctrl);
	if (err)
		return complain("/dev/ublk-control", err);
	err = run(ctrl, &s, argv[1], id, arg);
	ublk_ctrl_close(ctrl);
	return err;
}
