#include "cache/block_map.h"

#include "base/util.h"

#include <errno.h>

void block_map_init(struct block_map *m, uint64_t limit)
{
    table_init(&m->slots);
    zero_groups_init(&m->blocks);
    zero_groups_init(&m->chunks);
    m->limit = limit;
}

void block_map_destroy(struct block_map *m)
{
    table_destroy(&m->slots);
    zero_groups_destroy(&m->blocks);
    zero_groups_destroy(&m->chunks);
}

uint64_t block_map_bytes(const struct block_map *m)
{
    return m->slots.bytes + zero_groups_bytes(&m->blocks) + zero_groups_bytes(&m->chunks);
}

struct base_view block_map_find(const struct block_map *m, uint64_t block)
{
    const uint64_t *slot = table_find(&m->slots, block);

    if (slot)
        return (struct base_view){BASE_SLOT, (uint32_t)(*slot >> 32), (uint32_t)*slot};
    bool zero = zero_groups_find(&m->blocks, block) || zero_groups_find(&m->chunks, block / GLIDE_GROUP);
    return (struct base_view){zero ? BASE_ZERO : BASE_UNKNOWN, 0, 0};
}

enum zero_state block_map_run(const struct block_map *m, uint64_t block, uint64_t limit, uint64_t *end)
{
    uint64_t chunks;

    if (zero_groups_run(&m->chunks, block / GLIDE_GROUP, div_up(limit, GLIDE_GROUP), &chunks) != ZERO_IS)
        return zero_groups_run(&m->blocks, block, limit, end);
    *end = min_u64(limit, chunks * GLIDE_GROUP);
    return ZERO_IS;
}

/* Before something is added: the map starts over when it has become too large. */
static void make_room(struct block_map *m)
{
    if (block_map_bytes(m) > m->limit)
        block_map_destroy(m);
}

int block_map_set_slot(struct block_map *m, uint64_t block, uint32_t slot, uint32_t generation)
{
    make_room(m);
    uint64_t *entry = table_insert(&m->slots, block);
    if (!entry)
        return -ENOMEM;
    *entry = (uint64_t)slot << 32 | generation;
    return 0;
}

int block_map_set_zero(struct block_map *m, uint64_t block, uint64_t count)
{
    uint64_t end = block + count;
    int err = 0;

    make_room(m);
    while (block < end && !err) {
        uint64_t chunk = block / GLIDE_GROUP, stop = min_u64(end, (chunk + 1) * GLIDE_GROUP);
        if (stop - block == GLIDE_GROUP)
            err = zero_groups_set(&m->chunks, chunk, chunk + 1);
        else
            err = zero_groups_set(&m->blocks, block, stop);
        block = stop;
    }
    return err;
}

int block_map_put_chunk(struct block_map *m, uint64_t chunk, const uint64_t zeros[GROUP_WORDS])
{
    make_room(m);
    return zero_groups_put(&m->blocks, chunk, zeros);
}

int block_map_put_page(struct block_map *m, uint64_t page, const uint64_t zeros[GROUP_WORDS])
{
    make_room(m);
    return zero_groups_put(&m->chunks, page, zeros);
}

struct key_range {
    uint64_t start, end; /* blocks */
};

static bool in_range(uint64_t block, uint64_t value, void *arg)
{
    const struct key_range *r = arg;

    (void)value;
    return block >= r->start && block < r->end;
}

void block_map_drop(struct block_map *m, uint64_t block, uint64_t count)
{
    struct key_range r = {block, block + count};

    if (count > table_count(&m->slots))
        table_filter(&m->slots, in_range, &r);
    else
        for (uint64_t b = r.start; b < r.end; b++)
            table_remove(&m->slots, b);
    zero_groups_clear(&m->blocks, block, r.end);
    zero_groups_clear(&m->chunks, block / GLIDE_GROUP, div_up(r.end, GLIDE_GROUP));
}

void block_map_drop_slot(struct block_map *m, uint64_t block) { table_remove(&m->slots, block); }
