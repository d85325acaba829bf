/*
 * Small things every part of the core uses: intrusive lists, time, rounding.
 */
#ifndef GLIDE_UTIL_H
#define GLIDE_UTIL_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))
#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

static inline uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }
static inline uint64_t div_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

static inline uint64_t clock_ns(clockid_t clock)
{
    struct timespec ts;
    clock_gettime(clock, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}
static inline uint64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }
static inline int64_t now_ms(void) { return (int64_t)(now_ns() / 1000000u); }

/* From `since` to `now`, 0 if that is later: `now` may have been taken before `since`, and shortly after boot the
 * clock is smaller than most limits, so nothing is subtracted from it. */
static inline uint64_t elapsed_ns(uint64_t now, uint64_t since) { return now > since ? now - since : 0; }

/* In a loop that waits for another CPU. */
static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Set the calling thread's error text (printf style); returns err, so `return fail(-EINVAL, ...)`. */
int fail(int err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- doubly linked intrusive list; an element points to itself when unlinked ---- */

struct list {
    struct list *next, *prev;
};

static inline void list_init(struct list *l) { l->next = l->prev = l; }
static inline bool list_empty(const struct list *l) { return l->next == l; }
static inline void list_insert(struct list *after, struct list *e)
{
    e->next = after->next;
    e->prev = after;
    after->next->prev = e;
    after->next = e;
}
static inline void list_append(struct list *head, struct list *e) { list_insert(head->prev, e); }
static inline void list_prepend(struct list *head, struct list *e) { list_insert(head, e); }
static inline void list_remove(struct list *e)
{
    e->next->prev = e->prev;
    e->prev->next = e->next;
    list_init(e);
}
static inline struct list *list_pop(struct list *head)
{
    struct list *e = head->next;
    if (e == head)
        return NULL;
    list_remove(e);
    return e;
}
/* Move everything from `from` to the tail of `to`. */
static inline void list_splice(struct list *to, struct list *from)
{
    if (list_empty(from))
        return;
    from->next->prev = to->prev;
    from->prev->next = to;
    to->prev->next = from->next;
    to->prev = from->prev;
    list_init(from);
}
#define list_each(pos, head) for (struct list *pos = (head)->next; pos != (head); pos = pos->next)

#endif
