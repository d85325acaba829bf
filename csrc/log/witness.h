/*
 * Evidence that a part of a log was synced, kept apart from the journal that it is about.
 *
 * After each sync a SYNC record goes into the journal. It lies in the sector of the records that it vouches for, so
 * what takes one takes the other: a lost sector of the journal, a damaged header, a file that is cut off or gone. So
 * the same is written twice more, each time into a sector that holds nothing else that is needed:
 *
 * - a *vouch* in sector 1 of the segment that was synced, one of two slots in turn: a page more for the next sync of
 *   that file, and no sync more. Salted like a record, so nothing of a file's earlier life is believed.
 * - the *witness file* of the log, "{log directory}.witness", beside it: one slot in each of two sectors, in turn.
 *   It is written by the first sync of each segment and pushed to the disk at once, not waited for. It outlives the
 *   segment, and the log directory.
 *
 * All are written after the sync, so each of them is true, whichever of them a power cut leaves; recovery believes
 * them all. None of them is needed while what they vouch for is whole.
 */
#ifndef GLIDE_WITNESS_H
#define GLIDE_WITNESS_H

#include "log/segment.h"

/* Everything of the log from position `from` to position `to` is durable. */
struct vouch {
    uint64_t from, to;
};
#define VOUCHES 2 /* of a segment, of a witness file */

/* Best effort: a witness that is lost loses no data. */
void segment_write_vouch(struct disk_file *f, const struct segment_id *id, uint32_t slot, const struct vouch *vouch);
/* Those that are good; returns how many. */
uint32_t segment_read_vouches(struct disk_file *f, const struct segment_id *id, struct vouch *out);

struct witness_file {
    struct disk_file file; /* fd -1: not opened yet */
    uint32_t slot;         /* the next to be written */
    uint64_t seq;          /* the segment that the last one written names */
};

void witness_init(struct witness_file *w);
void witness_close(struct witness_file *w);
/* What the file of the log in directory `dir` says; returns how many, 0 without one. */
uint32_t witness_read(const char *dir, const struct segment_id *id, struct vouch *out);
/* Make the file if it is not there; its entry is durable with the next sync of the directory that holds `dir`.
 * True: it was made. Best effort. */
bool witness_make(struct witness_file *w, const char *dir);
/* Write a vouch that ends in a segment for which none was written yet; later ones go only into the segment. */
void witness_note(struct witness_file *w, const char *dir, const struct segment_id *id, const struct vouch *vouch);

#endif
