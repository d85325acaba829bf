/*
 * The life of a device: from its front-end's connection to the end of that. The control thread, Python's, makes and
 * frees it; in between every change is a step on the worker.
 *
 * It ends when the front-end has gone, the export is taken away, or the volume closes: nothing more is begun, what
 * waits for the store or for space is given up, what runs ends. It leaves the volume when nothing of it is under way.
 * What was given up has no answer and stays in the record: the front-end brings that along when it comes back.
 *
 * A device whose memory or rings cannot be right is `broken`: it begins and answers nothing more, says why, and waits
 * for its end.
 */
#include "transport/vhost/vhost.h"

#include "volume/fault.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct vhost_device *device_of(const struct transport *t)
{
    return container_of(t, struct vhost_device, transport);
}

int vhost_broken(struct vhost_device *d, const char *format, ...)
{
    va_list args;

    if (atomic_load(&d->broken))
        return -EPROTO;
    va_start(args, format);
    if (atomic_load(&d->torn)) /* whatever came of that */
        snprintf(d->trouble, sizeof(d->trouble),
                 "its memory is not there any more: the file is shorter, or has no room");
    else
        vsnprintf(d->trouble, sizeof(d->trouble), format, args);
    va_end(args);
    atomic_store(&d->broken, true);
    vhost_end_later(d);
    event_post(d->volume->engine, d->volume->cookie, GLIDE_EV_VHOST_DOWN, d->config.id, 0);
    return -EPROTO;
}

int glide_vhost_trouble(glide_vhost *d, char *out, uint32_t room)
{
    return room ? snprintf(out, room, "%s", atomic_load(&d->broken) ? d->trouble : "") : 0;
}

void vhost_memory_drop(struct vhost_device *d, struct vhost_memory *m)
{
    if (!--m->refs)
        list_append(&d->retired, &m->link);
}

/* ---- the end --------------------------------------------------------------------------------------- */

static void leave(struct vhost_device *d)
{
    struct volume *v = d->volume;
    struct list calls;

    list_init(&calls);
    list_splice(&calls, &d->close_calls);
    list_remove(&d->serve_task.link);
    transport_leave(v, &d->transport);
    atomic_store(&d->left, true);
    for (struct list *e; (e = list_pop(&calls));)
        call_done(container_of(e, struct call, link), 0); /* d may be gone from here on */
    volume_idle_check(v);
}

static void at_end(struct task *task, struct worker *w)
{
    struct vhost_device *d = container_of(task, struct vhost_device, end_task);

    (void)w;
    if (atomic_load(&d->torn))
        vhost_broken(d, " ");
    if (!d->volume->frozen && !atomic_load(&d->broken))
        vhost_tell(d);
    vhost_queues_check(d);
    if (!d->ended)
        return;
    vhost_queues_end(d);
    if (!d->inflight && vhost_queues_idle(d))
        leave(d);
}

static void serve(struct task *task, struct worker *w)
{
    (void)w;
    vhost_serve(container_of(task, struct vhost_device, serve_task));
}

void vhost_serve_later(struct vhost_device *d)
{
    if (list_empty(&d->serve_task.link))
        worker_defer(d->worker, &d->serve_task);
}

void vhost_end_later(struct vhost_device *d) { worker_at_end(d->worker, ROUND_REPLY, &d->end_task); }

static void end(struct transport *t)
{
    struct vhost_device *d = device_of(t);

    if (d->ended)
        return;
    d->ended = true;
    vhost_drop_held(d);
    io_cancel(d->volume, d, ESHUTDOWN);
    worker_want_tick(d->worker);
    vhost_end_later(d);
}

/* ---- what the volume asks ---------------------------------------------------------------------------- */

static bool tick(struct transport *t)
{
    struct vhost_device *d = device_of(t);

    if (!d->ended)
        return false;
    io_cancel(d->volume, d, ESHUTDOWN); /* what came back from a read meanwhile may wait again */
    vhost_end_later(d);
    return true;
}

static void freeze(struct transport *t)
{
    struct vhost_device *d = device_of(t);

    vhost_note_logged(d);
    if (!atomic_load(&d->broken))
        vhost_tell(d);
}

static void unfreeze(struct transport *t)
{
    struct vhost_device *d = device_of(t);

    vhost_answer_held(d);
    vhost_serve_later(d);
}

/* It counts until it has left. */
static bool is_idle(const struct transport *t)
{
    (void)t;
    return false;
}

static const struct transport_ops VHOST_OPS = {
    .tick = tick, .freeze = freeze, .unfreeze = unfreeze, .close = end, .idle = is_idle};

/* ---- open, close -------------------------------------------------------------------------------------- */

struct device_call {
    struct vhost_device *d;
    int (*fn)(struct worker *w, void *arg);
    void *arg;
};

static int while_there(struct worker *w, void *arg)
{
    struct device_call *c = arg;

    if (atomic_load(&c->d->left) || c->d->ended)
        return fail(-ESHUTDOWN, "the volume closes");
    if (atomic_load(&c->d->broken))
        return fail(-ESHUTDOWN, "the device has stopped");
    return c->fn(w, c->arg);
}

int vhost_call(struct vhost_device *d, int (*fn)(struct worker *w, void *arg), void *arg)
{
    return worker_call(d->worker, while_there, &(struct device_call){.d = d, .fn = fn, .arg = arg});
}

