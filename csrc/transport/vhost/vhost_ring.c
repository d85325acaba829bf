#include "transport/vhost/vhost.h"

#include <stdlib.h>
#include <string.h>

#define DESC_BYTES 16u
#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u
#define AVAILABLE_NO_INTERRUPT 1u
#define USED_NO_NOTIFY 1u
#define USED_ENTRIES 4u /* where they begin */
#define USED_ENTRY 8u

/* The guest's memory: one load or store each, in the order of the program. */
static uint16_t load(const void *at) { return __atomic_load_n((const uint16_t *)at, __ATOMIC_ACQUIRE); }
static void store(void *at, uint16_t value) { __atomic_store_n((uint16_t *)at, value, __ATOMIC_RELEASE); }

static bool has_event_index(const struct vhost_ring *r)
{
    return (r->device->features & VHOST_FEATURE(VIRTIO_RING_F_EVENT_IDX)) != 0;
}

static uint16_t *used_event(const struct vhost_ring *r) { return &r->available[2 + r->num]; }
static void *available_event(const struct vhost_ring *r) { return r->used + USED_ENTRIES + USED_ENTRY * r->num; }

/* ---- the ring ------------------------------------------------------------------------------------ */

static uint8_t *part(const struct vhost_ring *r, uint64_t address, uint64_t length, uint64_t align, const char *what)
{
    uint8_t *at = vhost_user_at(r->device->memory, address, length);

    if (at && !((uintptr_t)at % align))
        return at;
    fail(-EFAULT, "queue %u: its %s ring is %s", r->index, what, at ? "not aligned" : "not in the memory table");
    return NULL;
}

int vhost_ring_map(struct vhost_ring *r)
{
    uint64_t n = r->num;
    uint8_t *descriptors = part(r, r->at.descriptors, DESC_BYTES * n, 16, "descriptor");
    uint8_t *available = descriptors ? part(r, r->at.available, 6 + 2 * n, 2, "available") : NULL;
    uint8_t *used = available ? part(r, r->at.used, 6 + USED_ENTRY * n, 4, "used") : NULL;

    if (!used)
        return -EFAULT;
    r->descriptors = descriptors;
    r->available = (uint16_t *)(void *)available;
    r->used = used;
    return 0;
}

bool vhost_ring_peek(struct vhost_ring *r, uint16_t *head)
{
    if (r->again_at < r->again_count) {
        *head = r->again[r->again_at];
        return true;
    }
    uint16_t waiting = r->draining ? 0 : (uint16_t)(load(&r->available[1]) - r->next_available);
    if (!waiting)
        return false;
    if (waiting > r->num) {
        vhost_broken(r->device, "queue %u: %u requests are available in a ring of %u", r->index, waiting, r->num);
        return false;
    }
    *head = load(&r->available[2 + (r->next_available & (r->num - 1))]);
    if (*head >= r->num) {
        vhost_broken(r->device, "queue %u: there is no descriptor %u", r->index, *head);
        return false;
    }
    if (r->busy[*head]) {
        vhost_broken(r->device, "queue %u: descriptor %u is used again before it was answered", r->index, *head);
        return false;
    }
    return true;
}

bool vhost_ring_take(struct vhost_ring *r, uint16_t head, struct vhost_req *req)
{
    struct vhost_entry *e = &r->record->entries[head];

    r->busy[head] = req;
    r->count++;
    if (r->again_at < r->again_count) {
        r->again_at++;
        return e->logged == 1;
    }
    r->next_available++;
    e->logged = 0;
    e->counter = r->counter++;
    __atomic_store_n(&e->inflight, 1, __ATOMIC_RELEASE);
    return false;
}

/* The order is what whoever finds the record after a crash relies on. */
void vhost_ring_push(struct vhost_ring *r, uint16_t head, uint32_t length)
{
    uint32_t entry[2] = {head, length};

    memcpy(r->used + USED_ENTRIES + USED_ENTRY * (r->used_index & (r->num - 1)), entry, sizeof(entry));
    store(&r->record->last_batch_head, head);
    store(r->used + 2, ++r->used_index);
    __atomic_store_n(&r->record->entries[head].inflight, 0, __ATOMIC_RELEASE);
    store(&r->record->used_index, r->used_index);
    r->news = true;
}

