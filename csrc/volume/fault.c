#include "volume/fault.h"

#include "volume/changed.h"
#include "volume/io.h"
#include "volume/volume.h"

#include <stdlib.h>

struct fault {
    struct list link;
    uint64_t cookie, block, stamp, order;
    uint32_t chunks; /* see struct glide_fault, also for the next two */
    uint64_t ticket, snapshot;
};

/* With a chunk: a key of volume->faults, of those that ask what of it is zero. */
#define HOLES_KEY ((uint64_t)1 << 62)
/* With a ticket: of those that ask what changed. */
#define CHANGED_KEY ((uint64_t)1 << 61)

struct event {
    struct list link;
    struct glide_event event;
};

/* ---- events ----------------------------------------------------------------------------- */

void event_post(struct engine *e, uint64_t volume, uint32_t kind, uint64_t a, uint64_t b)
{
    struct event *item = malloc(sizeof(*item));

    if (!item)
        return; /* Python also polls: an event only makes it prompt */
    item->event = (struct glide_event){.volume = volume, .a = a, .b = b, .kind = kind};
    outbox_put(&e->events, &item->link);
}

int glide_events_next(glide_engine *engine, int timeout_ms, struct glide_event *out, uint32_t max)
{
    struct outbox *o = &engine->events;
    int n = outbox_wait(o, timeout_ms);

    if (n > 0) {
        for (n = 0; (uint32_t)n < max && !list_empty(&o->items); n++) {
            struct event *item = container_of(list_pop(&o->items), struct event, link);
            out[n] = item->event;
            o->count--;
            free(item);
        }
    }
    pthread_mutex_unlock(&o->lock);
    return n;
}

/* ---- the queue of faults -------------------------------------------------------------------- */

/* Take the neighbours of *out out of the queue, so that one request to the store serves them all. */
static void take_neighbours(struct outbox *o, struct glide_fault *out, uint32_t max_blocks)
{
    struct list *next;
    int looked = 0;

    for (struct list *at = o->items.next; at != &o->items && out->count < max_blocks && looked < 1024; at = next) {
        struct fault *f = container_of(at, struct fault, link);
        next = at->next;
        looked++;
        bool after = f->block == out->block + out->count, before = f->block + 1 == out->block;
        if (f->cookie != out->volume || f->chunks || f->ticket || (!after && !before))
            continue;
        if (before)
            out->block = f->block;
        out->count++;
        out->stamp = min_u64(out->stamp, f->stamp);
        list_remove(at);
        o->count--;
        free(f);
    }
}

int glide_faults_next(glide_engine *engine, uint32_t max_blocks, int timeout_ms, struct glide_fault *out)
{
    struct outbox *o = &engine->faults;
    int got = outbox_wait(o, timeout_ms);

    if (got > 0) {
        struct fault *f = container_of(list_pop(&o->items), struct fault, link);
        *out = (struct glide_fault){.volume = f->cookie,
                                    .block = f->block,
                                    .stamp = f->stamp,
                                    .count = 1,
                                    .chunks = f->chunks,
                                    .ticket = f->ticket,
                                    .snapshot = f->snapshot};
        o->count--;
        free(f);
        if (!out->chunks && !out->ticket)
            take_neighbours(o, out, max_blocks);
    }
    pthread_mutex_unlock(&o->lock);
    return got;
}

/* ---- faults and what was carried, many at once ---- */

struct carried {
    struct list link; /* first: see outbox_destroy */
    struct glide_carried carried;
};

int carried_post(struct engine *e, const struct glide_carried *carried)
{
    struct carried *item = malloc(sizeof(*item));

    if (!item)
        return -ENOMEM;
    item->carried = *carried;
    pthread_mutex_lock(&e->faults.lock);
    list_append(&e->carried, &item->link);
    pthread_cond_broadcast(&e->faults.cond); /* who waits for faults alone does not take it */
    pthread_mutex_unlock(&e->faults.lock);
    return 0;
}

