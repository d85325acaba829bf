/*
 * Handoff, the volume's part: a volume stands still in its old process, and is
 * brought up to date and goes on in the new one.
 *
 * Appends are synchronous, so once a volume is frozen every request either is in
 * the log or has left no trace; what has no answer yet is carried out again by
 * the new process (nbd_handoff.c) or by the kernel (ublk, reissue). Only reads of
 * files that are under way are waited for: their buffers go to guests of ublk, and
 * the slots that they read may be another process's soon.
 */
#include "volume/fault.h"
#include "volume/volume.h"

struct freeze_call {
    struct call call;
    struct glide_cutover *out;
};

static struct glide_cutover log_extent(const struct write_log *log)
{
    struct glide_cutover at = {0};

    if (log->count) {
        at.first_seq = log->segments[0]->seq;
        at.last_seq = log->segments[log->count - 1]->seq;
        at.last_end = log->segments[log->count - 1]->end;
    }
    return at;
}

static void freeze_check(struct volume *v)
{
    if (v->reading)
        return;
    for (struct list *e; (e = list_pop(&v->freeze_calls));) {
        struct freeze_call *f = container_of(container_of(e, struct call, link), struct freeze_call, call);
        *f->out = log_extent(&v->log);
        call_done(&f->call, 0);
    }
}

void volume_read_done(struct volume *v)
{
    v->reading--;
    freeze_check(v);
}

static void start_freeze(struct call *call, struct worker *w)
{
    struct volume *v = call->arg;

    (void)w;
    if (v->filter) /* unaligned WRITEs that wait for it may be appended */
        v->filter->ops->let_go(v, NULL);
    io_flush(v);
    if (v->filter) /* those whose reads the flush began, too */
        v->filter->ops->let_go(v, NULL);
    log_seal(&v->log);
    transports_each(t, v)
        if (t->ops->freeze)
            t->ops->freeze(t);
    v->frozen = true;
    list_append(&v->freeze_calls, &call->link);
    freeze_check(v);
}

int glide_volume_freeze(glide_volume *volume, struct glide_cutover *out)
{
    struct freeze_call f = {.out = out};

    return call_run(volume->worker, &f.call, start_freeze, volume);
}

static int unfreeze(struct worker *w, void *arg)
{
    struct volume *v = arg;

    if (!v->frozen)
        return 0;
    v->frozen = false;
    if (v->answers_missed) {
        v->answers_missed = false;
        fault_resolve_all(v, 0);
    }
    transports_each(t, v)
        t->ops->unfreeze(t);
    volume_want_flush(v);
    if (v->blocked || v->waiting)
        worker_want_tick(w);
    return 0;
}

int glide_volume_unfreeze(glide_volume *volume) { return worker_call(volume->worker, unfreeze, volume); }

struct activate_call {
    struct volume *v;
    const struct glide_cutover *expected;
    struct glide_recovery *recovery;
};

static int activate(struct worker *w, void *arg)
{
    struct activate_call *c = arg;
    struct glide_cutover found, expected = *c->expected;
    int err = volume_recover_tail(c->v, c->recovery);

    (void)w;
    if (err)
        return err;
    found = log_extent(&c->v->log);
    if (found.first_seq != expected.first_seq || found.last_seq != expected.last_seq ||
        found.last_end != expected.last_end)
        return fail(-ESTALE,
                    "the log has segments %llu to %llu with %llu records in the last one; the process before says "
                    "%llu to %llu with %llu",
                    (unsigned long long)found.first_seq, (unsigned long long)found.last_seq,
                    (unsigned long long)found.last_end, (unsigned long long)expected.first_seq,
                    (unsigned long long)expected.last_seq, (unsigned long long)expected.last_end);
    volume_count_memory(c->v);
    return 0;
}

int glide_volume_activate(glide_volume *volume, const struct glide_cutover *expected, struct glide_recovery *recovery)
{
    return worker_call(volume->worker, activate,
                       &(struct activate_call){.v = volume, .expected = expected, .recovery = recovery});
}
