/*
 * How guests reach a volume: a connection, a device. A volume knows no more about them than this; each kind has a
 * folder in transport/. All calls are on the volume's worker.
 */
#ifndef GLIDE_TRANSPORT_H
#define GLIDE_TRANSPORT_H

#include "base/util.h"

struct transport;
struct volume;

struct transport_ops {
    /* 10 times a second while something waits. True: again. NULL: nothing to do. */
    bool (*tick)(struct transport *t);
    /* Handoff: the volume is about to stand still. Answer what can be answered; nothing begins until unfreeze. Or
     * NULL. */
    void (*freeze)(struct transport *t);
    void (*unfreeze)(struct transport *t);
    /* The volume closes: end, and leave it (transport_leave) when no request is under way. NULL: it stays, and the
     * volume is not closed before it has left. */
    void (*close)(struct transport *t);
    /* The worker is to stop: what has no answer yet is left to the next process. Before close. Or NULL. */
    void (*let_go)(struct transport *t);
    /* Nothing of it is under way. One with `close` returns false as long as it is there. */
    bool (*idle)(const struct transport *t);
    /* The worker has ended, and this is still there: transport_leave. NULL: cannot happen. */
    void (*left_behind)(struct transport *t);
};

struct transport {
    const struct transport_ops *ops;
    struct list link; /* volume->transports */
};

/* It serves the volume from now on. */
void transport_enter(struct volume *v, struct transport *t, const struct transport_ops *ops);
void transport_leave(struct volume *v, struct transport *t);
/* The first of a kind, or NULL. */
struct transport *transport_find(const struct volume *v, const struct transport_ops *ops);

/* Each transport t of volume v; the body may let it leave. */
#define transports_each(t, v)                                                                                          \
    for (struct transport *t = container_of((v)->transports.next, struct transport, link),                             \
                          *next_ = container_of(t->link.next, struct transport, link);                                 \
         &t->link != &(v)->transports; t = next_, next_ = container_of(t->link.next, struct transport, link))

#endif
