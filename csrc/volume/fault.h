/*
 * Faults: blocks that requests wait for and Python resolves; and events, which
 * tell Python that something happened. A volume's table of faults belongs to
 * its worker; the two outboxes are shared with Python threads.
 */
#ifndef GLIDE_FAULT_H
#define GLIDE_FAULT_H

#include "volume/engine.h"
#include "base/table.h"

struct volume;
struct io_req;
struct changed;

/* ---- worker ---- */
/* Let the piece of req in `block` wait; ask Python unless somebody waits already. -ENOMEM. */
int fault_wait(struct volume *v, uint64_t block, struct io_req *req);
/* Let a request wait until it is known which blocks of `chunk` are zeros; of the `chunks` from there on Python may tell
 * it as well. -ENOMEM. */
int fault_wait_holes(struct volume *v, uint64_t chunk, uint32_t chunks, struct io_req *req);
void fault_resolve_holes(struct volume *v, uint64_t chunk, int err);
/* Let an IO_STATUS wait until what changed from `block` on is known; others with the same context wait with it.
 * -ENOMEM. */
int fault_wait_changed(struct volume *v, const struct changed *context, uint64_t block, struct io_req *req);
/* The context that the waiters of a ticket ask of, NULL: nobody waits any more. */
struct changed *fault_changed(struct volume *v, uint64_t ticket);
void fault_resolve_changed(struct volume *v, uint64_t ticket, int err);
/* Wake the waiters of a block: err = 0 looks the block up again, else their piece fails. */
void fault_resolve(struct volume *v, uint64_t block, int err);
void fault_resolve_range(struct volume *v, uint64_t block, uint64_t count, int err);
/* Wake those that wait for blocks in the range which are known to be zero by now, and those that ask of such a chunk.
 */
void fault_resolve_zeros(struct volume *v, uint64_t block, uint64_t count);
void fault_resolve_all(struct volume *v, int err);
/* Fail the pieces of requests with this tag; others go on waiting. */
void fault_cancel(struct volume *v, const void *tag, int err);
/* Fail with EIO the pieces of requests that are older than `limit_ns` (not 0) at `now`; others go on waiting. */
void fault_expire(struct volume *v, uint64_t now, uint64_t limit_ns);
uint64_t fault_waiting(const struct volume *v);

/* For how long, at `now`, the request has waited that came first; 0 if none waits. */
uint64_t fault_longest_wait_ns(struct volume *v, uint64_t now);
void fault_table_destroy(struct volume *v);

/* ---- any thread ---- */
void event_post(struct engine *e, uint64_t volume, uint32_t kind, uint64_t a, uint64_t b);
/* A task of carry/ ended. -ENOMEM. */
int carried_post(struct engine *e, const struct glide_carried *carried);
/* At the end: nobody posts any more. */
void carried_forget(struct engine *e);
/* Forget queued faults of a volume that closes. */
void fault_forget(struct engine *e, uint64_t cookie);

#endif