void carried_forget(struct engine *e)
{
    for (struct list *l; (l = list_pop(&e->carried));)
        free(container_of(l, struct carried, link));
}

int glide_news_next(glide_engine *engine, int timeout_ms, uint32_t linger_us, struct glide_fault *faults,
                    struct glide_carried *carried, uint32_t max[2])
{
    struct outbox *o = &engine->faults;
    int got = outbox_wait_for(o, &engine->carried, &engine->poked, timeout_ms);
    uint32_t count[2] = {0, 0};

    engine->poked = false;
    if (got > 0 && linger_us) {
        struct timespec pause = {.tv_nsec = 1000L * (long)min_u64(linger_us, 100000)};
        pthread_mutex_unlock(&o->lock);
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&o->lock);
    }
    for (; got > 0 && count[0] < max[0] && !list_empty(&o->items); count[0]++) {
        struct fault *f = container_of(list_pop(&o->items), struct fault, link);
        faults[count[0]] = (struct glide_fault){.volume = f->cookie,
                                                .block = f->block,
                                                .stamp = f->stamp,
                                                .count = 1,
                                                .chunks = f->chunks,
                                                .order = f->order,
                                                .ticket = f->ticket,
                                                .snapshot = f->snapshot};
        o->count--;
        free(f);
    }
    for (; got > 0 && count[1] < max[1] && !list_empty(&engine->carried); count[1]++) {
        struct carried *item = container_of(list_pop(&engine->carried), struct carried, link);
        carried[count[1]] = item->carried;
        free(item);
    }
    pthread_mutex_unlock(&o->lock);
    max[0] = count[0];
    max[1] = count[1];
    return got < 0 ? got : (int)(count[0] + count[1]);
}

void glide_news_poke(glide_engine *engine)
{
    pthread_mutex_lock(&engine->faults.lock);
    engine->poked = true;
    pthread_cond_broadcast(&engine->faults.cond);
    pthread_mutex_unlock(&engine->faults.lock);
}

void fault_forget(struct engine *e, uint64_t cookie)
{
    struct outbox *o = &e->faults;
    struct list *next;

    pthread_mutex_lock(&o->lock);
    for (struct list *at = o->items.next; at != &o->items; at = next) {
        struct fault *f = container_of(at, struct fault, link);
        next = at->next;
        if (f->cookie == cookie) {
            list_remove(at);
            o->count--;
            free(f);
        }
    }
    pthread_mutex_unlock(&o->lock);
}

/* ---- who waits for which block ------------------------------------------------------------------ */

struct waiter {
    struct waiter *next;
    struct io_req *req;
};
struct waiting {
    struct waiter *first;
};

/* Let a request wait under `key`; what is asked of Python, unless somebody waits already, is `ask`. */
static int wait_for(struct volume *v, uint64_t key, struct io_req *req, struct fault ask)
{
    struct waiter *w = malloc(sizeof(*w));
    uint64_t *entry = w ? table_insert(&v->faults, key) : NULL;

    if (!entry) {
        free(w);
        return -ENOMEM;
    }
    if (!*entry) {
        struct waiting *fresh = calloc(1, sizeof(*fresh));
        struct fault *f = fresh ? malloc(sizeof(*f)) : NULL;
        if (!f) {
            free(fresh);
            free(w);
            table_remove(&v->faults, key);
            return -ENOMEM;
        }
        *entry = (uint64_t)(uintptr_t)fresh;
        *f = ask;
        f->order = atomic_fetch_add(&v->engine->fault_order, 1) + 1;
        outbox_put(&v->engine->faults, &f->link);
        stat_add(&v->stats.faults, 1);
    }
    struct waiting *waiting = (struct waiting *)(uintptr_t)*entry;
    *w = (struct waiter){waiting->first, req};
    waiting->first = w;
    v->waiting++;
    worker_want_tick(v->worker);
    return 0;
}

