#include "cache/block_map.h"

#include "base/util.h"

#define CHUNK_KEY ((uint64_t)1 << 62)
#define IS_ZERO ((uint64_t)1 << 63)

void block_map_init(struct block_map *m, uint64_t limit)
{
    table_init(&m->entries);
    m->limit = limit;
}

void block_map_destroy(struct block_map *m) { table_destroy(&m->entries); }

struct base_view block_map_find(const struct block_map *m, uint64_t block)
{
    const uint64_t *value = table_find(&m->entries, block);

    if (!value)
        value = table_find(&m->entries, CHUNK_KEY | block / CHUNK_BLOCKS);
    if (!value)
        return (struct base_view){BASE_UNKNOWN, 0, 0};
    if (*value & IS_ZERO)
        return (struct base_view){BASE_ZERO, 0, 0};
    return (struct base_view){BASE_SLOT, (uint32_t)(*value >> 32), (uint32_t)*value};
}

static int set(struct block_map *m, uint64_t key, uint64_t value)
{
    if (m->entries.bytes > m->limit)
        table_clear(&m->entries);
    uint64_t *entry = table_insert(&m->entries, key);
    if (!entry)
        return -ENOMEM;
    *entry = value;
    return 0;
}

int block_map_set_slot(struct block_map *m, uint64_t block, uint32_t slot, uint32_t generation)
{
    return set(m, block, (uint64_t)slot << 32 | generation);
}

struct key_range {
    uint64_t start, end;             /* blocks */
    uint64_t first_chunk, end_chunk; /* chunks that share a block with them */
};

static bool in_range(uint64_t key, uint64_t value, void *arg)
{
    const struct key_range *r = arg;

    (void)value;
    if (key & CHUNK_KEY)
        return (key & ~CHUNK_KEY) >= r->first_chunk && (key & ~CHUNK_KEY) < r->end_chunk;
    return key >= r->start && key < r->end;
}

void block_map_drop(struct block_map *m, uint64_t block, uint64_t count)
{
    struct key_range r = {block, block + count, block / CHUNK_BLOCKS, div_up(block + count, CHUNK_BLOCKS)};

    if (count > table_count(&m->entries)) {
        table_filter(&m->entries, in_range, &r);
        return;
    }
    for (uint64_t b = r.start; b < r.end; b++)
        table_remove(&m->entries, b);
    for (uint64_t c = r.first_chunk; c < r.end_chunk; c++)
        table_remove(&m->entries, CHUNK_KEY | c);
}

int block_map_set_zero(struct block_map *m, uint64_t block, uint64_t count)
{
    uint64_t end = block + count;

    while (block < end) {
        bool whole = block % CHUNK_BLOCKS == 0 && end - block >= CHUNK_BLOCKS;
        if (whole)
            block_map_drop(m, block, CHUNK_BLOCKS);
        int err = set(m, whole ? CHUNK_KEY | block / CHUNK_BLOCKS : block, IS_ZERO);
        if (err)
            return err;
        block += whole ? CHUNK_BLOCKS : 1;
    }
    return 0;
}