static int enter(struct worker *w, void *arg)
{
    struct vhost_device *d = arg;

    (void)w;
    if (d->volume->closing || d->volume->failed)
        return d->volume->closing ? -ESHUTDOWN : -d->volume->failed;
    transport_enter(d->volume, &d->transport, &VHOST_OPS);
    return 0;
}

static void free_retired(struct list *retired)
{
    for (struct list *e; (e = list_pop(retired));)
        vhost_memory_free(container_of(e, struct vhost_memory, link));
}

static void device_free(struct vhost_device *d)
{
    vhost_queues_free(d);
    vhost_free_unused(d);
    if (d->memory)
        vhost_memory_drop(d, d->memory);
    free_retired(&d->retired);
    vhost_map_close(&d->record);
    free(d);
}

int glide_vhost_open(glide_volume *volume, const struct glide_vhost_config *config, glide_vhost **out)
{
    struct vhost_device *d = calloc(1, sizeof(*d));

    *out = NULL;
    if (!d)
        return -ENOMEM;
    d->volume = volume;
    d->worker = volume->worker;
    d->config = *config;
    d->serve_task.run = serve;
    d->end_task.run = at_end;
    struct list *lists[] = {&d->retired, &d->unused, &d->held, &d->serve_task.link, &d->end_task.link, &d->close_calls};
    for (size_t i = 0; i < ARRAY_LEN(lists); i++)
        list_init(lists[i]);
    vhost_queues_init(d);
    int err = vhost_memory_new(NULL, NULL, 0, &d->torn, &d->memory);
    if (!err)
        err = worker_call(d->worker, enter, d);
    if (err) {
        device_free(d);
        return fail(err, "the export takes no front-end: %s", strerror(-err));
    }
    *out = d;
    return 0;
}

static int do_end(struct worker *w, void *arg)
{
    struct vhost_device *d = arg;

    (void)w;
    if (!atomic_load(&d->left))
        end(&d->transport);
    return 0;
}

void glide_vhost_end(glide_vhost *d)
{
    if (!atomic_load(&d->left)) /* a worker that has ended has made it leave */
        worker_call(d->worker, do_end, d);
}

static void start_close(struct call *call, struct worker *w)
{
    struct vhost_device *d = call->arg;

    (void)w;
    if (atomic_load(&d->left)) {
        call_done(call, 0);
        return;
    }
    list_append(&d->close_calls, &call->link);
    end(&d->transport);
}

int glide_vhost_close(glide_vhost *d)
{
    struct call call;

    if (!atomic_load(&d->left))
        call_run(d->worker, &call, start_close, d);
    device_free(d);
    return 0;
}

/* ---- what the front-end says ----------------------------------------------------------------------------- */

struct change {
    struct vhost_device *d;
    uint64_t features;
    bool writeback;
    struct vhost_memory *memory;
    struct list *retired;
    struct vhost_map record;
    uint64_t offset;
    uint32_t queues, depth;
};

static int do_features(struct worker *w, void *arg)
{
    struct change *c = arg;

    (void)w;
    c->d->features = c->features;
    c->d->writeback = c->writeback;
    return 0;
}

int glide_vhost_features(glide_vhost *d, uint64_t features, int writeback)
{
    return vhost_call(d, do_features, &(struct change){.d = d, .features = features, .writeback = writeback != 0});
}

static int do_memory(struct worker *w, void *arg)
{
    struct change *c = arg;
    struct vhost_device *d = c->d;

    (void)w;
    vhost_memory_drop(d, d->memory);
    d->memory = c->memory;
    vhost_queues_map(d);
    list_splice(c->retired, &d->retired);
    vhost_serve_later(d);
    return 0;
}

int glide_vhost_memory(glide_vhost *d, const struct glide_vhost_region *list, uint32_t count)
{
    struct list retired;
    struct change c = {.d = d, .retired = &retired};
    int err = vhost_memory_new(d->memory, list, count, &d->torn, &c.memory);

    list_init(&retired);
    if (!err)
        err = vhost_call(d, do_memory, &c);
    if (err && c.memory)
        vhost_memory_free(c.memory);
    free_retired(&retired);
    return err;
}

uint64_t glide_vhost_inflight_bytes(uint32_t depth)
{
    return div_up(sizeof(struct vhost_record) + (uint64_t)depth * sizeof(struct vhost_entry), 64) * 64;
}

static int do_record(struct worker *w, void *arg)
{
    struct change *c = arg;
    struct vhost_device *d = c->d;
    struct vhost_map before = d->record;

    (void)w;
    for (uint32_t i = 0; i < GLIDE_VHOST_QUEUES; i++)
        if (d->rings[i].started)
            return fail(-EBUSY, "queue %u runs", i);
    d->record = c->record;
    d->record_offset = c->offset;
    d->record_queues = c->queues;
    d->record_depth = c->depth;
    c->record = before;
    return 0;
}

int glide_vhost_inflight(glide_vhost *d, int fd, uint64_t offset, uint32_t queues, uint32_t depth)
{
    struct change c = {.d = d, .offset = offset, .queues = queues, .depth = depth};

    if (!queues || queues > GLIDE_VHOST_QUEUES || !depth || depth > GLIDE_VHOST_DEPTH || offset % 64 ||
        offset > (uint64_t)1 << 40)
        return fail(-EINVAL, "a record of requests in flight of %u queues of %u cannot be", queues, depth);
    int err = vhost_map_open(fd, offset + queues * glide_vhost_inflight_bytes(depth), &d->torn, &c.record);
    if (!err)
        err = vhost_call(d, do_record, &c);
    vhost_map_close(&c.record); /* the one before, or what was refused */
    return err;
}