int fault_wait(struct volume *v, uint64_t block, struct io_req *req)
{
    return wait_for(v, block, req,
                    (struct fault){.cookie = v->cookie, .block = block, .stamp = atomic_load(&v->stamp)});
}

int fault_wait_holes(struct volume *v, uint64_t chunk, uint32_t chunks, struct io_req *req)
{
    return wait_for(
        v, HOLES_KEY | chunk, req,
        (struct fault){
            .cookie = v->cookie, .block = chunk * GLIDE_GROUP, .stamp = atomic_load(&v->stamp), .chunks = chunks});
}

void fault_resolve(struct volume *v, uint64_t block, int err)
{
    uint64_t *entry = table_find(&v->faults, block);

    if (!entry)
        return;
    if (v->frozen && !v->failed && !v->closing) { /* who looks again would begin a read */
        v->answers_missed = true;
        return;
    }
    struct waiting *waiting = (struct waiting *)(uintptr_t)*entry;
    table_remove(&v->faults, block); /* first: a waiter that looks again may wait again */
    struct waiter *next;
    for (struct waiter *w = waiting->first; w; w = next) {
        next = w->next;
        v->waiting--;
        if (err)
            io_piece_done(w->req, err);
        else if (w->req->op == IO_STATUS)
            io_status(w->req);
        else
            io_read_piece(w->req, block);
        free(w);
    }
    free(waiting);
}

void fault_resolve_holes(struct volume *v, uint64_t chunk, int err) { fault_resolve(v, HOLES_KEY | chunk, err); }

int fault_wait_changed(struct volume *v, const struct changed *context, uint64_t block, struct io_req *req)
{
    return wait_for(v, CHANGED_KEY | context->ticket, req,
                    (struct fault){.cookie = v->cookie,
                                   .block = block,
                                   .stamp = atomic_load(&v->stamp),
                                   .ticket = context->ticket,
                                   .snapshot = context->snapshot});
}

struct changed *fault_changed(struct volume *v, uint64_t ticket)
{
    const uint64_t *entry = table_find(&v->faults, CHANGED_KEY | ticket);
    const struct waiter *first = entry ? ((struct waiting *)(uintptr_t)*entry)->first : NULL;

    return first ? first->req->changed : NULL;
}

void fault_resolve_changed(struct volume *v, uint64_t ticket, int err) { fault_resolve(v, CHANGED_KEY | ticket, err); }

uint64_t fault_waiting(const struct volume *v) { return v->waiting; }

struct longest {
    uint64_t now_ns, wait_ns;
};

static bool look_at_waiters(uint64_t block, uint64_t value, void *arg)
{
    struct longest *l = arg;

    (void)block;
    for (const struct waiter *w = ((struct waiting *)(uintptr_t)value)->first; w; w = w->next) {
        uint64_t ns = elapsed_ns(l->now_ns, w->req->start_ns);
        l->wait_ns = ns > l->wait_ns ? ns : l->wait_ns;
    }
    return false;
}

uint64_t fault_longest_wait_ns(struct volume *v, uint64_t now)
{
    struct longest longest = {.now_ns = now};

    if (v->waiting)
        table_filter(&v->faults, look_at_waiters, &longest);
    return longest.wait_ns;
}

/* Which waiters to resolve. The blocks are collected by a filter that removes nothing. One whose waiters were all
 * cancelled is chosen where neither a time nor a tag is asked for. */
struct selection {
    uint64_t *blocks;
    uint64_t count;
    uint64_t first, end;           /* blocks */
    const struct block_map *zeros; /* NULL, or only blocks that are zero in it */
    const void *tag;               /* NULL, or only waiters of it */
    uint64_t now_ns, limit_ns;     /* limit 0, or only waiters that came longer ago than that */
};

static bool is_partial(const struct selection *s) { return s->tag || s->limit_ns; }

