/*
 * The next segment's file, made before the worker needs it.
 *
 * A writer that fills segments waits for the file system at each new one: for a name, and for blocks, page by page,
 * while the kernel writes back what it wrote before. The caller's thread does both here, and gives the file to the log
 * as a spare (write_log.h).
 */
#include "base/space.h"
#include "base/util.h"
#include "volume/volume.h"

#include <errno.h>
#include <stdlib.h>

struct prepare {
    struct volume *v;
    char *path; /* NULL = none is wanted */
    struct disk_file file;
    uint64_t bytes;
};

static bool is_wanted(const struct prepare *p)
{
    const struct write_log *log = &p->v->log;

    return !p->v->frozen && log->active && !log->spare_count && !log_scarce(log->budget, p->bytes);
}

static int look(struct worker *w, void *arg)
{
    struct prepare *p = arg;
    const struct write_log *log = &p->v->log;
    uint32_t sectors = log->budget->segment_sectors;

    (void)w;
    p->bytes = segment_data_offset(sectors, sectors);
    if (!is_wanted(p))
        return 0;
    /* A name that no segment's own spare has. */
    p->path = segment_path(log->path, SEGMENT_MAX_SEQ - 1 - log->id.seq, ".spare");
    return p->path ? 0 : -ENOMEM;
}

static int offer(struct worker *w, void *arg)
{
    struct prepare *p = arg;

    (void)w;
    if (!is_wanted(p))
        return -EBUSY;
    log_add_spare(&p->v->log, p->file, p->bytes);
    p->file = (struct disk_file){.fd = -1};
    return 0;
}

static int make_file(struct prepare *p)
{
    int err = disk_create(&p->file, p->path);

    if (err)
        return err;
    if (!space_has(p->file.fd, p->bytes, 2, NULL))
        return -ENOSPC;
    return disk_allocate(&p->file, p->bytes);
}

int glide_volume_prepare(glide_volume *volume)
{
    struct prepare p = {.v = volume, .file = {.fd = -1}};
    int err = worker_call(volume->worker, look, &p);

    if (!err && p.path) {
        err = make_file(&p);
        if (!err)
            err = worker_call(volume->worker, offer, &p);
        if (err && p.file.fd >= 0)
            disk_unlink(p.path);
        disk_close(&p.file);
    }
    free(p.path);
    return err == -EBUSY || err == -EEXIST || disk_full(err) ? 0 : err;
}
