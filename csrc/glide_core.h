/*
 * The boundary between the C core and Python. The cffi definition (glidefs/core/build.py) reads this, glide_packs.h
 * and glide_vhost.h, so they hold plain declarations.
 *
 * Rules of the boundary:
 * - A function returns 0 (or a count) or -errno. glide_error() then tells, for
 *   the calling thread, what was wrong in one line; it may be empty.
 * - Every call may block unless it says "never blocks"; cffi releases the GIL
 *   around all of them. C never calls Python.
 * - Byte counts are in bytes, "sector" is 4 KiB, "block" is 128 KiB.
 * - A log position is (segment sequence number, record index).
 */

#define GLIDE_SECTOR 4096
#define GLIDE_BLOCK 131072
#define GLIDE_BLOCK_SECTORS 32
#define GLIDE_FULL_MASK 0xffffffffu /* all sectors of a block */
#define GLIDE_GROUP 1024            /* blocks of a chunk, and chunks of a manifest page */
#define GLIDE_PACK_HEADER 16
#define GLIDE_PACK_ENTRY 40
#define GLIDE_HIST_BUCKETS 64

typedef struct engine glide_engine;
typedef struct volume glide_volume;
typedef struct gather glide_gather;
typedef struct upload_plan glide_plan;
typedef struct ublk_device glide_ublk;

const char *glide_error(void);

/* ---- engine: one per process ------------------------------------------- */

struct glide_engine_config {
    uint32_t workers;             /* threads, each with one io_uring; 0 = min(CPUs, 32) */
    uint32_t segment_sectors;     /* data sectors of a log segment: 8 .. 2^24 - 1 */
    uint64_t log_limit;           /* bytes that all write logs together may allocate */
    uint64_t map_budget;          /* bytes of log maps and block maps */
    uint64_t cache_bytes;         /* bytes of the block cache's file, at least 8 blocks */
    const char *cache_dir;        /* holds blocks.data and blocks.index */
    uint32_t log_full_timeout_ms; /* 0 = writers wait for ever */
    uint32_t read_timeout_ms;     /* 0 = readers of absent blocks wait for ever */
    uint32_t busy_poll_us;        /* how long a worker whose last wait was short polls before it sleeps; 0 = never */
    uint32_t nbd_stall_ms;        /* how long an NBD client may take or send nothing that is due; 0 = for ever */
    uint64_t nbd_memory;          /* bytes of replies of all NBD connections, send buffers included; payloads of
                                   * writes get as much, and a quarter of it what was received behind them */
    uint32_t standby;             /* the block cache's files are another process's until glide_cache_take */
};

int glide_engine_open(const struct glide_engine_config *config, glide_engine **out);
/* Every thread in glide_faults_next and glide_events_next gets -ESHUTDOWN, now and later. */
void glide_engine_shutdown(glide_engine *engine);
/* The threads that are in glide_faults_next, glide_events_next and glide_shadow_next now return as after a timeout. */
void glide_engine_wake(glide_engine *engine);
/*
 * End the workers: the kernel then gives the ublk devices that they served to another server. Volumes that are open
 * are let go as they are: those that are frozen without a word to guests. From then on calls on them fail with
 * -ESHUTDOWN; their devices are still to be released and they to be closed, which only frees them. Other threads may
 * be in any call but those that start, end, open or close something.
 */
void glide_engine_end_workers(glide_engine *engine);
/* All volumes must be closed, and no other call be running. */
void glide_engine_close(glide_engine *engine);

