/*
 * BLOCK_STATUS of what may have changed since a snapshot: windows, and the log on top of them. changed.h says why that
 * is right.
 *
 * The work grows with what is found, as in io_status.c, and STEPS bound it: an answer may end early.
 */
#include "volume/changed.h"

#include "volume/fault.h"
#include "volume/io.h"
#include "volume/volume.h"

#include <stdlib.h>
#include <string.h>

#define KEPT_PART 64 /* of the map budget, for windows of all volumes; more are used once */
#define KEPT_NS 5000000000u
#define STEPS 32768

struct changed_window {
    uint64_t born_ns, last_segment;
    uint64_t first, end; /* sectors */
    bool changed;        /* `first` */
    uint32_t count;
    uint64_t edges[];
};

static uint64_t bytes_of(const struct changed_window *w) { return sizeof(*w) + w->count * sizeof(w->edges[0]); }

/* NULL: there is none any more. */
static void set_window(struct volume *v, struct changed *context, struct changed_window *window)
{
    uint64_t more = window ? bytes_of(window) : 0, less = context->window ? bytes_of(context->window) : 0;

    v->changed_bytes += more - less;
    atomic_fetch_add_explicit(&v->engine->window_bytes, more - less, memory_order_relaxed); /* wraps the right way */
    free(context->window);
    context->window = window;
}

static bool too_many_windows(const struct volume *v)
{
    uint64_t used = atomic_load_explicit(&v->engine->window_bytes, memory_order_relaxed);

    return used > v->engine->config.map_budget / KEPT_PART;
}

void changed_end(struct volume *v, struct changed *context)
{
    set_window(v, context, NULL);
    volume_count_memory(v);
}

/* ---- the answer ------------------------------------------------------------------------------ */

struct part {
    uint64_t end; /* sectors */
    bool changed;
};

/* What the window says from a sector on that is in it. */
static struct part window_part(const struct changed_window *w, uint64_t sector)
{
    uint32_t low = 0, high = w->count; /* edges before `low` are not behind the sector, those from `high` on are */

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (w->edges[middle] <= sector)
            low = middle + 1;
        else
            high = middle;
    }
    return (struct part){low < w->count ? w->edges[low] : w->end, w->changed != (low % 2 != 0)};
}

static bool is_later(const struct changed_window *w, uint64_t pos) { return pos && pos_seq(pos) > w->last_segment; }

static struct part next_part(const struct volume *v, const struct changed_window *w, uint64_t sector, uint64_t end)
{
    uint64_t block = sector / BLOCK_SECTORS;
    struct log_view view = log_map_view(&v->map, block);
    struct part part = window_part(w, sector);
    struct zero_extent zeros;

    if (view.pos) {
        part.end = sector + 1;
        part.changed |= is_later(w, log_map_find(&v->map, sector));
        return part;
    }
    part.end = min_u64(part.end, end);
    if (zero_map_next(&v->map.zeros, block, &zeros)) {
        bool here = zeros.start <= block;
        part.changed |= here && is_later(w, zeros.pos);
        part.end = min_u64(part.end, (here ? zeros.end : zeros.start) * BLOCK_SECTORS);
    }
    uint64_t leaf = log_map_next_leaf(&v->map, block + 1, div_up(part.end, BLOCK_SECTORS));
    part.end = min_u64(part.end, leaf * BLOCK_SECTORS);
    return part;
}

static bool covers(const struct volume *v, const struct changed_window *w, uint64_t sector)
{
    return w && sector >= w->first && sector < w->end && w->last_segment >= v->forgotten_seq &&
           elapsed_ns(now_ns(), w->born_ns) < KEPT_NS;
}

void changed_status(struct io_req *req)
{
    struct volume *v = req->volume;
    struct changed *context = req->changed;
    struct io_extents *out = (struct io_extents *)(void *)req->buf;
    uint64_t at = req->offset, end = at + min_u64(req->length, IO_STATUS_BYTES);

    out->count = 0;
    if (!v->failed && !covers(v, context->window, at / SECTOR)) {
        context->ticket = context->ticket ? context->ticket : ++v->tickets;
        req->pending = 1; /* for who fails it while it waits */
        int err = fault_wait_changed(v, context, at / GLIDE_BLOCK, req);
        if (err)
            io_finish(req, -err);
        return;
    }
    for (uint32_t steps = STEPS; !v->failed && at < end && steps; steps--) {
        const struct changed_window *w = context->window;
        if (at / SECTOR >= w->end)
            break;
        struct part part = next_part(v, w, at / SECTOR, div_up(end, SECTOR));
        uint64_t stop = min_u64(part.end * SECTOR, end);
        if (!io_add_extent(out, stop - at, part.changed))
            break;
        at = stop;
    }
    io_finish(req, v->failed);
}

/* ---- what Python says -------------------------------------------------------------------------- */

struct changed_task {
    struct task task;
    struct volume *v;
    struct changed_window *window; /* NULL: none */
    uint64_t ticket;
    int err;
};

static void run_changed(struct task *task, struct worker *w)
{
    struct changed_task *t = container_of(task, struct changed_task, task);
    struct volume *v = t->v;
    struct changed *context = fault_changed(v, t->ticket);

    (void)w;
    if (context && t->window) {
        t->window->born_ns = now_ns();
        set_window(v, context, t->window);
        t->window = NULL;
    }
    /* Who waits goes on at once, so each answer serves somebody, whatever happens to the window next. The context
     * outlives that: a connection ends in another step. */
    fault_resolve_changed(v, t->ticket, t->err);
    if (context && too_many_windows(v))
        set_window(v, context, NULL);
    volume_count_memory(v);
    free(t->window);
    free(t);
}

static bool is_sound(const struct glide_changed *answer, const uint64_t *edges, uint32_t count)
{
    uint64_t before = answer->first;

    for (uint32_t i = 0; i < count; before = edges[i++])
        if (edges[i] <= before)
            return false;
    return answer->end ? before < answer->end : !count;
}

int glide_volume_install_changed(glide_volume *volume, const struct glide_changed *answer, const uint64_t *edges,
                                 uint32_t count)
{
    if (answer->err < 0 || !is_sound(answer, edges, count))
        return fail(-EINVAL, "the edges of a window are not in order");
    struct changed_task *t = calloc(1, sizeof(*t));
    if (t && answer->end && !answer->err) {
        t->window = calloc(1, sizeof(*t->window) + count * sizeof(*edges));
        if (!t->window) {
            free(t);
            t = NULL;
        }
    }
    if (!t)
        return fail(-ENOMEM, "no memory for %u edges", count);
    t->task.run = run_changed;
    t->v = volume;
    t->ticket = answer->ticket;
    t->err = answer->err;
    if (t->window) {
        *t->window = (struct changed_window){.last_segment = answer->last_segment,
                                             .first = answer->first,
                                             .end = answer->end,
                                             .changed = answer->changed != 0,
                                             .count = count};
        memcpy(t->window->edges, edges, count * sizeof(*edges));
    }
    if (worker_post(volume->worker, &t->task))
        return 0;
    free(t->window);
    free(t);
    return fail(-ESHUTDOWN, "the volume was handed over");
}
