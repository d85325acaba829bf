/*
 * The second part of the boundary (see glide_core.h): from the log to packs, and from packs to the block cache.
 */

/* ---- gather: what sealed segments hold, newest version of each sector ------- */

struct glide_entry {
    uint64_t block;
    uint32_t mask;      /* sectors with data */
    uint32_t zero_mask; /* sectors that are zero; disjoint from mask */
};
struct glide_extent {
    uint64_t block, count; /* whole blocks that are zero */
};
/*
 * Replay segments first..last of a log directory, keep what is newest as of `last`. With `volume`, the records must be
 * exactly those the volume acknowledged (-EUCLEAN otherwise), and segments that do not exist are skipped; data that it
 * appended itself is verified by whatever reads it from the gather, all other now. NULL reads any log offline: what was
 * synced and is bad is in glide_gather_damage, which must be looked at, by the rules of a start (csrc/log/replay.c).
 * `committed`, offline: what the store has; UINT64_MAX = nobody knows, nothing before the first segment is missed.
 * Entries are sorted by block; a block is in at most one of extents and entries.
 */
int glide_gather_open(glide_volume *volume, const char *log_dir, const uint8_t *volume_id, const uint8_t *log_id,
                      uint64_t first, uint64_t last, uint64_t committed, glide_gather **out);

enum glide_loss_kind {
    GLIDE_LOSS_RECORD = 1, /* the data of a WRITE; which sectors is known */
    GLIDE_LOSS_PLACE,      /* of the journal: what it said cannot be told */
    GLIDE_LOSS_HEADER,     /* nothing of the file can be read */
    GLIDE_LOSS_SEGMENT,    /* it is missing */
};
struct glide_loss {
    uint64_t seq;
    uint32_t kind;
    uint32_t count; /* RECORD, PLACE */
    char why[400];  /* HEADER: the file, and what it is; of the others the first of them */
};
struct glide_damage {
    const struct glide_loss *losses;     /* in the order of the log, one for each kind and segment */
    const struct glide_sectors *sectors; /* of the volume, ascending: the newest of them is a RECORD that is lost */
    uint64_t loss_count, sector_count;
    uint64_t torn; /* records that are bad, and that nothing says were synced: left out */
};
void glide_gather_damage(glide_gather *gather, struct glide_damage *out);            /* valid until close */
uint64_t glide_gather_entries(glide_gather *gather, const struct glide_entry **out); /* valid until close */
uint64_t glide_gather_extents(glide_gather *gather, const struct glide_extent **out);
/* Bytes of sector data of entries [first, first + count). */
uint64_t glide_gather_bytes(glide_gather *gather, uint64_t first, uint64_t count);
/* Copy those sectors, entry after entry, each entry's sectors in ascending order, to buf. -EUCLEAN: damaged. */
int glide_gather_fill(glide_gather *gather, uint64_t first, uint64_t count, void *buf, uint64_t length);
void glide_gather_close(glide_gather *gather);

/* Sequence numbers of the segments in a log directory, ascending; returns the number found. */
int glide_log_segments(const char *log_dir, uint64_t *seqs, uint32_t max);

struct glide_segment {
    uint32_t copies; /* of the header that are good: bits 0 and 1 */
    uint32_t version, sectors;
    uint8_t volume_id[16], log_id[16];
    uint64_t seq, previous_seq;
    uint32_t previous_end;
    uint64_t records[4]; /* valid ones, by op: 1 WRITE, 2 ZERO, 3 SYNC */
    uint64_t written;    /* bytes of the WRITEs */
};
/* Describe a segment by its first bytes, head and journal. -EUCLEAN: no copy of the header is good; -ENOTSUP: another
 * version, nothing but it is filled in. */
int glide_segment_look(const void *data, uint64_t length, struct glide_segment *out);

struct glide_record {
    uint64_t sector, count; /* of the volume */
    uint32_t index;         /* where it begins */
    uint32_t zero;          /* a ZERO */
};
/* The record that a log position belongs to, read from the file and checked. -ENOENT: no valid one (or no file);
 * -EUCLEAN: *out is filled, its data does not have its hash. */
int glide_log_record(const char *log_dir, const uint8_t *volume_id, const uint8_t *log_id, uint64_t seq, uint32_t index,
                     struct glide_record *out);

/* ---- upload: what was gathered becomes packs ---------------------------------- */

/*
 * Python decides: which chunks keep what hides older packs, which blocks of zeros there are to say, and how large a
 * pack is. C goes through the blocks. In this order: open, chunks, cut, then build from any number of threads.
 * The gather must stay open until the plan is closed.
 */
