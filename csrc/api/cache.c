/* The calls on the block cache, whose work is done in cache/. */
#include "volume/engine.h"

int glide_cache_lookup(glide_engine *engine, const uint8_t *keys, uint32_t count, struct glide_slot *out)
{
    return cache_lookup(&engine->cache, keys, count, out);
}

int glide_cache_insert(glide_engine *engine, const uint8_t *key, const uint8_t *hash, const void *data,
                       struct glide_slot *out)
{
    return cache_insert(&engine->cache, key, hash, data, out);
}

int glide_cache_read(glide_engine *engine, const struct glide_slot *slot, void *buf)
{
    return cache_read(&engine->cache, slot, buf);
}

int glide_cache_mark_verified(glide_engine *engine, const struct glide_slot *slot, const void *data)
{
    return cache_mark_verified(&engine->cache, slot, data);
}

void glide_cache_drop(glide_engine *engine, const struct glide_slot *slot) { cache_drop(&engine->cache, slot); }

uint64_t glide_cache_evict_all(glide_engine *engine) { return cache_evict_all(&engine->cache); }

int glide_cache_sync(glide_engine *engine) { return cache_sync(&engine->cache); }

int glide_cache_give(glide_engine *engine) { return cache_give(&engine->cache); }

int glide_cache_take(glide_engine *engine) { return cache_take(&engine->cache); }

void glide_cache_shutdown(glide_engine *engine) { cache_shutdown(&engine->cache); }

void glide_cache_unpin(glide_engine *engine, const struct glide_slot *slot) { cache_unpin(&engine->cache, slot->slot); }
