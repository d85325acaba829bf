/*
 * A queue from workers to Python threads.
 */
#ifndef GLIDE_OUTBOX_H
#define GLIDE_OUTBOX_H

#include "base/util.h"

#include <pthread.h>

struct outbox {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    struct list items;
    uint64_t count;
    uint64_t wakes; /* how often outbox_wake was called */
    bool closed;
};

void outbox_init(struct outbox *o);
void outbox_close(struct outbox *o); /* wake everybody for good */
void outbox_wake(struct outbox *o);  /* end the waits of now */
void outbox_destroy(struct outbox *o);
/* The item was malloc'ed, with its list first. */
void outbox_put(struct outbox *o, struct list *item);
/* Lock and wait for an item. 1 = there is one, 0 = timeout, -ESHUTDOWN; locked in any case. */
int outbox_wait(struct outbox *o, int timeout_ms);
/* The same, for an item of this list, too, or for a flag (or NULL): the lock guards them, the condition tells of them.
 */
int outbox_wait_for(struct outbox *o, const struct list *also, const bool *flag, int timeout_ms);

#endif