struct glide_engine_stats {
    uint64_t log_bytes;       /* allocated by all logs */
    uint64_t log_spare_bytes; /* of that, by files that are kept for the next segments */
    uint64_t log_limit;
    uint64_t map_bytes;
    uint64_t map_budget;
    uint64_t cache_slots; /* capacity */
    uint64_t cache_used;
    uint64_t cache_hits; /* look-ups from Python that found the key */
    uint64_t cache_misses;
    uint64_t cache_evictions;
    uint64_t nbd_replies;   /* memory of NBD connections: replies and send buffers... */
    uint64_t nbd_payloads;  /* ...and what was received and has to wait */
    uint64_t cache_lost;    /* slots whose content the disk did not have */
    uint64_t cache_errno;   /* the cache's disk fails: nothing is cached; 0 = it works */
    uint64_t faults_queued; /* waiting in glide_faults_next's queue now */
    uint32_t workers;
};
/* Writers of all volumes together append so many bytes a second at most; 0 = as they come. Any thread. */
void glide_engine_pace(glide_engine *engine, uint64_t bytes_per_second);
/* The calling thread yields to those of lower niceness, and its turns are short where the kernel can. 0 or -errno. */
int glide_lower_priority(int nice);
/* Begin to write what is dirty of a file, and sync nothing: no flush of the disk, no error that a sync would tell. May
 * wait for a busy disk. 0 or -errno. */
int glide_write_out(int fd);
void glide_engine_stats_get(glide_engine *engine, struct glide_engine_stats *out); /* never blocks */

/* ---- faults and events: C asks, Python threads answer --------------------- */

/* A run of absent blocks that requests wait for. */
struct glide_fault {
    uint64_t volume; /* the cookie given at open */
    uint64_t block;  /* first block */
    uint64_t stamp;  /* lowest stamp of the run: hand it back to glide_volume_install */
    uint32_t count;  /* blocks */
    uint32_t chunks; /* not 0: what is asked is which blocks of so many chunks, from that of `block` on, are zeros. All
                        of the first is to be answered, with glide_volume_install_holes */
    uint64_t order;  /* of a single fault: that of its posting in the engine */
    uint64_t ticket; /* not 0: what is asked is what may have changed since `snapshot` from `block` on; to be answered
                        with glide_volume_install_changed */
    uint64_t snapshot;
};
/* 1 = *out filled; 0 = timeout; -ESHUTDOWN = engine closes. Any number of threads. */
int glide_faults_next(glide_engine *engine, uint32_t max_blocks, int timeout_ms, struct glide_fault *out);

/* A glide_carry task that ended. */
struct glide_carried {
    uint64_t task; /* its number */
    int32_t err;   /* 0: its blocks are in the cache and answered; else what was answered of them is not known */
    uint32_t gets; /* requests that were answered as they should be */
    uint64_t bytes;
    uint64_t ns; /* from glide_carry to the last byte */
    /* What was answered answers faults of lower order too: those had been posted before. Of a later one of the same
     * block that cannot be said. */
    uint64_t order;
};
/* Everything that is there: up to max[0] faults, one block each, and up to max[1] tasks that ended; how many of each
 * is put into `max`. Returns their sum; 0 = timeout; -ESHUTDOWN = engine closes. Waits `linger_us` from the first on
 * for more, which are cheaper together. */
int glide_news_next(glide_engine *engine, int timeout_ms, uint32_t linger_us, struct glide_fault *faults,
                    struct glide_carried *carried, uint32_t max[2]);

/* The glide_news_next of now, or else the next one, returns at once. */
void glide_news_poke(glide_engine *engine);

enum glide_event_kind {
    GLIDE_EV_SEALED = 1,  /* a = sequence number of the segment just sealed by size */
    GLIDE_EV_LOG_FULL,    /* writers of this volume wait for log space; a = errno if the disk has none */
    GLIDE_EV_MAP_FULL,    /* writers of this volume wait for map memory */
    GLIDE_EV_STORE_FLUSH, /* flush = "store": a flush waits for the commit of segment a */
    GLIDE_EV_SYNC_FAILED, /* fdatasync failed: a = segment, b = errno */
    GLIDE_EV_DISK_ERROR,  /* append failed: a = errno; the writers wait, it is tried again */
    GLIDE_EV_FIRST_DIRTY, /* the volume was clean and took a write */
    GLIDE_EV_CONN_CLOSED, /* NBD connection a (its id) ended; b = errno or 0 */
    GLIDE_EV_UBLK_DOWN,   /* every tag of the volume's ublk queue was given back */
    GLIDE_EV_READ_LOST,   /* segment a did not have what was written: b = errno, 0 = other data. Asked of the store if
                             it is committed, else EIO */
    GLIDE_EV_VHOST_DOWN,  /* vhost-user device a (its id) serves no more: see glide_vhost_trouble */
};
struct glide_event {
    uint64_t volume;
    uint64_t a, b;
    uint32_t kind;
};
/* Number of events (<= max); 0 = timeout; -ESHUTDOWN. */
int glide_events_next(glide_engine *engine, int timeout_ms, struct glide_event *out, uint32_t max);

