#include "loop/outbox.h"

#include <stdlib.h>
#include <time.h>

void outbox_init(struct outbox *o)
{
    pthread_condattr_t attr;

    pthread_mutex_init(&o->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&o->cond, &attr);
    pthread_condattr_destroy(&attr);
    list_init(&o->items);
    o->count = 0;
    o->wakes = 0;
    o->closed = false;
}

void outbox_put(struct outbox *o, struct list *item)
{
    pthread_mutex_lock(&o->lock);
    list_append(&o->items, item);
    o->count++;
    pthread_cond_signal(&o->cond);
    pthread_mutex_unlock(&o->lock);
}

void outbox_close(struct outbox *o)
{
    pthread_mutex_lock(&o->lock);
    o->closed = true;
    pthread_cond_broadcast(&o->cond);
    pthread_mutex_unlock(&o->lock);
}

void outbox_wake(struct outbox *o)
{
    pthread_mutex_lock(&o->lock);
    o->wakes++;
    pthread_cond_broadcast(&o->cond);
    pthread_mutex_unlock(&o->lock);
}

static bool has_item(const struct outbox *o, const struct list *also, const bool *flag)
{
    return !list_empty(&o->items) || !list_empty(also) || (flag && *flag);
}

int outbox_wait(struct outbox *o, int timeout_ms) { return outbox_wait_for(o, &o->items, NULL, timeout_ms); }

int outbox_wait_for(struct outbox *o, const struct list *also, const bool *flag, int timeout_ms)
{
    struct timespec until;
    uint64_t deadline = now_ns() + (uint64_t)(timeout_ms < 0 ? 0 : timeout_ms) * 1000000u;

    until.tv_sec = (time_t)(deadline / 1000000000u);
    until.tv_nsec = (long)(deadline % 1000000000u);
    pthread_mutex_lock(&o->lock);
    for (uint64_t wakes = o->wakes; !has_item(o, also, flag);) {
        if (o->closed)
            return -ESHUTDOWN;
        if (o->wakes != wakes)
            return 0;
        if (pthread_cond_timedwait(&o->cond, &o->lock, &until) == ETIMEDOUT && !has_item(o, also, flag))
            return o->closed ? -ESHUTDOWN : 0;
    }
    return 1;
}

void outbox_destroy(struct outbox *o)
{
    for (struct list *e; (e = list_pop(&o->items));)
        free(e); /* link is the first member of both item types */
    pthread_cond_destroy(&o->cond);
    pthread_mutex_destroy(&o->lock);
}
