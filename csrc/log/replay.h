/*
 * Reads a log from its files and judges damage: for the volume that goes on with it (recover.c) and for offline
 * readers (gather.c).
 *
 * Two passes. The first reads headers and journals and collects what witnesses call
 * durable: SYNC records, vouches of segments, the witness file (witness.h). The second goes through the records in
 * position order, checks the data where a power cut may have torn it, and gives what is whole to the caller. A bad or
 * missing record below the durable position is bit rot, a *loss*; above it, it is a write that was never acknowledged
 * as durable, and what it meant to replace stays visible. Replay never stops at a bad record.
 *
 * Segments that the store has (up to `committed_seq`) are a read cache. One is replayed only if everything after it
 * is whole: a sector whose newest record is lost would show an older one. Their data is not read here: every read
 * compares it with its hash, and the store has what is damaged. A record whose data became a hole is passed over: it
 * was replaced by a newer one, and is in the store.
 *
 * The files are only read, except that `repair` writes a damaged copy of a header again. A volume may append to them
 * meanwhile.
 */
#ifndef GLIDE_REPLAY_H
#define GLIDE_REPLAY_H

#include "log/segment.h"
#include "log/witness.h"

struct replay_segment {
    uint64_t seq;
    struct disk_file file;
    struct segment_header header;
    struct segment_journal journal;
    bool usable;             /* the header is valid */
    bool broken;             /* it cannot be read, or is that of another log: bad, synced or not */
    char *why;               /* it is not usable */
    bool suspect;            /* a sync failed: see log_mark_sync_failed */
    bool dropped;            /* not all valid records are replayed */
    bool thin;               /* its file has holes, which may be where records were: volume/thin.c */
    uint64_t data, data_end; /* bytes of the file: where it has data from the last look on */
    uint32_t limit;          /* records from here on are of a writer that had lost the log */
    uint64_t durable;        /* log position: everything of this segment below it is */
};

/* Something that was synced and is not what it was. */
struct replay_loss {
    uint32_t kind; /* enum glide_loss_kind */
    uint64_t seq;
    uint32_t index;                      /* RECORD, PLACE */
    const struct segment_record *record; /* RECORD */
};

struct replay_calls {
    /* A WRITE or ZERO that counts; sums: of a WRITE's sectors, NULL where its data was not read. */
    int (*record)(void *arg, struct replay_segment *f, uint32_t index, const uint64_t *sums);
    /* After the last record of a segment; a caller that takes its file sets fd -1, path NULL. */
    int (*end)(void *arg, struct replay_segment *f);
    /* All segments so far are in the store, and something of them is not whole: forget them, and `f` (NULL = none),
     * which was not replayed. NULL: segments that the store has are judged like others. */
    void (*drop)(void *arg, struct replay_segment *f);
    /* The text of fail() says what it is. 0 = go on with what is whole. NULL: the first loss ends the replay. */
    int (*lost)(void *arg, const struct replay_loss *loss);
};

struct replay {
    /* Given: */
    const char *dir;
    struct segment_id id;   /* seq is ignored */
    uint64_t committed_seq; /* segments up to this one may be absent */
    bool always_verify;
    bool repair; /* write a damaged copy of a header again */
    bool adopt;  /* the files are opened for writing, for a caller that goes on with them */
    const struct replay_calls *calls;
    void *arg;
    /* What came of it: */
    uint64_t damage_end; /* log position after the last segment in which something is torn; 0 = nothing is */
    uint64_t verified, dropped, repaired;
    /* Its own: */
    struct replay_segment *segments;
    int64_t count;
    struct vouch *vouches; /* of all witnesses; room for 1 + VOUCHES of each segment, and those of the witness file */
    uint32_t vouch_count;
    uint64_t kept; /* the last segment so far that the store has and that was replayed, 0 = none */
    uint8_t *buf;
    uint64_t sums[RECORD_MAX_SECTORS];
};

/* Replay `count` segments, ascending. -errno: the first thing that ended it, fail() text set. */
int replay_run(struct replay *r, const uint64_t *seqs, int64_t count);
/* Check that the last segment that was synced is there: no later header names it, only the witness file. It is a loss
 * if it is missing. w: gets the slot to be written next, or NULL. */
int replay_check_end(struct replay *r, struct witness_file *w);

#endif
