/*
 * Life of a ublk device, from control threads: add or recover, start, stop,
 * release. Each public call does its kernel commands in the calling thread and
 * hands the queue to, or takes it from, the volume's worker.
 *
 * A released device stays open until its worker has ended: its slots are bound to
 * that thread, and only the end of the thread's ring gives them back.
 */
#include "volume/fault.h"
#include "transport/ublk/ublk_ctrl.h"
#include "transport/ublk/ublk_queue.h"
#include "volume/volume.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define START_TIMEOUT_MS 60000u
#define DELETE_TIMEOUT_MS 15000u
#define STOP_TIMEOUT_MS 10000u
#define RECOVERY_TIMEOUT_MS 30000u
#define WANTED                                                                                                         \
    (UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE | UBLK_F_USER_COPY | UBLK_F_UPDATE_SIZE | UBLK_F_QUIESCE)

static pthread_mutex_t ctrl_lock = PTHREAD_MUTEX_INITIALIZER;
static struct ublk_ctrl *shared_ctrl; /* opened on first use, for the life of the process */

static int get_ctrl(struct ublk_ctrl **out)
{
    pthread_mutex_lock(&ctrl_lock);
    int err = shared_ctrl ? 0 : ublk_ctrl_open(&shared_ctrl);
    *out = shared_ctrl;
    pthread_mutex_unlock(&ctrl_lock);
    if (err)
        return fail(err, "cannot open /dev/ublk-control: %s (%s)", strerror(-err),
                    err == -ENOENT ? "load the driver with `modprobe ublk_drv`" : "it needs root");
    return 0;
}

int glide_ublk_features(uint64_t *features)
{
    struct ublk_ctrl *ctrl;
    int err = get_ctrl(&ctrl);

    return err ? err : ublk_ctrl_features(ctrl, features);
}

int glide_ublk_query(uint32_t dev_id, struct glide_ublk_info *out)
{
    struct ublk_ctrl *ctrl;
    struct ublk_dev_info info;
    struct ublk_params params;
    int err = get_ctrl(&ctrl);

    if (!err)
        err = ublk_ctrl_get_info(ctrl, dev_id, &info);
    if (err)
        return err;
    memset(&params, 0, sizeof(params));
    ublk_ctrl_get_params(ctrl, dev_id, &params); /* not set yet: 0 sectors */
    *out = (struct glide_ublk_info){.dev_id = info.dev_id,
                                    .queues = info.nr_hw_queues,
                                    .depth = info.queue_depth,
                                    .state = info.state,
                                    .max_io_bytes = info.max_io_buf_bytes,
                                    .server_pid = info.ublksrv_pid,
                                    .flags = info.flags,
                                    .tag = info.ublksrv_flags,
                                    .dev_sectors = params.basic.dev_sectors};
    return 0;
}

int glide_ublk_delete(uint32_t dev_id, uint64_t expected_tag)
{
    struct ublk_ctrl *ctrl;
    struct ublk_dev_info info;
    int err = get_ctrl(&ctrl);

    if (!err)
        err = ublk_ctrl_get_info(ctrl, dev_id, &info);
    if (err)
        return err;
    if (info.ublksrv_flags != expected_tag)
        return fail(-EPERM, "ublk device %u belongs to somebody else", dev_id);
    ublk_ctrl_stop(ctrl, dev_id, 0);
    return ublk_ctrl_del(ctrl, dev_id, DELETE_TIMEOUT_MS);
}

/* ---- memory and descriptors of a device ------------------------------------------------------- */

static void device_close(struct ublk_device *d)
{
    if (d->descriptors)
        munmap((void *)(uintptr_t)d->descriptors, d->descriptor_bytes);
    if (d->cdev >= 0)
        close(d->cdev);
    free(d->tags);
}

static void device_free(struct ublk_device *d)
{
    device_close(d);
    free(d);
}

static int open_queue(struct ublk_device *d)
{
    uint32_t depth = d->info.queue_depth;

    if (!(d->info.flags & UBLK_F_USER_COPY))
        return fail(-EOPNOTSUPP, "this kernel's ublk driver has no user copy: Linux 6.12 or newer is needed");
    d->cdev = ublk_open_char(d->info.dev_id);
    if (d->cdev < 0)
        return fail(d->cdev, "cannot open /dev/ublkc%u: %s", d->info.dev_id, strerror(-d->cdev));
    d->descriptor_bytes = ublk_desc_bytes(depth, (size_t)sysconf(_SC_PAGESIZE));
    void *map = mmap(NULL, d->descriptor_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, d->cdev, 0);
    if (map == MAP_FAILED)
        return fail(-errno, "cannot map the descriptors of ublk device %u", d->info.dev_id);
    d->descriptors = map;
    madvise(map, d->descriptor_bytes, MADV_DONTFORK); /* a child that has it keeps the device from recovering */
    d->tags = calloc(depth, sizeof(*d->tags));
    if (!d->tags)
        return fail(-ENOMEM, "no memory for the queue of ublk device %u", d->info.dev_id);
    for (uint32_t i = 0; i < depth; i++) {
        d->tags[i].device = d;
        d->tags[i].tag = (uint16_t)i;
    }
    return 0;
}

