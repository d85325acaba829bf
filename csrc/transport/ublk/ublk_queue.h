/*
 * The queue of a ublk device, on the worker of its volume. ublk_device.c makes
 * and unmakes devices from control threads.
 *
 * A device has one hardware queue: its volume lives on one worker, so more would only add hand-overs. Every tag is a
 * slot that is either armed (a command is pending in the kernel), busy (we have its request), or gone (-ENODEV).
 */
#ifndef GLIDE_UBLK_QUEUE_H
#define GLIDE_UBLK_QUEUE_H

#include "volume/io.h"
#include "volume/transport.h"
#include "transport/ublk/ublk_uapi.h"
#include "loop/worker.h"

struct ublk_device;

struct ublk_tag {
    struct ring_op op;
    struct io_req io;
    struct ublk_device *device;
    uint16_t tag;
    bool held;    /* its request came while the volume was frozen */
    uint8_t *buf; /* of its request */
};

struct ublk_device {
    struct transport transport;
    struct volume *volume;
    struct worker *worker;
    struct ublk_dev_info info; /* as the kernel granted it */
    int cdev;                  /* /dev/ublkcN */
    const struct ublk_io_desc *descriptors;
    size_t descriptor_bytes;
    struct ublk_tag *tags; /* info.queue_depth of them */
    uint32_t busy, gone;
    bool releasing;           /* new requests are left to the next server */
    bool left_behind;         /* its worker ended first; what is left of it is the handle */
    bool dropping;            /* so are those that fail: nobody saw an answer to them */
    bool refusing;            /* every request fails: the device is to end, and what they need does not come */
    struct call *waiting;     /* stop or release: until gone == depth, or busy == 0 */
    struct leftover leftover; /* slots are bound to the worker's thread: open until that has ended */
};

/* ---- worker ---- */
/* Arm every tag. */
void ublk_queue_start(struct ublk_device *d);
/* Begin what came while the volume was frozen. */
void ublk_queue_unfreeze(struct transport *t);
/* Leave what has no answer yet to the next server. */
void ublk_queue_let_go(struct transport *t);
bool ublk_queue_idle(const struct transport *t);
/* Finish the call when the device has what it waits for. */
void ublk_queue_check(struct ublk_device *d);

#endif
