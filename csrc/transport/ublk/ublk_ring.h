/*
 * The io_urings that carry control commands of ublk: one command, one answer, within a time.
 */
#ifndef GLIDE_UBLK_RING_H
#define GLIDE_UBLK_RING_H

#include "transport/ublk/ublk_uapi.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How long a cancelled command may take to come back. */
#define UBLK_CANCEL_GRACE_MS 2000

struct ublk_ring;

struct ublk_rings {
    int fd; /* /dev/ublk-control */
    pthread_mutex_t lock;
    struct ublk_ring *idle, *stuck;
};

struct ublk_command {
    uint32_t op;
    uint32_t dev_id;
    uint64_t data;
    void *buf; /* payload, copied in and, if it is `out`, back */
    size_t len;
    bool out;
    unsigned timeout_ms;
};

/* -errno of opening the device, or of io_uring_setup. */
int ublk_rings_open(struct ublk_rings *rings);
/* No call may be under way. */
void ublk_rings_close(struct ublk_rings *rings);

/*
 * Send a command once and wait until `deadline` (on now_ms()). Returns the driver's answer; -ETIMEDOUT: there is
 * none, and its thread still works on the command. *cancelled: an -EINTR comes from our own cancel, not from a
 * signal.
 */
int ublk_rings_run(struct ublk_rings *rings, const struct ublk_command *c, int64_t deadline, bool *cancelled);

#endif
