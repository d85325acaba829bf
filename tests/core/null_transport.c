/*
 * A transport that reaches a volume from inside: the smallest one, to show what a transport must do, and that nothing
 * else has to know it. It is linked with the core as it is.
 */
#include "volume/volume.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(x)                                                                                                        \
    do {                                                                                                               \
        int err_ = (x);                                                                                                \
        if (err_) {                                                                                                    \
            fprintf(stderr, "line %d: %d %s\n", __LINE__, err_, glide_error());                                        \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define CHECK(x) MUST((x) ? 0 : 1)

struct null_transport {
    struct transport transport;
    struct volume *volume;
    struct io_req req;
    struct call *waits; /* of who asked for a request */
    bool busy, held, ending, frozen, let_go, gone;
    uint8_t data[8192];
};

static struct null_transport *null_of(const struct transport *t)
{
    return container_of(t, struct null_transport, transport);
}

static void leave_if_done(struct null_transport *n)
{
    if (!n->ending || n->busy || n->gone)
        return;
    n->gone = true;
    transport_leave(n->volume, &n->transport);
    volume_idle_check(n->volume);
}

static void on_done(struct io_req *req, int err)
{
    struct null_transport *n = container_of(req, struct null_transport, req);

    n->busy = false;
    call_done(n->waits, -err);
    leave_if_done(n);
}

static void begin(struct null_transport *n)
{
    n->busy = true;
    io_submit(&n->req);
}

static void freeze(struct transport *t) { null_of(t)->frozen = true; }

static void unfreeze(struct transport *t)
{
    struct null_transport *n = null_of(t);

    n->frozen = false;
    if (n->held)
        begin(n);
    n->held = false;
}

static void close_it(struct transport *t)
{
    null_of(t)->ending = true;
    leave_if_done(null_of(t));
}

static void let_go(struct transport *t) { null_of(t)->let_go = true; }

static bool idle(const struct transport *t)
{
    (void)t;
    return false; /* it is there */
}

static const struct transport_ops NULL_OPS = {
    .freeze = freeze, .unfreeze = unfreeze, .close = close_it, .let_go = let_go, .idle = idle};

/* ---- who uses it ---------------------------------------------------------------------------------- */

static int attach(struct worker *w, void *arg)
{
    struct null_transport *n = arg;

    (void)w;
    transport_enter(n->volume, &n->transport, &NULL_OPS);
    return 0;
}

static void start(struct call *call, struct worker *w)
{
    struct null_transport *n = call->arg;

    (void)w;
    n->waits = call;
    n->held = n->frozen;
    if (!n->held)
        begin(n);
}

static int request(struct null_transport *n, uint8_t op, uint64_t offset)
{
    struct call call;

    n->req = (struct io_req){.volume = n->volume,
                             .buf = n->data,
                             .offset = offset,
                             .length = op == GLIDE_FLUSH ? 0 : sizeof(n->data),
                             .tag = n,
                             .op = op,
                             .done = on_done};
    return call_run(n->volume->worker, &call, start, n);
}

static void *read_while_frozen(void *arg)
{
    MUST(request(arg, GLIDE_READ, 0));
    return NULL;
}

int main(int argc, char **argv)
{
    struct glide_engine_config config = {.cache_dir = argv[argc - 1],
                                         .cache_bytes = 1 << 20,
                                         .log_limit = 1 << 20,
                                         .map_budget = 1 << 20,
                                         .nbd_memory = 64u << 20,
                                         .segment_sectors = 32,
                                         .workers = 1};
    struct glide_volume_config volume = {.cookie = 1, .log_dir = argv[1], .size = 1 << 20};
    struct null_transport n = {.busy = false};
    struct glide_recovery recovery;
    struct glide_cutover at;
    glide_engine *engine;
    pthread_t thread;

    MUST(glide_engine_open(&config, &engine));
    MUST(glide_volume_open(engine, &volume, &n.volume, &recovery));
    MUST(worker_call(n.volume->worker, attach, &n));
    memset(n.data, 7, sizeof(n.data));
    MUST(request(&n, GLIDE_WRITE, 0));
    MUST(request(&n, GLIDE_FLUSH, 0));

    MUST(glide_volume_freeze(n.volume, &at));
    CHECK(n.frozen && at.last_seq == 1);
    memset(n.data, 0, sizeof(n.data));
    pthread_create(&thread, NULL, read_while_frozen, &n);
    MUST(glide_volume_unfreeze(n.volume)); /* before or after the request came: it is served */
    pthread_join(thread, NULL);
    CHECK(!n.frozen && n.data[0] == 7 && n.data[sizeof(n.data) - 1] == 7);

    glide_engine_end_workers(engine);
    CHECK(n.let_go && n.gone);
    MUST(glide_volume_close(n.volume));
    glide_engine_close(engine);
    puts("served, frozen, let go");
    return 0;
}
