/*
 * From blocks to tasks: payloads that are near each other in a pack share a range, blocks that share a range, straight
 * or through others, share a task. The blocks of a task come together; those of different tasks do not wait for each
 * other. The ranges are those of glidefs/reading/fetch.py (plan_ranges), and tests/core/test_carry.py compares them.
 */
#include "carry/carrier.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct want { /* a payload */
    uint64_t offset;
    uint32_t pack, stored;
    uint32_t plan, part; /* whose */
};
struct range {
    uint64_t start, end;
    uint32_t pack;
    uint32_t up;   /* union-find (Galler and Fischer 1964): towards the range that its task is called by */
    uint32_t task; /* of such a range */
    uint32_t get;  /* its place in the task */
};
struct cut {
    const struct glide_carry *what;
    struct want *wants;
    struct range *ranges;
    uint32_t *range_of; /* by part */
    struct carry_task **tasks;
    uint32_t want_count, range_count, task_count;
};

static int by_place(const void *a, const void *b)
{
    const struct want *x = a, *y = b;

    if (x->pack != y->pack)
        return x->pack < y->pack ? -1 : 1;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static uint32_t root_of(struct range *ranges, uint32_t r)
{
    while (ranges[r].up != r)
        r = ranges[r].up = ranges[ranges[r].up].up;
    return r;
}

static bool is_wanted(const struct glide_block_plan *plan) { return plan->state == GLIDE_PLAN_ABSENT && plan->count; }

static void collect(struct cut *c)
{
    for (uint32_t i = 0; i < c->what->plan_count; i++) {
        const struct glide_block_plan *plan = &c->what->plans[i];
        for (uint32_t p = plan->first; is_wanted(plan) && p < plan->first + plan->count; p++) {
            const struct glide_part *part = &c->what->parts[p];
            if (part->mask)
                c->wants[c->want_count++] = (struct want){
                    .offset = part->offset, .pack = part->pack, .stored = part->stored, .plan = i, .part = p};
        }
    }
    qsort(c->wants, c->want_count, sizeof(*c->wants), by_place);
}

static void make_ranges(struct cut *c)
{
    for (uint32_t i = 0; i < c->want_count; i++) {
        const struct want *w = &c->wants[i];
        struct range *r = c->range_count ? &c->ranges[c->range_count - 1] : NULL;
        uint64_t stop = w->offset + w->stored;
        if (!r || r->pack != w->pack || w->offset > r->end + c->what->gap ||
            max_u64(stop, r->end) - r->start > c->what->limit) {
            r = &c->ranges[c->range_count];
            *r = (struct range){.start = w->offset, .end = stop, .pack = w->pack, .up = c->range_count++};
        }
        r->end = max_u64(r->end, stop);
        c->range_of[w->part] = c->range_count - 1;
    }
}

static uint32_t first_range(const struct cut *c, const struct glide_block_plan *plan)
{
    uint32_t p = plan->first;

    while (!c->what->parts[p].mask)
        p++;
    return c->range_of[p];
}

static void join(struct cut *c)
{
    for (uint32_t i = 0; i < c->want_count; i++) {
        uint32_t mine = root_of(c->ranges, c->range_of[c->wants[i].part]);
        uint32_t first = root_of(c->ranges, first_range(c, &c->what->plans[c->wants[i].plan]));
        c->ranges[mine].up = first;
    }
    for (uint32_t r = 0; r < c->range_count; r++)
        if (root_of(c->ranges, r) == r)
            c->ranges[r].task = c->task_count++;
}

static struct carry_task *task_of(const struct cut *c, uint32_t range)
{
    return c->tasks[c->ranges[root_of(c->ranges, range)].task];
}

static int set_source(struct get *get, const struct glide_source *source, const struct range *r)
{
    get->kind = source->kind;
    get->timeout_ms = source->timeout_ms;
    get->connect_ms = source->connect_ms;
    get->offset = r->start;
    get->length = (uint32_t)(r->end - r->start);
    if (source->kind == GLIDE_SOURCE_FILE)
        return (get->text = strdup(source->target)) ? 0 : -ENOMEM;
    if (source->address_length > sizeof(get->address))
        return -EINVAL;
    memcpy(&get->address, source->address, source->address_length);
    get->address_length = source->address_length;
    if (source->server && (!(get->server = strdup(source->server)) || !(get->ca = strdup(source->ca))))
        return -ENOMEM;
    int n = asprintf(&get->text,
                     "GET %s HTTP/1.1\r\nHost: %s\r\nRange: bytes=%llu-%llu\r\nAccept-Encoding: identity\r\n"
                     "User-Agent: glidefs\r\n\r\n",
                     source->target, source->host, (unsigned long long)r->start, (unsigned long long)r->end - 1);
    if (n < 0)
        get->text = NULL;
    return n < 0 ? -ENOMEM : 0;
}

/* The tasks with room for what belongs to them. */
static int make_tasks(struct cut *c)
{
    const struct glide_carry *what = c->what;
    uint64_t now = now_ns();

    for (uint32_t i = 0; i < c->task_count; i++) {
        if (!(c->tasks[i] = calloc(1, sizeof(struct carry_task))))
            return -ENOMEM;
        c->tasks[i]->volume = what->volume;
        c->tasks[i]->stamp = what->stamp;
        c->tasks[i]->leave = what->leave;
        c->tasks[i]->began_ns = now;
        c->tasks[i]->result.task = what->first_task + i;
    }
    for (uint32_t r = 0; r < c->range_count; r++)
        c->ranges[r].get = task_of(c, r)->get_count++;
    for (uint32_t i = 0; i < what->plan_count; i++) {
        if (!is_wanted(&what->plans[i]))
            continue;
        struct carry_task *task = task_of(c, first_range(c, &what->plans[i]));
        task->plan_count++;
        task->part_count += what->plans[i].count;
    }
    for (uint32_t i = 0; i < c->task_count; i++) {
        struct carry_task *task = c->tasks[i];
        task->gets_left = task->get_count;
        task->gets = calloc(task->get_count, sizeof(*task->gets));
        task->plans = malloc(task->plan_count * sizeof(*task->plans));
        task->parts = malloc(task->part_count * sizeof(*task->parts));
        if (!task->gets || !task->plans || !task->parts)
            return -ENOMEM;
        task->plan_count = task->part_count = 0;
    }
    return 0;
}

static int fill_tasks(struct cut *c)
{
    const struct glide_carry *what = c->what;

    for (uint32_t r = 0; r < c->range_count; r++) {
        struct carry_task *task = task_of(c, r);
        struct get *get = &task->gets[c->ranges[r].get];
        get->task = task;
        int err = set_source(get, &what->sources[c->ranges[r].pack], &c->ranges[r]);
        if (err)
            return err;
    }
    for (uint32_t i = 0; i < what->plan_count; i++) {
        struct glide_block_plan *plan = &what->plans[i];
        if (!is_wanted(plan))
            continue;
        uint32_t range = first_range(c, plan);
        struct carry_task *task = task_of(c, range);
        plan->task = (uint32_t)(task->result.task - what->first_task);
        struct glide_block_plan *mine = &task->plans[task->plan_count++];
        *mine = *plan;
        mine->first = task->part_count;
        for (uint32_t p = plan->first; p < plan->first + plan->count; p++) {
            struct glide_part *part = &task->parts[task->part_count++];
            *part = what->parts[p];
            part->pack = part->mask ? c->ranges[c->range_of[p]].get : 0;
        }
    }
    return 0;
}

static int cut_all(struct cut *c)
{
    collect(c);
    make_ranges(c);
    join(c);
    c->tasks = calloc(c->task_count + 1, sizeof(struct carry_task *));
    int err = c->tasks ? make_tasks(c) : -ENOMEM;
    return err ? err : fill_tasks(c);
}

int glide_carry(glide_engine *engine, const struct glide_carry *what)
{
    struct cut c = {.what = what};
    uint32_t parts = 0;
    int err = carrier_start(engine->carrier);

    if (err)
        return err;
    for (uint32_t i = 0; i < what->plan_count; i++)
        parts = (uint32_t)max_u64(parts, what->plans[i].first + what->plans[i].count);
    c.wants = malloc((parts + 1) * sizeof(*c.wants));
    c.ranges = malloc((parts + 1) * sizeof(*c.ranges));
    c.range_of = malloc((parts + 1) * sizeof(*c.range_of));
    err = c.wants && c.ranges && c.range_of ? cut_all(&c) : -ENOMEM;
    for (uint32_t i = 0; c.tasks && i < c.task_count; i++) {
        if (err) {
            if (c.tasks[i])
                task_free(c.tasks[i]);
        } else if (task_post(engine->carrier, c.tasks[i])) {
            err = i ? 0 : -ESHUTDOWN; /* the engine closes: nobody waits for the others */
        }
    }
    free(c.wants);
    free(c.ranges);
    free(c.range_of);
    free(c.tasks);
    return err ? err : (int)c.task_count;
}