/* ---- start ---------------------------------------------------------------------------------------- */

static struct ublk_params make_params(const struct volume *v, const struct glide_ublk_config *c)
{
    uint32_t max_discard = c->max_discard_bytes / 512;

    return (struct ublk_params){
        .types = UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_DISCARD,
        .basic = {.attrs = UBLK_ATTR_VOLATILE_CACHE | UBLK_ATTR_FUA | (c->read_only ? UBLK_ATTR_READ_ONLY : 0),
                  .logical_bs_shift = 9,
                  .physical_bs_shift = 12,
                  .io_min_shift = 12,
                  .io_opt_shift = 17,
                  .max_sectors = c->max_io_bytes / 512,
                  .dev_sectors = atomic_load(&v->size) / 512},
        .discard = {.discard_granularity = SECTOR,
                    .max_discard_sectors = max_discard,
                    .max_write_zeroes_sectors = max_discard,
                    .max_discard_segments = 1}};
}

static int add_device(struct ublk_ctrl *ctrl, const struct volume *v, const struct glide_ublk_config *c,
                      struct ublk_dev_info *info)
{
    uint64_t features = 0;
    int err = ublk_ctrl_features(ctrl, &features);

    if (err)
        return fail(err, "this kernel's ublk driver is too old: Linux 6.12 or newer is needed");
    *info = (struct ublk_dev_info){.nr_hw_queues = 1,
                                   .queue_depth = (uint16_t)c->queue_depth,
                                   .max_io_buf_bytes = c->max_io_bytes,
                                   .dev_id = c->dev_id,
                                   .flags = WANTED & features,
                                   .ublksrv_flags = c->tag};
    err = ublk_ctrl_add(ctrl, info);
    if (err) /* if the id is taken, the device is another's */
        return fail(err, "cannot add a ublk device: %s", strerror(-err));
    struct ublk_params params = make_params(v, c);
    err = ublk_ctrl_set_params(ctrl, info->dev_id, &params);
    if (!err)
        return 0;
    ublk_ctrl_del(ctrl, info->dev_id, DELETE_TIMEOUT_MS);
    return fail(err, "the kernel refuses the geometry of ublk device %u", info->dev_id);
}

int glide_ublk_add(glide_volume *volume, const struct glide_ublk_config *c, uint32_t *dev_id)
{
    struct ublk_ctrl *ctrl;
    struct ublk_dev_info info;
    int err = get_ctrl(&ctrl);

    if (!err)
        err = add_device(ctrl, volume, c, &info);
    if (!err)
        *dev_id = info.dev_id;
    return err;
}

static int find_device(struct ublk_ctrl *ctrl, struct ublk_device *d, const struct glide_ublk_config *c)
{
    int err = ublk_ctrl_get_info(ctrl, c->dev_id, &d->info);

    if (err)
        return fail(err, "there is no ublk device %u", c->dev_id);
    if (d->info.ublksrv_flags != c->tag || d->info.nr_hw_queues != 1)
        return fail(-EPERM, "ublk device %u belongs to somebody else", c->dev_id);
    return 0;
}

static int adopt_device(struct ublk_ctrl *ctrl, struct ublk_device *d, const struct glide_ublk_config *c)
{
    int err = find_device(ctrl, d, c);

    if (err)
        return err;
    err = ublk_ctrl_start_recovery(ctrl, c->dev_id, RECOVERY_TIMEOUT_MS);
    return err ? fail(err, "ublk device %u cannot be recovered: %s", c->dev_id, strerror(-err)) : 0;
}

static int detach_queue(struct worker *w, void *arg)
{
    struct ublk_device *d = arg;

    (void)w;
    transport_leave(d->volume, &d->transport);
    return 0;
}

/* The worker has ended; the handle stays the caller's. */
static void free_released(struct leftover *l)
{
    struct ublk_device *d = container_of(l, struct ublk_device, leftover);

    if (d->left_behind)
        device_close(d);
    else
        device_free(d);
}

static int keep_released(struct worker *w, void *arg)
{
    struct ublk_device *d = arg;

    d->leftover.free = free_released;
    list_append(&w->leftovers, &d->leftover.link);
    return detach_queue(w, d);
}

static void leave_behind(struct transport *t)
{
    struct ublk_device *d = container_of(t, struct ublk_device, transport);

    d->left_behind = true;
    keep_released(d->worker, d);
}

static const struct transport_ops UBLK_OPS = {
    .unfreeze = ublk_queue_unfreeze, .let_go = ublk_queue_let_go, .idle = ublk_queue_idle, .left_behind = leave_behind};

static int attach_queue(struct worker *w, void *arg)
{
    struct ublk_device *d = arg;

    if (transport_find(d->volume, &UBLK_OPS) || d->volume->closing)
        return -EBUSY;
    transport_enter(d->volume, &d->transport, &UBLK_OPS);
    d->worker = w;
    ublk_queue_start(d);
    return 0;
}