/* ---- volumes -------------------------------------------------------------- */

struct glide_sectors {
    uint64_t sector, count;
};
/* Shadow verify, a debug option (shadow.c): every READ is compared with a second source. */
struct glide_shadow_config {
    int fd; /* an empty file but for `known`; duplicated, so close yours */
    const struct glide_sectors
        *known; /* what the log at open holds, beyond the end too: these sectors of the file are right */
    uint64_t known_count;
};

struct glide_volume_config {
    uint64_t cookie;     /* names the volume in faults and events */
    const char *log_dir; /* directory of this log's segments; created when absent */
    uint8_t volume_id[16];
    uint8_t log_id[16];
    uint64_t size;          /* bytes, a multiple of 4096 */
    uint64_t committed_seq; /* segments up to here are in the store and are unlinked, not replayed */
    uint8_t read_only;
    uint8_t flush_store;   /* FLUSH and FUA wait for the commit */
    uint8_t always_verify; /* check data hashes even if the boot id is the one of the writer */
    uint8_t standby;       /* another process serves the log: change nothing of it; see "handoff" below */
    /* NULL = off; only for the length of the call. */
    const struct glide_shadow_config *shadow;
};
struct glide_recovery {
    uint64_t segments, records, bytes; /* replayed */
    uint64_t verified;                 /* bytes of data that were read and hashed for it */
    uint64_t dropped;                  /* torn records that no sync covered */
    uint64_t last_seq;                 /* 0 = empty log */
    uint64_t repaired;                 /* segments with a header that was damaged, made good from its copy */
};
/* Replays the log and serves. -EUCLEAN: bit rot below a synced position (glide_error names it). */
int glide_volume_open(glide_engine *engine, const struct glide_volume_config *config, glide_volume **out,
                      struct glide_recovery *recovery);
/* Ends connections and queues of the volume, waits for its running I/O, fails parked requests with
 * -ESHUTDOWN, closes files. The log stays on disk. Does not sync. */
int glide_volume_close(glide_volume *volume);

/* Close the active segment. *seq = highest sealed segment (0 = none). */
int glide_volume_seal(glide_volume *volume, uint64_t *seq);
/* Everything acknowledged before is on the local disk, whatever the flush option. Unlike a guest's FLUSH it does not
 * fail for a segment whose sync failed earlier: the upload of that segment is what cures it. */
int glide_volume_sync(glide_volume *volume);
/* The store holds all segments <= seq: releases flushes that wait for it. */
int glide_volume_committed(glide_volume *volume, uint64_t seq);
/* Forget and unlink all segments <= seq. A manifest that includes them must be in use by the reader. */
int glide_volume_retire(glide_volume *volume, uint64_t seq);
/*
 * Give back the space of what was written again since in a committed segment, which stays a read cache. Bytes, 0 if it
 * is not worth it, or -errno.
 */
int64_t glide_volume_thin(glide_volume *volume, uint64_t seq);
/*
 * Make the file of a segment to come, with its blocks, on this thread: a volume that fills segments waits for neither
 * then. Nothing if the log has one, if it is not written to, or if logs or the disk fill. -errno.
 */
int glide_volume_prepare(glide_volume *volume);
/* Unaligned or partial shrink is refused (-EINVAL). A shrink zeroes what it cuts off. */
int glide_volume_resize(glide_volume *volume, uint64_t size);
/* From now on all I/O fails with err (a positive errno), parked requests too. 0 is refused. */
int glide_volume_fail(glide_volume *volume, int err);

