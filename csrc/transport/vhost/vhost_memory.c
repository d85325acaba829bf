#include "transport/vhost/vhost_memory.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define TMPFS_MAGIC 0x01021994
#define HUGETLBFS_MAGIC 0x958458f6
#define MAPPINGS 16384u /* of all devices of the process */

/* ---- SIGBUS ------------------------------------------------------------------------------------ */

/*
 * What the handler looks into. An entry is written under `lock` by whoever maps, from_ last and cleared first, and read
 * by the handler on a thread that has touched the mapping, so while it is there.
 */
static struct mapping {
    _Atomic uintptr_t from;
    uintptr_t to;
    uintptr_t page; /* bytes */
    _Atomic bool *torn;
} mappings[MAPPINGS + 1];
static _Atomic uint32_t highest; /* entry in use */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;

/* Not ours: what would have happened without this handler. */
static void pass_on(int number, siginfo_t *info, void *context)
{
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else {
        struct sigaction die = {.sa_handler = SIG_DFL};
        sigaction(number, &die, NULL);
        if (info->si_code <= 0) /* sent by somebody: it does not come again by itself */
            raise(number);
    }
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr;
    int saved = errno;

    for (uint32_t i = 1; info->si_code > 0 && i <= atomic_load(&highest); i++) {
        struct mapping *m = &mappings[i];
        uintptr_t from = atomic_load(&m->from);
        if (!from || at < from || at >= m->to)
            continue;
        void *page = (void *)(at / m->page * m->page);
        atomic_store(m->torn, true);
        if (mmap(page, m->page, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == page) {
            errno = saved;
            return;
        }
    }
    pass_on(number, info, context);
}

/* Whoever came later than us is asked after us. Under `lock`. */
static int install_handler(void)
{
    struct sigaction now, ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};

    if (sigaction(SIGBUS, NULL, &now))
        return -errno;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_sigbus)
        return 0;
    before = now;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, NULL) ? -errno : 0;
}

static int watch(struct vhost_map *map, uint64_t page, _Atomic bool *torn)
{
    pthread_mutex_lock(&lock);
    int err = install_handler();
    uint32_t i = 1;
    while (i <= MAPPINGS && atomic_load(&mappings[i].from))
        i++;
    if (!err && i > MAPPINGS)
        err = -ENOSPC;
    if (!err) {
        mappings[i].to = (uintptr_t)map->base + map->bytes;
        mappings[i].page = page;
        mappings[i].torn = torn;
        atomic_store(&mappings[i].from, (uintptr_t)map->base);
        if (i > atomic_load(&highest))
            atomic_store(&highest, i);
        map->slot = i;
    }
    pthread_mutex_unlock(&lock);
    return err;
}

/* ---- mappings ------------------------------------------------------------------------------------ */

/*
 * Only memory: a page fault in a file of a disk, a network or FUSE waits for it, and with it the worker and all its
 * volumes. From the beginning of the file, because an offset within a huge page cannot be mapped.
 */
