/*
 * The third part of the boundary (see glide_core.h): the data path of vhost-user-blk. Python speaks the protocol with a
 * front-end and says what came of it; the core serves the rings. Calls for one device do not overlap, but for
 * glide_vhost_trouble, and glide_vhost_end while a glide_vhost_ring_stop waits.
 */

#define GLIDE_VHOST_QUEUES 16             /* of a device, at most */
#define GLIDE_VHOST_DEPTH 1024            /* of a queue, at most */
#define GLIDE_VHOST_REGIONS 128           /* of a memory table, at most */
#define GLIDE_VHOST_SEGMENTS 126          /* pieces of data of a request, as the configuration space says */
#define GLIDE_VHOST_ZERO_RANGES 16        /* of a DISCARD or WRITE_ZEROES, at most */
#define GLIDE_VHOST_ZERO_SECTORS 0x200000 /* of 512 bytes, of each of them */
#define GLIDE_VHOST_ID_BYTES 20

typedef struct vhost_device glide_vhost;

struct glide_vhost_config {
    uint64_t id;        /* names it in GLIDE_EV_VHOST_DOWN */
    uint8_t serial[20]; /* what GET_ID answers */
    uint32_t read_only;
};
/* A device of the volume without memory and rings. -ESHUTDOWN where the volume closes. */
int glide_vhost_open(glide_volume *volume, const struct glide_vhost_config *config, glide_vhost **out);
/* Nothing more begins: calls that wait return -ESHUTDOWN, and later ones at once. */
void glide_vhost_end(glide_vhost *device);
/* What waits is given up without an answer, what runs ends; then the device leaves the volume, if that has not been
 * closed before, and is freed. */
int glide_vhost_close(glide_vhost *device);

/* The features that the driver took, and whether writes may be cached until a flush. */
int glide_vhost_features(glide_vhost *device, uint64_t features, int writeback);

struct glide_vhost_region {
    uint64_t guest;  /* where the guest has it */
    uint64_t size;   /* bytes */
    uint64_t user;   /* where the front-end has it */
    uint64_t offset; /* in the file */
    int32_t fd;      /* stays the caller's; -1: a region with these numbers is there already, and stays */
};
/* The whole table of the guest's memory, instead of the one before. Rings that run go on in it. */
int glide_vhost_memory(glide_vhost *device, const struct glide_vhost_region *list, uint32_t count);

/* Bytes of the record of what is in flight, of a queue of so many entries. */
uint64_t glide_vhost_inflight_bytes(uint32_t depth);
/* Where that record is kept: `queues` of them in a file, from `offset` on. No ring runs. fd stays the caller's. */
int glide_vhost_inflight(glide_vhost *device, int fd, uint64_t offset, uint32_t queues, uint32_t depth);

struct glide_vhost_ring {
    uint64_t descriptors, available, used; /* addresses of the front-end */
    uint32_t num;                          /* entries, a power of 2 */
    uint32_t base; /* the entry of the available ring to begin with, if nothing is known to be in flight */
    int32_t kick;  /* eventfds, which stay the caller's; call: or -1 */
    int32_t call;
    uint32_t enabled;
};
/* Serve a ring: what is in flight in its record first. -EINVAL, -EFAULT: it, or its record, cannot be right. */
int glide_vhost_ring_start(glide_vhost *device, uint32_t index, const struct glide_vhost_ring *ring);
int glide_vhost_ring_call(glide_vhost *device, uint32_t index, int fd);
int glide_vhost_ring_enable(glide_vhost *device, uint32_t index, int enabled);
/* Begin nothing more of it. Returns the entry that comes next once all before it are answered; -EAGAIN: not all are,
 * and `wait` is 0; -ESHUTDOWN: the device ends. */
int glide_vhost_ring_stop(glide_vhost *device, uint32_t index, int wait);

/* Why the device stopped serving, in one line; empty: it has not. Returns its length. Never blocks. */
int glide_vhost_trouble(glide_vhost *device, char *out, uint32_t room);