/* Stamp to capture before the manifest is read, for installs that no fault asked for. Never blocks. */
uint64_t glide_volume_stamp(glide_volume *volume);

enum glide_install_kind {
    GLIDE_INSTALL_SLOT = 1, /* block = cache slot (pinned by the caller; this call takes the pin over) */
    GLIDE_INSTALL_ZERO,     /* blocks [block, block + count) are zero in the base */
    GLIDE_INSTALL_ERROR,    /* requests that wait for [block, block + count) fail with -err */
    GLIDE_INSTALL_RETRY,    /* look again: nothing learnt */
};
struct glide_install {
    uint64_t block;
    uint64_t count; /* SLOT: 1 */
    uint32_t slot;
    uint32_t generation;
    uint32_t kind;
    int32_t err;
};
enum glide_holes_kind {
    GLIDE_HOLES_PAGE = 1, /* bit i of `zeros`: chunk i of page `number` is all zeros in the base */
    GLIDE_HOLES_CHUNK,    /* bit i of `zeros`: block i of chunk `number` is; the others are not */
    GLIDE_HOLES_ERROR,    /* requests that ask what is zero of chunk `number` fail with err, or look again if it is 0 */
};
struct glide_holes {
    uint64_t number;
    uint32_t kind;
    int32_t err; /* ERROR: a positive errno, or 0 */
    uint64_t zeros[16];
};
/* What is zero of whole pages and chunks; from then on none of it is a fault. With a stale stamp nothing of it lands,
 * as of glide_volume_install, by which faults on data are to be answered too. Requests that wait for what turned out to
 * be zeros go on, and those that ask what is zero of a chunk: after CHUNK and ERROR, and after a PAGE that has it.
 * -ENOMEM. */
int glide_volume_install_holes(glide_volume *volume, uint64_t stamp, const struct glide_holes *list, uint32_t count);

/* How a part of a volume compares with one of its snapshots; the contract is in volume/changed.h. */
struct glide_changed {
    uint64_t ticket;       /* of the fault */
    int32_t err;           /* a positive errno: requests that wait for it fail with that. 0 without an `end`: they ask
                              again */
    uint32_t changed;      /* whether `first` may have changed */
    uint64_t first, end;   /* sectors [first, end); `first` is that of the fault's block */
    uint64_t last_segment; /* of the log, that the manifest has which was compared */
};
/* Answers such a fault, soon after the call. `edges`: where what is said turns into its opposite, `count` sectors,
 * ascending, after `first` and before `end`. -EINVAL, -ENOMEM. */
int glide_volume_install_changed(glide_volume *volume, const struct glide_changed *answer, const uint64_t *edges,
                                 uint32_t count);

/* Answers faults and prefetches, soon after the call. Entries with a stale stamp are not mapped, their waiters look
 * again. On error (-ENOMEM) the pins stay with the caller. */
int glide_volume_install(glide_volume *volume, uint64_t stamp, const struct glide_install *list, uint32_t count);

/* A block that was fetched: for the cache, and for who waits for it. */
struct glide_fill {
    uint64_t block;
    uint8_t key[16];  /* in the cache */
    uint8_t hash[16]; /* of the content */
    const void *data; /* 128 KiB, only for the length of the call */
};
/* glide_cache_insert and glide_volume_install for many blocks. Returns how many of them were done, from the first on;
 * the error if that is none (-EAGAIN: every slot is pinned, try again). Blocks that the cache's disk does not take,
 * and all with `through`, are only given to the requests that wait for them. */
int glide_volume_fill(glide_volume *volume, uint64_t stamp, const struct glide_fill *list, uint32_t count, int through);

