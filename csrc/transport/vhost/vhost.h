/*
 * A vhost-user-blk device: one front-end of a volume. glidefs/transport/vhost_user speaks the protocol with it.
 *
 * vhost_device.c has its life, vhost_queue.c that of its queues and how they and the driver wake each other,
 * vhost_request.c its requests, vhost_ring.c the rings in the guest's memory, vhost_memory.c that memory.
 *
 * Everything in that memory is the guest's and may change at any time: each value is read once, then checked, then
 * used. What cannot be right ends the device (vhost_broken).
 *
 * The device's struct is its handle's, which frees it. What is in it belongs to the worker while it is in the volume
 * (`left` not set), but for the mappings: tables and record are made and freed by the controlling thread.
 */
#ifndef GLIDE_VHOST_H
#define GLIDE_VHOST_H

#include "loop/worker.h"
#include "transport/vhost/vhost_memory.h"
#include "volume/io.h"
#include "volume/transport.h"
#include "volume/volume.h"

#include <linux/virtio_ring.h>
#include <sys/uio.h>

#define VHOST_FEATURE(bit) (1ull << (bit))
#define VHOST_MAX_LENGTH (32u << 20)           /* data of a request */
#define VHOST_MEMORY (2ull * VHOST_MAX_LENGTH) /* of data that a device holds in memory of its own */
#define VHOST_MAX_PIECES 1088u                 /* of a request: its descriptors, and some that lie across two regions */
#define VHOST_KEPT_BUFFER (64u << 10)          /* a request keeps one as large for the next that uses its struct */

struct vhost_device;
struct vhost_req;
struct vhost_part;

/* One entry of the record. `logged`, in what the layout leaves as padding, is ours: the data of this WRITE is in the
 * write log, it only waits to be durable. */
struct vhost_entry {
    uint8_t inflight;
    uint8_t logged;
    uint8_t padding[4];
    uint16_t next;
    uint64_t counter;
};
struct vhost_record {
    uint64_t features;
    uint16_t version, depth, last_batch_head, used_index;
    struct vhost_entry entries[];
};

/* A split virtqueue (virtio 1.2, section 2.7), and the record of what is in flight in it (vhost-user, "Inflight I/O
 * tracking", split layout). */
struct vhost_ring {
    struct vhost_device *device;
    uint32_t index;
    bool started, enabled;
    bool draining;              /* only what was in flight at the start is begun still */
    struct glide_vhost_ring at; /* as it was started */
    uint32_t num;
    uint8_t *descriptors;
    uint16_t *available; /* flags, index, entries, used event */
    uint8_t *used;       /* flags, index, entries of 8 bytes, available event */
    struct vhost_record *record;
    uint16_t next_available, used_index;
    uint16_t signalled; /* used_index when the driver was last told */
    bool ever_signalled;
    bool news;                      /* since then something was answered */
    uint64_t counter;               /* of the next entry of the record */
    struct vhost_req **busy;        /* by the head of their descriptors */
    uint16_t *again;                /* heads that were in flight at the start, in order... */
    uint32_t again_count, again_at; /* ...those before again_at were begun */
    uint32_t count;                 /* of requests under way, held ones too */

    int kick, call; /* ours, or -1 */
    struct ring_op kick_op, call_op, cancel_op;
    bool polling; /* kick_op is armed */
    bool calling; /* call_op is under way */
    uint32_t cancels;
    bool call_again; /* when it has ended */
    int call_next;   /* descriptor to use from then on; -1 = the same, -2 = none */
    struct call *stopping;
};

/* The memory of a request: pieces that the device reads, then those that it writes. */
struct vhost_chain {
    struct iovec pieces[VHOST_MAX_PIECES];
    uint32_t out_count, count;
    uint64_t out_bytes, in_bytes;
};

/* A request of the driver. */
struct vhost_req {
    struct io_req io;
    struct list link; /* of the device's unused, or of its held ones */
    struct vhost_ring *ring;
    struct vhost_memory *memory; /* one reference */
    uint16_t head;
    uint8_t *status;  /* the guest's */
    uint32_t written; /* bytes of the guest's memory, if it goes well */
    uint8_t *buf;     /* owned, of capacity `size` */
    uint64_t size;
    uint64_t charged;         /* of VHOST_MEMORY */
    struct iovec *pieces;     /* a READ that is copied from buf to the guest: where to */
    struct vhost_part *parts; /* a DISCARD or WRITE_ZEROES: one for each range */
    uint32_t left;            /* of them */
    int err;
};