void vhost_ring_quiet(struct vhost_ring *r)
{
    if (!has_event_index(r))
        store(r->used, USED_NO_NOTIFY);
}

bool vhost_ring_listen(struct vhost_ring *r)
{
    if (has_event_index(r))
        store(available_event(r), r->next_available);
    else
        store(r->used, 0);
    atomic_thread_fence(memory_order_seq_cst); /* the driver sees this, or we see what it did before it looked */
    return load(&r->available[1]) != r->next_available;
}

bool vhost_ring_wants_call(struct vhost_ring *r)
{
    uint16_t old = r->signalled;
    bool first = !r->ever_signalled;

    atomic_thread_fence(memory_order_seq_cst);
    if (!has_event_index(r))
        return !(load(&r->available[0]) & AVAILABLE_NO_INTERRUPT);
    r->signalled = r->used_index;
    r->ever_signalled = true;
    uint16_t beyond = (uint16_t)(r->used_index - load(used_event(r)) - 1);
    return first || beyond < (uint16_t)(r->used_index - old);
}

/* ---- the record -------------------------------------------------------------------------------------- */

static void begin_record(struct vhost_ring *r)
{
    struct vhost_record *record = r->record;

    memset(record->entries, 0, r->num * sizeof(record->entries[0]));
    record->depth = (uint16_t)r->num;
    record->used_index = r->used_index;
    store(&record->version, 1);
    r->next_available = (uint16_t)r->at.base;
}

/* A record of a ring of another size tells nothing where nothing is in flight: a firmware had it, or a guest before. */
static bool is_empty(const struct vhost_record *record, uint32_t depth, uint32_t most)
{
    for (uint32_t head = 0; head < depth && head < most; head++)
        if (record->entries[head].inflight)
            return false;
    return depth <= most;
}

/* Whoever had it died between two of the steps of its last answers: those are answers. */
static void end_last_batch(struct vhost_ring *r)
{
    struct vhost_record *record = r->record;
    uint16_t head = record->last_batch_head, count = (uint16_t)(r->used_index - record->used_index);

    for (uint32_t i = 0; i < count && i < r->num && head < r->num; i++) {
        record->entries[head].inflight = 0;
        head = record->entries[head].next;
    }
    store(&record->used_index, r->used_index);
}

static int by_counter(const void *a, const void *b, void *arg)
{
    const struct vhost_entry *entries = arg;
    uint64_t x = entries[*(const uint16_t *)a].counter, y = entries[*(const uint16_t *)b].counter;

    return x < y ? -1 : x > y;
}

int vhost_ring_recover(struct vhost_ring *r)
{
    struct vhost_record *record = r->record;
    uint16_t version = load(&record->version), depth = load(&record->depth);

    r->used_index = load(r->used + 2);
    r->again_count = r->again_at = 0;
    r->counter = 0;
    if (!version || (version == 1 && depth != r->num && is_empty(record, depth, r->device->record_depth))) {
        begin_record(r);
        return 0;
    }
    if (version != 1 || depth != r->num)
        return fail(-EINVAL, "queue %u: the record of requests in flight is of version %u and for %u entries, not %u",
                    r->index, version, depth, r->num);
    if (record->used_index != r->used_index)
        end_last_batch(r);
    for (uint32_t head = 0; head < r->num; head++) {
        if (record->entries[head].inflight != 1)
            continue;
        r->again[r->again_count++] = (uint16_t)head;
        r->counter = max_u64(r->counter, record->entries[head].counter + 1);
    }
    /* In private memory: the front-end can change the record while it is sorted. */
    struct vhost_entry *copy = malloc(r->num * sizeof(*copy));
    if (!copy)
        return fail(-ENOMEM, "no memory for the requests in flight");
    memcpy(copy, record->entries, r->num * sizeof(*copy));
    qsort_r(r->again, r->again_count, sizeof(r->again[0]), by_counter, copy);
    free(copy);
    r->next_available = (uint16_t)(r->used_index + r->again_count);
    return 0;
}

/* ---- descriptors ----------------------------------------------------------------------------------- */

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

/* A copy: from here on it does not change. */
static struct descriptor descriptor_at(const uint8_t *table, uint32_t index)
{
    struct descriptor d;

    memcpy(&d, table + (uint64_t)index * DESC_BYTES, sizeof(d));
    atomic_signal_fence(memory_order_seq_cst); /* nor is it read again */
    return d;
}

