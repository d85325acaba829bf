/*
 * What may have changed since a snapshot, for BLOCK_STATUS, in sectors of 4 KiB.
 *
 * The invariant: a sector that differs from the snapshot is never said to be unchanged. Two things together make it
 * true. Python compares the manifest in use with the snapshot's, for a part of the volume at a time: a window. It knows
 * `last_segment`, the last one of the log that its manifest has. And the newest write of a sector is one of these:
 *
 * - in a segment up to last_segment: then it is in the manifest that was compared, and so in the window, which never
 *   changes: what is compared are two immutable manifests;
 * - in a later one, and the log map names it: then the sector has changed;
 * - in a later one that the map does not name any more: then the log gave it back, or lost it, which
 * volume->forgotten_seq tells before it happens. A window of an older manifest than that is not used; Python is asked
 * again, and has a newer one, because nothing is forgotten before a manifest that includes it is in use.
 *
 * So neither a commit nor a compaction makes a window wrong: what they move was compared where it was, or is in the
 * log. A resize writes zeros to what it cuts off, and what grows reads as zeros: beyond its end the snapshot counts as
 * zeros. Another process begins without windows.
 *
 * A context belongs to a connection, and is touched by the worker alone. It keeps one window, as long as those of all
 * volumes take little memory, for some seconds: so a client hears soon that a snapshot was deleted.
 */
#ifndef GLIDE_CHANGED_H
#define GLIDE_CHANGED_H

#include <stdint.h>

struct changed_window;
struct io_req;
struct volume;

struct changed {
    uint64_t snapshot; /* the number by which Python knows it */
    uint64_t ticket;   /* unique in the volume; 0 = nothing was asked yet */
    struct changed_window *window;
};

/* Carry out an IO_STATUS with a context, from its beginning. It may wait for Python, as for a fault. */
void changed_status(struct io_req *req);
/* Nobody asks any more. */
void changed_end(struct volume *v, struct changed *context);

#endif