struct glide_volume_info {
    uint64_t size;
    uint64_t first_seq, last_seq; /* live segments; 0,0 = none */
    uint64_t sealed_seq;          /* highest sealed */
    uint64_t committed_seq;
    uint64_t active_bytes;    /* in the active segment */
    uint64_t dirty_bytes;     /* log bytes of segments > committed_seq */
    uint64_t oldest_dirty_ns; /* CLOCK_REALTIME ns of the oldest uncommitted write, 0 = clean */
    uint64_t oldest_ns;       /* the same of the oldest write that is in the log */
    uint64_t dead_seq;        /* up to this segment the log has no newest data of a sector, 0 = of the first it has */
    uint64_t log_bytes;       /* allocated by its segments, without files kept for reuse */
    uint64_t map_bytes;
    uint64_t parked;          /* requests that wait for space, faults or the store */
    uint64_t longest_wait_ns; /* for how long the first of them has waited, 0 = none does */
    uint32_t connections;
    uint32_t failed; /* errno, 0 = serving */
};
int glide_volume_info_get(glide_volume *volume, struct glide_volume_info *out);
/* The same for many volumes of one engine, in the order given, with one task for each worker instead of one for each
 * volume. A worker is held up by all that are its own, so callers bound `count`. Returns how many were told of: where
 * the worker has ended all is 0, also the size, which no volume has. */
int glide_volumes_info_get(glide_volume *const *volumes, uint32_t count, struct glide_volume_info *out);

enum glide_op { GLIDE_READ = 0, GLIDE_WRITE = 1, GLIDE_FLUSH = 2, GLIDE_ZERO = 3, GLIDE_OPS = 4 };
#define GLIDE_FUA 1

struct glide_volume_stats {
    uint64_t ops[4]; /* by enum glide_op */
    uint64_t bytes[4];
    uint64_t errors[4];
    uint64_t latency[4][64]; /* bucket b counts latencies of [2^(b/2), ...) x 256 ns: see stats.h */
    uint64_t latency_sum_ns[4];
    uint64_t faults;
    uint64_t log_hits, cache_reads, zero_reads; /* block pieces by source */
    uint64_t rmw;                               /* unaligned writes */
    uint64_t syncs;
    uint64_t log_full_waits, map_full_waits;
    uint64_t paced; /* times that writers waited for their turn: see glide_engine_pace */
    /* Shadow verify, in sectors of READs: */
    uint64_t shadow_compared;    /* whatever came out */
    uint64_t shadow_differences; /* of them */
    uint64_t shadow_changed;     /* left out: written while the READ ran */
    uint64_t shadow_absent;      /* left out: the second source had no answer */
};
int glide_volume_stats_get(glide_volume *volume, struct glide_volume_stats *out); /* never blocks */
/* The same for many volumes. Never blocks. */
void glide_volumes_stats_get(glide_volume *const *volumes, uint32_t count, struct glide_volume_stats *out);
/* The sums of all volumes since the engine began, those that were closed too: none ever falls. */
void glide_engine_totals(glide_engine *engine, struct glide_volume_stats *out);

/* Synchronous I/O through the volume's worker, as a transport would: tests, export, tools.
 * Offsets and lengths are multiples of 512. buf is ignored for FLUSH and ZERO. */
int glide_volume_io(glide_volume *volume, int op, int flags, uint64_t offset, uint64_t length, void *buf);

/* ---- shadow verify: C asks and tells, Python answers ---------------------------- */

