/*
 * Faults: blocks that requests wait for and Python resolves; and events, which
 * tell Python that something happened. A volume's table of faults belongs to
 * its worker; the two outboxes are shared with Python threads.
 */
#ifndef GLIDE_FAULT_H
#define GLIDE_FAULT_H

#include "engine.h"
#include "table.h"

struct volume;
struct io_req;

void outbox_init(struct outbox *o);
void outbox_close(struct outbox *o); /* wake everybody for good */
void outbox_wake(struct outbox *o);  /* end the waits of now */
void outbox_destroy(struct outbox *o);
/* The item was malloc'ed, with its list first. */
void outbox_put(struct outbox *o, struct list *item);
/* Lock and wait for an item. 1 = there is one, 0 = timeout, -ESHUTDOWN; locked in any case. */
int outbox_wait(struct outbox *o, int timeout_ms);

/* ---- worker ---- */
/* Let the piece of req in `block` wait; ask Python unless somebody waits already. -ENOMEM. */
int fault_wait(struct volume *v, uint64_t block, struct io_req *req);
/* Wake the waiters of a block: err = 0 looks the block up again, else their piece fails. */
void fault_resolve(struct volume *v, uint64_t block, int err);
void fault_resolve_range(struct volume *v, uint64_t block, uint64_t count, int err);
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
/* Forget queued faults of a volume that closes. */
void fault_forget(struct engine *e, uint64_t cookie);

#endif