struct glide_chunk {
    uint64_t chunk;
    uint32_t whole; /* blocks with every sector that lies within `size` */
    uint32_t zeros; /* blocks with a zero mask */
};
/* `size`: bytes of the volume that `whole` looks at. */
int glide_plan_open(glide_gather *gather, uint64_t size, glide_plan **out);
/* The chunks that entries of the gather lie in, ascending; valid until close. */
uint64_t glide_plan_chunks(glide_plan *plan, const struct glide_chunk **out);

/* A pack: items [first, first + count), `plain` bytes of payloads before they are compressed. */
struct glide_pack_job {
    uint64_t first, count, plain;
};
/*
 * Merge the entries with `zeros` (ascending, no block of them has an entry) and cut them into packs of at most
 * `pack_bytes` plain bytes (one block may have more) and `max_items`. Entries of chunk i keep their zero mask if
 * keep[i]. Once per plan.
 */
int glide_plan_cut(glide_plan *plan, const uint8_t *keep, const struct glide_extent *zeros, uint64_t zero_count,
                   uint64_t pack_bytes, uint64_t max_items);
uint64_t glide_plan_jobs(glide_plan *plan, const struct glide_pack_job **out); /* valid until close */
uint64_t glide_plan_items(glide_plan *plan, const struct glide_entry **out);   /* valid until close */

struct glide_pack_rules {
    int32_t level;    /* of zstd */
    uint32_t samples; /* a pack of more payloads is compressed if the beginnings of about so many of them shrink... */
    uint32_t sample;  /* ...of so many bytes each, a multiple of 4096... */
    uint32_t shrinks; /* ...to less than this part of a thousand */
};
struct glide_packed {
    uint64_t end;    /* of the payloads, in the body */
    uint64_t chunks; /* how many */
};
/*
 * Build a pack: payloads, verified as they are read, behind the first GLIDE_PACK_HEADER bytes of `body`, which has room
 * for those and job.plain; `records` the plain index, GLIDE_PACK_ENTRY bytes for each item; `chunks`, with room for as
 * many as items, those that they lie in, ascending. -EUCLEAN: the log is damaged.
 */
int glide_plan_build(glide_plan *plan, uint64_t job, const struct glide_pack_rules *rules, void *body,
                     uint64_t capacity, void *records, uint64_t *chunks, struct glide_packed *out);
void glide_plan_close(glide_plan *plan);

/* ---- pack payloads ---------------------------------------------------------- */

/* Compress `count` consecutive plain payloads of lengths[i] bytes at `plain` into `out`, back to back;
 * stored[i] = bytes stored; a payload that does not shrink is stored raw (stored[i] == lengths[i]).
 * Returns total bytes or -errno (-ENOBUFS: out too small; sum(lengths) always suffices). */
int64_t glide_payloads_compress(const void *plain, const uint32_t *lengths, uint32_t count, int level, void *out,
                                uint64_t capacity, uint32_t *stored);
/* Decompress one payload; raw when stored_length == plain_length. -EUCLEAN if it does not decode to it. */
int glide_payload_decompress(const void *stored, uint32_t stored_length, void *plain, uint32_t plain_length);
/* Scatter packed sectors of `mask` to their places in a 128 KiB block; zero those of zero_mask. */
void glide_block_overlay(void *block, uint32_t mask, uint32_t zero_mask, const void *sectors);
/* Gather the sectors of `mask` of a 128 KiB block to `out`, packed. */
void glide_block_extract(const void *block, uint32_t mask, void *out);

/* ---- cold reads: what a block is made of, and its way here, without a call of Python for each ------------- */

struct glide_part { /* an entry of a pack that shows in a block */
    uint8_t hash[16];
    uint32_t mask, zero_mask, offset, stored; /* as in the index */
    uint32_t pack;                            /* the place of its pack among those that were looked through */
};
enum glide_plan_state {
    GLIDE_PLAN_ZERO = 1, /* nothing shows: zeros */
    GLIDE_PLAN_ABSENT,   /* to be fetched */
    GLIDE_PLAN_DONE,     /* answered */
    GLIDE_PLAN_UNSURE,   /* the cache has it from before this process: to be checked */
};
struct glide_block_plan {
    uint64_t block;
    uint8_t key[16];       /* in the cache */
    uint32_t first, count; /* its parts, newest first */
    uint32_t state;
    uint32_t task; /* glide_carry: counted from 0 */
};
struct glide_block_group { /* blocks that the same packs may have */
    uint32_t packs, blocks;
};
/*
 * What `blocks` are made of, by the entries of indices (40 bytes each, ascending by block), newest first: those of
 * the first group, then those of the second, and so on, as the blocks. The keys are bound to `prefix` unless that is
 * NULL. Room for a plan for each block, and for min(packs, 32) parts for each block of a group.
 */
void glide_plan_blocks(const void *const *entries, const uint32_t *lengths, const struct glide_block_group *groups,
                       uint32_t group_count, const uint64_t *blocks, const char *prefix, struct glide_block_plan *plans,
                       struct glide_part *parts);