struct vhost_device {
    struct transport transport;
    struct volume *volume; /* until it has left */
    struct worker *worker;
    struct glide_vhost_config config;
    uint64_t features;
    bool writeback;
    struct vhost_memory *memory;
    struct list retired; /* memory tables that only requests use: freed when they do not any more */
    struct vhost_map record;
    uint64_t record_offset;
    uint32_t record_queues, record_depth;
    struct vhost_ring rings[GLIDE_VHOST_QUEUES];
    _Atomic bool torn;   /* of its memory something is gone */
    _Atomic bool broken; /* it serves no more, see trouble */
    char trouble[200];
    bool ended; /* the front-end is given up */
    _Atomic bool left;
    bool starved; /* the next request waits for memory */
    uint64_t charged;
    uint32_t inflight;        /* requests */
    struct list unused, held; /* of vhost_req; held: ended while the volume was frozen */
    struct task serve_task, end_task;
    struct list close_calls;
    struct vhost_chain chain;              /* of the request that is looked at */
    uint8_t table[GLIDE_VHOST_DEPTH * 16]; /* an indirect one */
};

/* ---- vhost_device.c, for the others ---- */
/* Serve no more, for this reason (printf style). Returns -EPROTO. */
int vhost_broken(struct vhost_device *d, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Look at its rings in the next round. */
void vhost_serve_later(struct vhost_device *d);
/* Tell the driver, and end what waits for it, at the end of this round. */
void vhost_end_later(struct vhost_device *d);
/* Give a reference up. */
void vhost_memory_drop(struct vhost_device *d, struct vhost_memory *m);
/* Run fn on the worker, while the device is in its volume; -ESHUTDOWN after that. */
int vhost_call(struct vhost_device *d, int (*fn)(struct worker *w, void *arg), void *arg);
/* ---- vhost_queue.c ---- */
void vhost_queues_init(struct vhost_device *d);
/* Begin what is there. */
void vhost_serve(struct vhost_device *d);
/* Tell the driver of what was answered. */
void vhost_tell(struct vhost_device *d);
/* Finish those calls that wait for a queue to stand still, and now may. */
void vhost_queues_check(struct vhost_device *d);
/* Nothing more is begun; what is armed is disarmed. */
void vhost_queues_end(struct vhost_device *d);
/* Nothing of them is under way. */
bool vhost_queues_idle(const struct vhost_device *d);
/* They are in another memory table now. */
void vhost_queues_map(struct vhost_device *d);
/* The device has left. */
void vhost_queues_free(struct vhost_device *d);
/* ---- vhost_request.c ---- */
/* Begin the request of this head. 0; -EAGAIN: there is no memory for it now; -EPROTO: the device has ended. */
int vhost_begin(struct vhost_ring *r, uint16_t head);
/* The volume goes on: answer what ended meanwhile. */
void vhost_answer_held(struct vhost_device *d);
/* It will not be answered here. */
void vhost_drop_held(struct vhost_device *d);
/* The volume is about to stand still: note in the record what is in the log. */
void vhost_note_logged(struct vhost_device *d);
void vhost_free_unused(struct vhost_device *d);
/* ---- vhost_ring.c ---- */
/* Find the ring in the memory table. -errno and glide_error(). */
int vhost_ring_map(struct vhost_ring *r);
/* Look at the record, which says what is in flight. r->again has room for all. -errno and glide_error(). */
int vhost_ring_recover(struct vhost_ring *r);

/* The head of the next request, which stays the next one until vhost_ring_take. False: there is none, or the device
 * has ended. */
bool vhost_ring_peek(struct vhost_ring *r, uint16_t *head);
/* It is begun. Returns whether it was `logged` when an earlier process left it. */
bool vhost_ring_take(struct vhost_ring *r, uint16_t head, struct vhost_req *req);
/* It is answered; `length` bytes of its memory were written. */
void vhost_ring_push(struct vhost_ring *r, uint16_t head, uint32_t length);
/* Ask the driver not to tell of new requests... */
void vhost_ring_quiet(struct vhost_ring *r);
/* ...or to do so. True: one came meanwhile. */
bool vhost_ring_listen(struct vhost_ring *r);
/* Whether the driver wants to hear of what was answered since it last did. */
bool vhost_ring_wants_call(struct vhost_ring *r);

/* Collect the memory of a request. -EPROTO: the device has ended. */
int vhost_chain_read(struct vhost_ring *r, uint16_t head, struct vhost_chain *c);
/* Copy from pieces, `skip` bytes of them left out, or to them; they have that many. */
void vhost_gather(const struct iovec *from, uint64_t skip, void *to, uint64_t length);
void vhost_scatter(const struct iovec *to, const void *from, uint64_t length);

#endif