static bool is_chosen(const struct selection *s, const struct waiter *w)
{
    return (!s->tag || w->req->tag == s->tag) &&
           (!s->limit_ns || elapsed_ns(s->now_ns, w->req->start_ns) > s->limit_ns);
}

static bool select_block(uint64_t block, uint64_t value, void *arg)
{
    struct selection *s = arg;
    bool chosen = !is_partial(s);
    uint64_t key = block;

    if (s->zeros && block & HOLES_KEY) /* of a chunk that is zero all of its blocks are */
        block = (block & ~HOLES_KEY) * GLIDE_GROUP;
    if (block < s->first || block >= s->end || (s->zeros && block_map_find(s->zeros, block).kind != BASE_ZERO))
        return false;
    for (struct waiter *w = ((struct waiting *)(uintptr_t)value)->first; w && !chosen; w = w->next)
        chosen = is_chosen(s, w);
    if (chosen)
        s->blocks[s->count++] = key;
    return false;
}

/* Fail the chosen waiters of a block. The block stays in the table: Python's answer will come for the others, and for
 * who comes meanwhile. */
static void cancel_block(struct volume *v, uint64_t block, const struct selection *s, int err)
{
    uint64_t *entry = table_find(&v->faults, block);
    struct waiter *cancelled = NULL;

    if (!entry)
        return;
    for (struct waiter **at = &((struct waiting *)(uintptr_t)*entry)->first; *at;) {
        struct waiter *w = *at;
        if (!is_chosen(s, w)) {
            at = &w->next;
            continue;
        }
        *at = w->next;
        w->next = cancelled;
        cancelled = w;
    }
    for (struct waiter *w = cancelled, *next; w; w = next) {
        next = w->next;
        v->waiting--;
        io_piece_done(w->req, err);
        free(w);
    }
}

static void resolve_selected(struct volume *v, struct selection s, int err)
{
    uint64_t total = table_count(&v->faults);

    s.blocks = total ? malloc(total * sizeof(uint64_t)) : NULL;
    if (!s.blocks)
        return;
    table_filter(&v->faults, select_block, &s);
    for (uint64_t i = 0; i < s.count; i++) {
        if (is_partial(&s))
            cancel_block(v, s.blocks[i], &s, err);
        else
            fault_resolve(v, s.blocks[i], err);
    }
    free(s.blocks);
}

void fault_cancel(struct volume *v, const void *tag, int err)
{
    resolve_selected(v, (struct selection){.end = UINT64_MAX, .tag = tag}, err);
}

void fault_resolve_all(struct volume *v, int err) { resolve_selected(v, (struct selection){.end = UINT64_MAX}, err); }

void fault_expire(struct volume *v, uint64_t now, uint64_t limit_ns)
{
    resolve_selected(v, (struct selection){.end = UINT64_MAX, .now_ns = now, .limit_ns = limit_ns}, EIO);
}

void fault_resolve_range(struct volume *v, uint64_t block, uint64_t count, int err)
{
    if (count <= 64) {
        for (uint64_t i = 0; i < count; i++)
            fault_resolve(v, block + i, err);
        return;
    }
    resolve_selected(v, (struct selection){.first = block, .end = block + count}, err);
}

void fault_resolve_zeros(struct volume *v, uint64_t block, uint64_t count)
{
    if (v->waiting)
        resolve_selected(v, (struct selection){.first = block, .end = block + count, .zeros = &v->base}, 0);
}

/* A block whose waiters were all cancelled stays in the table until Python answers, or the volume goes. */
static bool drop_block(uint64_t block, uint64_t value, void *arg)
{
    (void)block;
    (void)arg;
    free((struct waiting *)(uintptr_t)value);
    return true;
}

void fault_table_destroy(struct volume *v)
{
    table_filter(&v->faults, drop_block, NULL);
    table_destroy(&v->faults);
}