/* Answer what the cache has, which also changes the state; all but block `leave` is mapped. What is zero is left to
 * glide_volume_install_holes. Returns how many are not DONE, and sets used[i] where one that is ABSENT has a part of
 * pack i. -ENOMEM; a volume that is closed has nothing to answer. */
int glide_plan_answer(glide_engine *engine, uint64_t volume, uint64_t stamp, uint64_t leave,
                      struct glide_block_plan *plans, uint32_t count, const struct glide_part *parts, uint8_t *used);

enum glide_source_kind { GLIDE_SOURCE_FILE = 1, GLIDE_SOURCE_HTTP };
struct glide_source { /* where a pack is read */
    uint32_t kind;
    uint32_t timeout_ms; /* HTTP: for each part of an answer */
    const char *target;  /* the path of a file; path and query of a URL */
    const char *host;    /* HTTP: the header Host */
    const void *address; /* HTTP: struct sockaddr */
    uint32_t address_length;
    uint32_t connect_ms; /* HTTP: for connecting, and for a TLS handshake */
    const char *server;  /* HTTP over TLS: the name or address that its certificate must have; NULL: no TLS */
    const char *ca;      /* TLS: a file of CAs that may have signed it; empty: whoever answers is believed */
};
struct glide_carry {
    uint64_t volume, stamp;         /* whom to answer */
    uint64_t leave;                 /* a block that is put in the cache but not mapped; UINT64_MAX = none */
    uint64_t first_task;            /* the number of the first task */
    uint64_t gap, limit;            /* bytes: read over between two payloads; of the longest request for several */
    struct glide_block_plan *plans; /* those that are ABSENT are carried; their `task` is filled in */
    const struct glide_part *parts;
    const struct glide_source *sources; /* by the number of the pack */
    uint32_t plan_count;
};
/*
 * Fetch the payloads of blocks in as few requests as pay, put the blocks together, verify them, put them in the cache
 * and answer who waits for them: all on threads of its own. A task is the blocks that share requests; each is told
 * of once, by glide_news_next. An answer that is not the range that was asked for, or bytes that do not verify, fail
 * their task: whoever asked goes another way. Returns the number of tasks. -ENOMEM: nothing was begun. Any thread.
 */
int glide_carry(glide_engine *engine, const struct glide_carry *what);

/*
 * Put blocks in the cache of which `segment`, the oldest of the log and about to be retired, has the newest of some
 * sectors: those with a plan that is ABSENT, all of whose data is in the log or the cache, and is not newer than
 * segment `committed`, the last that the plans know. Those that are put become DONE. Returns how many, or -errno of the
 * cache; -ESHUTDOWN, of a volume that closes. Not the worker's thread.
 */
int glide_volume_demote(glide_volume *volume, uint64_t segment, uint64_t committed, struct glide_block_plan *plans,
                        uint32_t count, const struct glide_part *parts);

/* ---- block cache: content-addressed, one file per host ------------------------ */

struct glide_slot {
    uint32_t slot;
    uint32_t generation;
    uint32_t verified; /* 0: from before this process; check the content before use */
    uint8_t hash[16];  /* of the content */
};
#define GLIDE_NO_SLOT 0xffffffffu
/* Look up `count` keys of 16 bytes each: out[i] is a pinned slot, or its `slot` is GLIDE_NO_SLOT. Returns the number
 * found. */
int glide_cache_lookup(glide_engine *engine, const uint8_t *keys, uint32_t count, struct glide_slot *out);
/* Store a block (128 KiB), evicting if needed; *out is pinned. -EAGAIN: every slot is pinned, try again.
 * A key that is there already keeps its slot. */
int glide_cache_insert(glide_engine *engine, const uint8_t *key, const uint8_t *hash, const void *data,
                       struct glide_slot *out);
int glide_cache_read(glide_engine *engine, const struct glide_slot *slot, void *buf); /* pinned slot */
/* The content of a pinned slot, `data`, is what it should be. -ENOMEM. */
int glide_cache_mark_verified(glide_engine *engine, const struct glide_slot *slot, const void *data);
/* Sync what was put into the cache: until then every read of it is checked. Blocks; for one thread, every few seconds.
 * 0, or -errno while the cache's disk fails: then blocks are not cached, and what was not synced is forgotten. */
int glide_cache_sync(glide_engine *engine);
/* Drop a slot whose content is bad: unpins and forgets it. */
void glide_cache_drop(glide_engine *engine, const struct glide_slot *slot);
void glide_cache_unpin(glide_engine *engine, const struct glide_slot *slot);
/* Evict everything that is not pinned (tests, `doctor`). Returns the number evicted. */
uint64_t glide_cache_evict_all(glide_engine *engine);