static int add_buffer(struct vhost_ring *r, struct vhost_chain *c, const struct descriptor *d)
{
    bool writes = d->flags & DESC_WRITE;
    uint64_t address = d->address, left = d->length;

    if (!writes && c->count > c->out_count)
        return vhost_broken(r->device, "queue %u: memory to be read comes behind memory to be written", r->index);
    while (left) {
        uint64_t length = left;
        uint8_t *at = vhost_guest_at(r->device->memory, address, &length);
        if (!at || address + left < address)
            return vhost_broken(r->device, "queue %u: %u bytes at %#llx are not in the memory table", r->index,
                                d->length, (unsigned long long)d->address);
        bool follows = writes ? c->count > c->out_count : c->count > 0;
        struct iovec *last = follows ? &c->pieces[c->count - 1] : NULL;
        if (last && (uint8_t *)last->iov_base + last->iov_len == at)
            last->iov_len += length;
        else if (c->count == VHOST_MAX_PIECES)
            return vhost_broken(r->device, "queue %u: a request has more than %u pieces", r->index, VHOST_MAX_PIECES);
        else
            c->pieces[c->count++] = (struct iovec){at, length};
        address += length;
        left -= length;
        *(writes ? &c->in_bytes : &c->out_bytes) += length;
    }
    if (!writes)
        c->out_count = c->count;
    return 0;
}

/* A copy of an indirect table, which may lie across regions. Returns its entries. */
static int copy_table(struct vhost_ring *r, const struct descriptor *d)
{
    struct vhost_device *device = r->device;
    uint64_t address = d->address, done = 0;

    if (!(device->features & VHOST_FEATURE(VIRTIO_RING_F_INDIRECT_DESC)) || d->flags & DESC_NEXT)
        return vhost_broken(device, "queue %u: an indirect table where there can be none", r->index);
    if (!d->length || d->length % DESC_BYTES || d->length > sizeof(device->table))
        return vhost_broken(device, "queue %u: an indirect table of %u bytes", r->index, d->length);
    while (done < d->length) {
        uint64_t length = d->length - done;
        const uint8_t *at = vhost_guest_at(device->memory, address + done, &length);
        if (!at || address + done < address)
            return vhost_broken(device, "queue %u: an indirect table at %#llx is not in the memory table", r->index,
                                (unsigned long long)d->address);
        memcpy(device->table + done, at, length);
        done += length;
    }
    return (int)(d->length / DESC_BYTES);
}

int vhost_chain_read(struct vhost_ring *r, uint16_t head, struct vhost_chain *c)
{
    const uint8_t *table = r->descriptors;
    uint32_t entries = r->num, index = head, seen = 0;
    int err = 0;

    c->count = c->out_count = 0;
    c->out_bytes = c->in_bytes = 0;
    for (;;) {
        if (index >= entries)
            return vhost_broken(r->device, "queue %u: there is no descriptor %u in a table of %u", r->index, index,
                                entries);
        if (++seen > entries)
            return vhost_broken(r->device, "queue %u: a chain of descriptors has no end", r->index);
        struct descriptor d = descriptor_at(table, index);
        if (d.flags & DESC_INDIRECT) {
            int count = table == r->descriptors
                            ? copy_table(r, &d)
                            : vhost_broken(r->device, "queue %u: an indirect table within another", r->index);
            if (count < 0)
                return count;
            table = r->device->table;
            entries = (uint32_t)count;
            index = seen = 0;
            continue;
        }
        err = add_buffer(r, c, &d);
        if (err || !(d.flags & DESC_NEXT))
            return err;
        index = d.next;
    }
}

void vhost_gather(const struct iovec *from, uint64_t skip, void *to, uint64_t length)
{
    for (uint64_t done = 0; done < length; from++) {
        uint64_t cut = min_u64(skip, from->iov_len), n = min_u64(from->iov_len - cut, length - done);
        skip -= cut;
        if (n)
            memcpy((uint8_t *)to + done, (const uint8_t *)from->iov_base + cut, n);
        done += n;
    }
}

void vhost_scatter(const struct iovec *to, const void *from, uint64_t length)
{
    for (uint64_t done = 0; done < length; to++) {
        uint64_t n = min_u64(to->iov_len, length - done);
        memcpy(to->iov_base, (const uint8_t *)from + done, n);
        done += n;
    }
}