static void wait_queue(struct call *call, struct worker *w)
{
    struct ublk_device *d = call->arg;

    (void)w;
    d->waiting = call;
    ublk_queue_check(d);
}

static void wait_release(struct call *call, struct worker *w)
{
    struct ublk_device *d = call->arg;

    d->releasing = true;
    if (d->volume->frozen) { /* handed over: the kernel asks the next server again */
        ublk_queue_let_go(&d->transport);
        d->volume->failed = ESHUTDOWN;
        io_fail_parked(d->volume, ESHUTDOWN);
    }
    wait_queue(call, w);
}

int glide_ublk_start(glide_volume *volume, const struct glide_ublk_config *c, glide_ublk **out)
{
    struct ublk_ctrl *ctrl;
    struct call call;
    int err = get_ctrl(&ctrl);
    struct ublk_device *d = err ? NULL : calloc(1, sizeof(*d));

    *out = NULL;
    if (!d)
        return err ? err : -ENOMEM;
    d->volume = volume;
    d->cdev = -1;
    if (c->recover)
        err = adopt_device(ctrl, d, c);
    else
        err = c->added ? find_device(ctrl, d, c) : add_device(ctrl, volume, c, &d->info);
    bool fresh = !err && !c->recover; /* nobody else needs it if the rest fails */
    if (!err)
        err = open_queue(d);
    if (!err)
        err = worker_call(volume->worker, attach_queue, d);
    if (err) {
        uint32_t id = d->info.dev_id;
        device_free(d);
        if (fresh)
            ublk_ctrl_del(ctrl, id, DELETE_TIMEOUT_MS);
        return err;
    }
    err = c->recover ? ublk_ctrl_end_recovery(ctrl, d->info.dev_id, getpid(), START_TIMEOUT_MS)
                     : ublk_ctrl_start(ctrl, d->info.dev_id, getpid(), START_TIMEOUT_MS);
    if (!err) {
        *out = d;
        return 0;
    }
    uint32_t id = d->info.dev_id;
    ublk_ctrl_stop(ctrl, id, 0); /* releases the fetches */
    call_run(volume->worker, &call, wait_queue, d);
    worker_call(volume->worker, detach_queue, d);
    device_free(d);
    if (!c->recover)
        ublk_ctrl_del(ctrl, id, DELETE_TIMEOUT_MS);
    return fail(err, "cannot start ublk device %u: %s", id, strerror(-err));
}

int glide_ublk_dev_id(glide_ublk *device) { return (int)device->info.dev_id; }

/* ---- end --------------------------------------------------------------------------------------------- */

static int refuse_requests(struct worker *w, void *arg)
{
    struct ublk_device *d = arg;

    (void)w;
    d->refusing = true;
    io_cancel(d->volume, d, ESHUTDOWN);
    return 0;
}

/* The kernel waits for the requests that we have, and writes its cache back through us. What waits for the store or for
 * space by the time that this takes too long fails, like what a connection leaves behind that is ended. */
static int stop_serving(struct ublk_ctrl *ctrl, struct ublk_device *d)
{
    int err = ublk_ctrl_stop(ctrl, d->info.dev_id, STOP_TIMEOUT_MS);

    if (err != -ETIMEDOUT)
        return err;
    worker_call(d->volume->worker, refuse_requests, d);
    return ublk_ctrl_stop(ctrl, d->info.dev_id, 0);
}

int glide_ublk_stop(glide_ublk *d)
{
    struct ublk_ctrl *ctrl;
    struct call call;
    uint32_t id = d->info.dev_id;
    int err = get_ctrl(&ctrl);

    if (err)
        return err;
    err = stop_serving(ctrl, d);
    if (err && err != -ENODEV)
        return fail(err, "cannot stop ublk device %u: %s", id, strerror(-err));
    call_run(d->volume->worker, &call, wait_queue, d);
    worker_call(d->volume->worker, detach_queue, d);
    device_free(d);
    err = ublk_ctrl_del(ctrl, id, DELETE_TIMEOUT_MS);
    if (err == -ETIMEDOUT) /* the number comes free when they let go */
        return 1;
    return err && err != -ENODEV ? fail(err, "cannot delete ublk device %u: %s", id, strerror(-err)) : 0;
}

int glide_ublk_release(glide_ublk *d)
{
    struct call call;

    if (d->left_behind) {
        free(d);
        return 0;
    }
    call_run(d->volume->worker, &call, wait_release, d);
    return worker_call(d->volume->worker, keep_released, d);
}

int glide_ublk_update_size(glide_ublk *d, uint64_t size)
{
    struct ublk_ctrl *ctrl;
    int err = get_ctrl(&ctrl);

    if (err)
        return err;
    if (!(d->info.flags & UBLK_F_UPDATE_SIZE))
        return fail(-EOPNOTSUPP, "this kernel cannot resize a ublk device online (6.16 can): detach and attach");
    return ublk_ctrl_update_size(ctrl, d->info.dev_id, size / 512);
}
