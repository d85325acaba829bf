#include "transport/nbd/nbd_memory.h"

#include "transport/nbd/nbd_conn.h"
#include "volume/volume.h"

#define SHARE 8
#define MIN_WINDOW (16u << 10) /* of what is received: what each connection may have in any case */

static uint64_t limit_of(const struct nbd_memory *m, enum nbd_account account)
{
    return account == NBD_PIPELINE ? m->limit / 4 : m->limit;
}

static uint64_t free_of(const struct nbd_memory *m, enum nbd_account account)
{
    uint64_t used = atomic_load_explicit(&m->used[account], memory_order_relaxed), limit = limit_of(m, account);

    return used < limit ? limit - used : 0;
}

bool nbd_memory_fits(const struct nbd_conn *c, enum nbd_account account, uint64_t bytes)
{
    const struct nbd_memory *m = c->volume->engine->nbd;
    uint64_t unused = free_of(m, account), kept = limit_of(m, account) / SHARE;

    if (!c->held)
        return bytes <= unused;
    return bytes + kept <= unused && c->memory[account] + bytes <= unused / SHARE;
}

bool nbd_memory_take(struct nbd_conn *c, enum nbd_account account, uint64_t bytes)
{
    struct nbd_memory *m = c->volume->engine->nbd;

    if (!nbd_memory_fits(c, account, bytes))
        return false;
    nbd_memory_add(c, account, bytes);
    if (atomic_load_explicit(&m->used[account], memory_order_relaxed) <= limit_of(m, account))
        return true;
    nbd_memory_give(c, account, bytes); /* another worker took it meanwhile */
    return false;
}

void nbd_memory_add(struct nbd_conn *c, enum nbd_account account, uint64_t bytes)
{
    c->memory[account] += bytes;
    atomic_fetch_add_explicit(&c->volume->engine->nbd->used[account], bytes, memory_order_relaxed);
}

void nbd_memory_give(struct nbd_conn *c, enum nbd_account account, uint64_t bytes)
{
    c->memory[account] -= bytes;
    atomic_fetch_sub_explicit(&c->volume->engine->nbd->used[account], bytes, memory_order_relaxed);
}

uint64_t nbd_memory_window(const struct nbd_conn *c, uint64_t most)
{
    uint64_t share = free_of(c->volume->engine->nbd, NBD_PIPELINE) / SHARE;

    return min_u64(most, max_u64(share, MIN_WINDOW));
}

bool nbd_memory_socket(struct nbd_memory *m, uint64_t bytes)
{
    if (atomic_fetch_add(&m->sockets, bytes) + bytes > m->limit / 2 || bytes > free_of(m, NBD_REPLIES)) {
        atomic_fetch_sub(&m->sockets, bytes);
        return false;
    }
    atomic_fetch_add(&m->used[NBD_REPLIES], bytes);
    return true;
}

void nbd_memory_socket_closed(struct nbd_memory *m, uint64_t bytes)
{
    atomic_fetch_sub(&m->sockets, bytes);
    atomic_fetch_sub(&m->used[NBD_REPLIES], bytes);
}