enum glide_shadow_kind {
    GLIDE_SHADOW_FILL = 1,   /* READs wait for blocks [block, block + count): answer with glide_shadow_fill */
    GLIDE_SHADOW_DIFFERENCE, /* a READ returned what the shadow does not have */
    GLIDE_SHADOW_ENDED,      /* nothing of this volume is compared any more: err */
};
enum glide_shadow_source {
    GLIDE_FROM_UNKNOWN = 0,
    GLIDE_FROM_LOG,      /* segment, index */
    GLIDE_FROM_LOG_ZERO, /* segment, index of the ZERO; 0, 0 = of the whole block */
    GLIDE_FROM_CACHE,    /* slot, generation; key and hash if the slot still holds that */
    GLIDE_FROM_ZERO,     /* the base is zero there */
};
struct glide_shadow_item {
    uint64_t volume; /* the cookie given at open */
    uint32_t kind;
    int32_t err; /* a positive errno */
    uint64_t block, count;
    /* DIFFERENCE: `count` neighbouring sectors from `sector` on, read from one source, that differ. */
    uint64_t sector;
    uint64_t offset;  /* of the first byte that differs, in the volume */
    uint32_t bytes;   /* valid in got and want, which begin there */
    uint8_t got[16];  /* what the READ returned */
    uint8_t want[16]; /* what the shadow has */
    uint32_t source;  /* of the first sector: enum glide_shadow_source */
    uint64_t segment;
    uint32_t index;
    uint32_t slot, generation;
    uint32_t has_key;
    uint8_t key[16], hash[16];
};
/* 1 = *out filled; 0 = timeout; -ESHUTDOWN = engine closes. Any number of threads. */
int glide_shadow_next(glide_engine *engine, int timeout_ms, struct glide_shadow_item *out);
/* Blocks [block, block + count) as the store had them when the volume was opened, 128 KiB each; only sectors that the
 * shadow does not know yet are taken. NULL: cannot be had, the READs that wait go on, not compared. */
int glide_shadow_fill(glide_volume *volume, uint64_t block, uint64_t count, const void *data);

/* ---- handoff: another process goes on with what this one serves ---------------- */

/*
 * A volume is frozen in its old process and opened in `standby`, which is frozen too, in the new one. A frozen
 * volume begins nothing: no request, no append, no reply. What guests asked for stays parked, and what the core still
 * does of its own ends.
 */
struct glide_cutover {
    uint64_t first_seq, last_seq; /* live segments of the log, 0,0 = none */
    uint64_t last_end;            /* records of the last one */
};
/* Append and acknowledge what can be, seal, and freeze; waits for reads of local files under way. */
int glide_volume_freeze(glide_volume *volume, struct glide_cutover *out);
/* Go on, in the old process after a handoff that failed or in the new one after glide_volume_activate. */
int glide_volume_unfreeze(glide_volume *volume);
/* Replay what was appended since the open in standby. -ESTALE: the log is not what `expected` says. */
int glide_volume_activate(glide_volume *volume, const struct glide_cutover *expected, struct glide_recovery *recovery);
/* From the return on this process does not write the block cache's files: fills wait for glide_cache_take. */
int glide_cache_give(glide_engine *engine);
/* The files are this process's: look at the index again. */
int glide_cache_take(glide_engine *engine);
/* It will not take them back: whoever waits for that gets -ESHUTDOWN. Part of glide_engine_shutdown. */
void glide_cache_shutdown(glide_engine *engine);

/* What the handshake of an NBD connection came to. */
enum glide_nbd_mode {
    GLIDE_NBD_READ_ONLY = 1,
    GLIDE_NBD_STRUCTURED = 2, /* structured replies */
    GLIDE_NBD_ALLOCATION = 4, /* the context base:allocation, under the id GLIDE_NBD_CONTEXT; with STRUCTURED */
    GLIDE_NBD_KERNEL = 8,     /* the kernel's driver: it sends again what had no answer when the stream ended */
    GLIDE_NBD_EXTENDED = 16,  /* extended headers; with STRUCTURED */
};
#define GLIDE_NBD_CONTEXT 1
#define GLIDE_NBD_SNAPSHOTS 8

struct glide_nbd_handshake {
    uint32_t modes;      /* enum glide_nbd_mode */
    uint32_t snapshots;  /* contexts glidefs:changed:, with STRUCTURED: at most GLIDE_NBD_SNAPSHOTS */
    uint64_t changed[8]; /* the snapshot of each, under the ids from GLIDE_NBD_CONTEXT + 1 on */
};

