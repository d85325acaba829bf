/*
 * The write log of a volume: segments on disk, appended by the volume's worker.
 *
 * Because one thread appends, and an append finishes before anything else runs
 * on it, there are no open reservations: when a segment is sealed, a sync is
 * started or a position is read, every record below that position is on disk
 * (in the page cache) and in the map. Two rules keep the order:
 *
 * - append = data, then records, then (by the caller) map, then acknowledgement;
 * - a failed append seals the segment at its last good position, so a position
 *   is never used twice.
 *
 * Retired files of full segments come back as the log's next segments ("spares", as PostgreSQL recycles WAL files):
 * their blocks and pages are there already, so an append allocates nothing and a sync has no metadata to write.
 * Nothing of a file's old life is believed: every record is salted with the segment's number, and data counts only
 * with its record's hash.
 */
#ifndef GLIDE_WRITE_LOG_H
#define GLIDE_WRITE_LOG_H

#include "base/pace.h"
#include "log/log_map.h"
#include "log/sector_sums.h"
#include "log/segment.h"
#include "log/witness.h"

#include <stdatomic.h>

/* What all logs of a host share: their space, and the size of their segments. */
struct log_budget {
    uint64_t limit;         /* bytes */
    _Atomic uint64_t used;  /* allocated by all logs */
    _Atomic uint64_t spare; /* of that, by files kept for reuse */
    uint32_t segment_sectors;
    struct pace pace; /* of appends: writers slow down before the logs are full */
};

struct log_segment {
    uint64_t seq;
    struct disk_file file;
    uint32_t sectors;
    uint32_t end;   /* first free index */
    uint32_t valid; /* WRITE and ZERO records */
    uint32_t pins;  /* reads in flight */
    struct sector_sums sums;
    uint64_t used;      /* bytes of what was written */
    uint64_t bytes;     /* charged to the log limit: the same, or what the file held before if that is more */
    uint64_t first_ns;  /* CLOCK_REALTIME of the first record */
    bool unsynced;      /* written since the last sync began */
    bool noted;         /* only a SYNC record was written: no reason to sync, as more will follow */
    bool sync_failed;   /* sticky until the segment is committed */
    bool unmapped;      /* a sync of it failed, it was committed, and the map has forgotten it */
    bool thin;          /* its file has holes where records were: volume/thin.c */
    uint32_t thin_live; /* sectors that were alive then */
    bool counted;       /* `valid` is every record that its journal ever had: a replay dropped none */
};

/* Whether others may want the space of `more` bytes that one log keeps for later. */
static inline bool log_scarce(const struct log_budget *b, uint64_t more)
{
    return atomic_load(&b->used) + more > b->limit - b->limit / 16;
}

#define LOG_SPARES 16 /* of one log; all go as soon as any writer waits for space */

struct write_log {
    struct log_budget *budget;
    char *path; /* directory */
    struct disk_file dir;
    bool dir_unsynced;
    struct segment_id id;          /* seq is the last one drawn */
    struct log_segment **segments; /* live, ascending by seq */
    uint32_t count, capacity;
    struct log_segment *active; /* the last of them, or NULL */
    uint64_t previous_end_seq;  /* what the next header says about its predecessor */
    uint32_t previous_end;
    uint64_t vouch_from; /* log position: below it recovery found damage, no SYNC vouches for it */
    uint32_t vouch_slot; /* of a segment, the next to be written */
    struct witness_file witness;
    uint64_t bytes; /* charged, spares too */
    uint64_t room;  /* of the file system, before it is asked again: space.h */
    bool no_room;   /* that was why log_need_room or log_may_grow said no */
    struct disk_file spares[LOG_SPARES];
    uint64_t spare_bytes[LOG_SPARES];
    uint32_t spare_count;
};

/* One record to append. */
struct append_piece {
    uint32_t op;    /* RECORD_WRITE or RECORD_ZERO */
    uint32_t count; /* sectors: WRITE up to RECORD_MAX_SECTORS */
    uint64_t sector;
    const uint8_t *data; /* WRITE */
    uint64_t pos;        /* out */
};
#define APPEND_MAX_PIECES 256
#define APPEND_MAX_SECTORS RECORD_MAX_SECTORS

struct append_scratch {
    struct iovec iov[APPEND_MAX_PIECES];
    struct segment_record records[APPEND_MAX_SECTORS];
    uint64_t sums[APPEND_MAX_SECTORS]; /* by index, from that of the first record on */
};

int log_open(struct write_log *log, struct log_budget *budget, const char *path, const uint8_t *volume_id,
             const uint8_t *log_id);
/* Closes files; the log stays on disk. Spares are unlinked, unless the log belongs to another process by now. */
void log_close(struct write_log *log, bool ours);

/* Index space that the active segment has left; 0 = there is none. */
static inline uint32_t log_room(const struct write_log *log)
{
    return log->active ? log->active->sectors - log->active->end : 0;
}
/* Make an active segment with room. -errno: nothing changed; -ENOSPC: the writer waits, as for a full log. */
int log_need_room(struct write_log *log);
/* May this log take `sectors` more now, by the limit and by the room on the disk? Charges nothing. */
bool log_may_grow(struct write_log *log, uint32_t sectors);
/* Append pieces that fit in log_room() (a ZERO takes 1). On error nothing is appended and the segment is sealed. */
int log_append(struct write_log *log, struct append_scratch *scratch, struct append_piece *pieces, uint32_t count);
/* Everything from vouch_from to pos is durable: say so in the journal, and in the other places (witness.h). Best
 * effort. */
void log_note_sync(struct write_log *log, uint64_t pos);
/* The next position that will be written; everything acknowledged is below. */
uint64_t log_position(const struct write_log *log);
/* Close the active segment. An empty one is removed. */
void log_seal(struct write_log *log);
/* Highest sealed sequence number, 0 = none. */
uint64_t log_sealed_seq(const struct write_log *log);

struct log_segment *log_find(const struct write_log *log, uint64_t seq);
/* Enter a segment found on disk. Takes file over. NULL = no memory. */
struct log_segment *log_adopt(struct write_log *log, uint64_t seq, struct disk_file file, uint32_t sectors,
                              uint32_t end, uint32_t valid);
/* Forget a segment without pins. True: its file became a spare; false: the caller unlinks it. */
bool log_retire(struct write_log *log, struct log_segment *s);
/* The file of a segment gave `freed` bytes back; `live` sectors of newest data are left. */
void log_thinned(struct write_log *log, struct log_segment *s, uint32_t live, uint64_t freed);
/* Forget a segment without pins, and close its file. */
void log_forget(struct write_log *log, struct log_segment *s);
/* Keep a file for the next segment, of which `bytes` are allocated. The caller saw that there is no spare. */
void log_add_spare(struct write_log *log, struct disk_file file, uint64_t bytes);
/* Give the space of all spares back. True if there were any. */
bool log_drop_spares(struct write_log *log);
/* Note on disk that a sync of this segment failed, so that a later process does not trust it. */
void log_mark_sync_failed(struct write_log *log, struct log_segment *s);

#endif