int vhost_map_open(int fd, uint64_t bytes, _Atomic bool *torn, struct vhost_map *out)
{
    struct stat st;
    struct statfs fs;

    *out = (struct vhost_map){0};
    if (fstat(fd, &st) || fstatfs(fd, &fs))
        return fail(-errno, "the file of its memory cannot be looked at: %s", strerror(errno));
    if (!S_ISREG(st.st_mode) || (fs.f_type != TMPFS_MAGIC && (uint64_t)fs.f_type != HUGETLBFS_MAGIC))
        return fail(-EINVAL, "its memory is not a memfd or a file of tmpfs or hugetlbfs");
    if (!bytes || bytes > (uint64_t)1 << 52 || (uint64_t)st.st_size < bytes)
        return fail(-EINVAL, "the file of its memory has %llu bytes and should have %llu",
                    (unsigned long long)st.st_size, (unsigned long long)bytes);
    uint64_t page = (uint64_t)fs.f_type == HUGETLBFS_MAGIC ? (uint64_t)fs.f_bsize : (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t length = div_up(bytes, page) * page;
    void *base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (base == MAP_FAILED)
        return fail(-errno, "its memory cannot be mapped: %s", strerror(errno));
    madvise(base, length, MADV_DONTFORK); /* a child has no use for it, and copies its page tables */
    madvise(base, length, MADV_DONTDUMP); /* it is the guest's, and much */
    *out = (struct vhost_map){.base = base, .bytes = length};
    int err = watch(out, page, torn);
    if (!err)
        return 0;
    munmap(base, length);
    *out = (struct vhost_map){0};
    return fail(err, "too many regions of memory are mapped");
}

void vhost_map_close(struct vhost_map *map)
{
    if (!map->slot)
        return;
    pthread_mutex_lock(&lock);
    atomic_store(&mappings[map->slot].from, 0);
    munmap(map->base, map->bytes); /* under the lock: whoever gets these addresses next has another entry */
    pthread_mutex_unlock(&lock);
    map->slot = 0;
}

/* ---- the table ------------------------------------------------------------------------------------- */

static bool overlap(uint64_t a, uint64_t b, uint64_t a_size, uint64_t b_size)
{
    return a < b + b_size && b < a + a_size;
}

static int check(const struct glide_vhost_region *list, uint32_t count)
{
    if (count > GLIDE_VHOST_REGIONS)
        return fail(-EINVAL, "a memory table has at most %u regions, not %u", GLIDE_VHOST_REGIONS, count);
    for (uint32_t i = 0; i < count; i++) {
        const struct glide_vhost_region *r = &list[i];
        if (!r->size || r->guest + r->size < r->guest || r->user + r->size < r->user || r->offset + r->size < r->offset)
            return fail(-EINVAL, "region %u of the memory table is empty or has no end", i);
        for (uint32_t k = 0; k < i; k++)
            if (overlap(r->guest, list[k].guest, r->size, list[k].size) ||
                overlap(r->user, list[k].user, r->size, list[k].size))
                return fail(-EINVAL, "regions %u and %u of the memory table overlap", k, i);
    }
    return 0;
}

static struct vhost_region *find_same(const struct vhost_memory *old, const struct glide_vhost_region *at)
{
    for (uint32_t i = 0; old && i < old->count; i++) {
        struct vhost_region *r = old->regions[i];
        if (r->at.guest == at->guest && r->at.size == at->size && r->at.user == at->user && r->at.offset == at->offset)
            return r;
    }
    return NULL;
}

static int open_region(const struct glide_vhost_region *at, _Atomic bool *torn, struct vhost_region **out)
{
    struct vhost_region *r = calloc(1, sizeof(*r));

    if (!r)
        return fail(-ENOMEM, "no memory for a memory table");
    r->at = *at;
    int err = vhost_map_open(at->fd, at->offset + at->size, torn, &r->map);
    if (err) {
        free(r);
        return err;
    }
    *out = r;
    return 0;
}

int vhost_memory_new(const struct vhost_memory *old, const struct glide_vhost_region *list, uint32_t count,
                     _Atomic bool *torn, struct vhost_memory **out)
{
    int err = check(list, count);
    struct vhost_memory *m = err ? NULL : calloc(1, sizeof(*m) + count * sizeof(m->regions[0]));

    *out = NULL;
    if (!m)
        return err ? err : fail(-ENOMEM, "no memory for a memory table");
    list_init(&m->link);
    m->refs = 1;
    while (!err && m->count < count) {
        const struct glide_vhost_region *at = &list[m->count];
        struct vhost_region *r = at->fd < 0 ? find_same(old, at) : NULL;
        if (at->fd < 0 && !r)
            err = fail(-ENOENT, "the memory table has no such region");
        else if (at->fd >= 0)
            err = open_region(at, torn, &r);
        if (err)
            break;
        r->tables++;
        m->regions[m->count++] = r;
    }
    if (err) {
        vhost_memory_free(m);
        return err;
    }
    *out = m;
    return 0;
}

void vhost_memory_free(struct vhost_memory *m)
{
    for (uint32_t i = 0; i < m->count; i++) {
        struct vhost_region *r = m->regions[i];
        if (--r->tables)
            continue;
        vhost_map_close(&r->map);
        free(r);
    }
    free(m);
}

/* ---- look-up --------------------------------------------------------------------------------------- */

static uint8_t *host_of(const struct vhost_region *r, uint64_t inside) { return r->map.base + r->at.offset + inside; }

uint8_t *vhost_guest_at(struct vhost_memory *m, uint64_t address, uint64_t *length)
{
    for (uint32_t i = 0; i < m->count; i++) {
        uint32_t index = (m->last + i) % m->count;
        const struct vhost_region *r = m->regions[index];
        uint64_t inside = address - r->at.guest;
        if (address < r->at.guest || inside >= r->at.size)
            continue;
        m->last = index;
        *length = min_u64(*length, r->at.size - inside);
        return host_of(r, inside);
    }
    return NULL;
}

uint8_t *vhost_user_at(const struct vhost_memory *m, uint64_t address, uint64_t length)
{
    for (uint32_t i = 0; i < m->count; i++) {
        const struct vhost_region *r = m->regions[i];
        uint64_t inside = address - r->at.user;
        if (address >= r->at.user && inside < r->at.size && length <= r->at.size - inside)
            return host_of(r, inside);
    }
    return NULL;
}
