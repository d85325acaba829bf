#include "shadow/shadow_state.h"

#include "volume/engine.h"

#include <stdlib.h>

struct shadow_item {
    struct list link;
    struct glide_shadow_item item;
};

bool shadow_tell(struct volume *v, struct glide_shadow_item item)
{
    struct shadow_item *x = malloc(sizeof(*x));

    if (!x)
        return false;
    x->item = item;
    x->item.volume = v->cookie;
    outbox_put(&v->engine->shadows, &x->link);
    return true;
}

int glide_shadow_next(glide_engine *engine, int timeout_ms, struct glide_shadow_item *out)
{
    struct outbox *o = &engine->shadows;
    int got = outbox_wait(o, timeout_ms);

    if (got > 0) {
        struct shadow_item *x = container_of(list_pop(&o->items), struct shadow_item, link);
        *out = x->item;
        o->count--;
        free(x);
    }
    pthread_mutex_unlock(&o->lock);
    return got;
}

void shadow_give_up(struct volume *v, int err)
{
    if (shadow_of(v)->broken)
        return;
    shadow_of(v)->broken = true;
    shadow_tell(v, (struct glide_shadow_item){.kind = GLIDE_SHADOW_ENDED, .err = -err});
    worker_want_tick(v->worker);
}