/* A connection of a frozen volume, as another process can go on with it. */
struct glide_nbd_state {
    uint64_t conn_id;
    uint64_t in_bytes;  /* to be received again: requests without an answer, then what came behind them */
    uint64_t out_bytes; /* replies not sent yet */
    uint64_t skip;      /* after in_bytes: bytes of the stream to throw away */
    int32_t fd;         /* stays the core's */
    struct glide_nbd_handshake handshake;
};
/* Fills in up to `max`; returns how many there are. */
int glide_nbd_frozen(glide_volume *volume, struct glide_nbd_state *out, uint32_t max);
/* Copy the bytes of a connection. -EAGAIN: it is not as glide_nbd_frozen told any more, because something that was
 * under way has ended; ask again. */
int glide_nbd_export(glide_volume *volume, const struct glide_nbd_state *state, void *in, void *out);
/* Go on with such a connection once the volume is unfrozen. C owns fd from here (also on error). */
int glide_nbd_adopt(glide_volume *volume, int fd, const struct glide_nbd_state *state, const void *in, const void *out);

/* ---- NBD transmission ----------------------------------------------------------- */

/* Take over a connected stream socket after the handshake; C owns fd from here (also on error). */
int glide_nbd_attach(glide_volume *volume, int fd, uint64_t conn_id, const struct glide_nbd_handshake *handshake);
/* Shut the connection down and wait until it is gone. */
int glide_nbd_detach(glide_volume *volume, uint64_t conn_id);

/* ---- ublk -------------------------------------------------------------------------- */

struct glide_ublk_config {
    uint32_t dev_id; /* 0xffffffff = any */
    uint32_t queue_depth;
    uint32_t max_io_bytes; /* largest READ or WRITE */
    uint32_t read_only;
    uint64_t tag;     /* hash of the export, kept in ublksrv_flags */
    uint32_t recover; /* adopt the existing device dev_id instead of adding one */
    uint32_t added;   /* start the device dev_id, which glide_ublk_add made */
    uint32_t max_discard_bytes;
};
struct glide_ublk_info {
    uint32_t dev_id, queues, depth, state, max_io_bytes;
    int32_t server_pid;
    uint64_t flags, tag, dev_sectors;
};
int glide_ublk_features(uint64_t *features);
/* Make a device for the volume, with the id *dev_id. It shows nothing until glide_ublk_start with `added`. */
int glide_ublk_add(glide_volume *volume, const struct glide_ublk_config *config, uint32_t *dev_id);
/* Add (or recover, or take what was added) the device, start its queue on the volume's worker, start the device. */
int glide_ublk_start(glide_volume *volume, const struct glide_ublk_config *config, glide_ublk **out);
int glide_ublk_dev_id(glide_ublk *device);
/* STOP_DEV while serving, then DEL_DEV; frees the handle. 1: somebody has it open still, and its number is not free. */
int glide_ublk_stop(glide_ublk *device);
/* Give the device back to the kernel without stopping it: guests pause until the next server recovers it. */
int glide_ublk_release(glide_ublk *device);
int glide_ublk_update_size(glide_ublk *device, uint64_t size);
int glide_ublk_query(uint32_t dev_id, struct glide_ublk_info *out);
int glide_ublk_delete(uint32_t dev_id, uint64_t expected_tag);

/* ---- test hooks: a trace of what reached the local disk, and injected faults ---------- */

/* Append every create, write, sync, directory sync and unlink of write-log files to `path`; NULL = off.
 * Record format: see disk.h. Process-wide. */
int glide_disk_trace(const char *path);
/* Fail the next `count` operations of `kind` (see disk.h) with err. Process-wide. */
int glide_disk_inject(int kind, int err, uint32_t skip, uint32_t count);
/* Lose what the log map says of a sector. -ENOENT: it says nothing. */
int glide_volume_forget_sector(glide_volume *volume, uint64_t sector);
/* BLAKE3-128, in key-derivation mode with a context that is not NULL. */
void glide_payload_hash(const void *data, uint64_t length, const char *context, uint8_t *out);
/* Where a key lands in the hash tables of this process. */
uint64_t glide_hash(uint64_t key);
