/*
 * A hostile driver: random rings, descriptors, headers and records, some of them almost right, while another thread
 * scribbles over all of it. Whatever happens, the core goes on: a device stops or answers, and ends when it is told to.
 *
 *   vhost_fuzz DIRECTORY SECONDS SEED
 *
 * Prints how many descriptors it made up. Linked with the core as it is, for the sanitizers.
 */
#include "transport/vhost/vhost.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define MUST(x)                                                                                                        \
    do {                                                                                                               \
        int err_ = (x);                                                                                                \
        if (err_ < 0) {                                                                                                \
            fprintf(stderr, "line %d: %d %s\n", __LINE__, err_, glide_error());                                        \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#define MEMORY (4u << 20)
#define NUM 64u
#define RECORD 65536u
#define USER 0x700000000000ull
#define DESCRIPTORS 0u
#define AVAILABLE 4096u
#define USED 8192u
#define DATA 16384u
#define VOLUME (8u << 20)

struct desc {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

static glide_engine *engine;
static glide_volume *volume;
static uint8_t *memory, *record;
static int memory_fd, record_fd, kick, called;
static uint64_t seed, descriptors, devices, broken, answered;
static atomic_bool over, scribbling;
static pthread_mutex_t view_lock = PTHREAD_MUTEX_INITIALIZER; /* memory does not move */
static uint16_t next_available;
static bool wild; /* else the device is given what is almost always right */

static uint64_t random_of(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}
static uint32_t below(uint32_t n) { return n ? (uint32_t)(random_of(&seed) >> 20) % n : 0; }
static bool chance(uint32_t percent) { return below(100) < percent; }

/* ---- threads ------------------------------------------------------------------------------------- */

/* The base of the volume is zeros. */
static void *answer_faults(void *arg)
{
    struct glide_fault f;

    (void)arg;
    while (!atomic_load(&over)) {
        if (glide_faults_next(engine, 8, 20, &f) != 1)
            continue;
        struct glide_install zero = {.block = f.block, .count = f.count, .kind = GLIDE_INSTALL_ZERO};
        glide_volume_install(volume, f.stamp, &zero, 1);
    }
    return NULL;
}

static void *scribble(void *arg)
{
    uint64_t state = *(uint64_t *)arg | 1;

    while (!atomic_load(&over)) {
        if (!atomic_load(&scribbling)) {
            usleep(200);
            continue;
        }
        pthread_mutex_lock(&view_lock);
        for (int i = 0; i < 16; i++) {
            uint64_t r = random_of(&state);
            ((volatile uint8_t *)memory)[(r >> 8) % (r & 1 ? DATA : DATA + 65536)] = (uint8_t)(r >> 40);
            if (!(r & 0xff0000))
                ((volatile uint8_t *)record)[(r >> 8) % RECORD] = (uint8_t)(r >> 44);
        }
        pthread_mutex_unlock(&view_lock);
    }
    return NULL;
}

/* ---- what it makes up ------------------------------------------------------------------------------ */

static uint64_t somewhere(void)
{
    if (wild && chance(3))
        return random_of(&seed) >> below(64);
    return DATA + below(MEMORY - DATA - 65536);
}

static struct desc *table(void) { return (struct desc *)(void *)(memory + DESCRIPTORS); }

static void put_header(uint64_t at)
{
    static const uint32_t types[] = {0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 2, 99};
    struct {
        uint32_t type, reserved;
        uint64_t sector;
    } h = {types[below(12)], 0, below(VOLUME / 512)};

    if (chance(3))
        h.sector = random_of(&seed);
    memcpy(memory + at % (MEMORY - 64), &h, sizeof(h));
}

/* A request as it should be, in descriptors from `first` on; returns how many. */
static uint32_t put_request(struct desc *d, uint32_t first, uint32_t most)
{
    uint32_t count = 0, data = below(most - 2);
    uint64_t header = DATA + below(65536) * 16;
    bool out = chance(50);

    put_header(header);
    d[first + count++] = (struct desc){header, 16, 1, 0};
    for (uint32_t i = 0; i < data; i++) {
        uint32_t length = chance(70) ? 512 * (1 + below(16)) : below(9000);
        d[first + count++] = (struct desc){somewhere(), length, (uint16_t)(1 | (out ? 0 : 2)), 0};
    }
    d[first + count++] = (struct desc){somewhere(), 1, 2, 0};
    for (uint32_t i = 0; i + 1 < count; i++)
        d[first + i].next = (uint16_t)(first + i + 1);
    descriptors += count;
    return count;
}

static void spoil(struct desc *d, uint32_t count)
{
    for (uint32_t i = 1 + below(3); i--;)
        ((uint8_t *)d)[below(count * 16)] = (uint8_t)random_of(&seed);
}

static void offer(uint32_t head)
{
    uint16_t *available = (uint16_t *)(void *)(memory + AVAILABLE);

    available[2 + next_available % NUM] = (uint16_t)head;
    __atomic_store_n(&available[1], ++next_available, __ATOMIC_RELEASE);
}

static uint16_t used_index(void) { return __atomic_load_n((uint16_t *)(void *)(memory + USED + 2), __ATOMIC_ACQUIRE); }

/* Fill the ring, with requests that are right but for some bytes, or with anything. */
static void make_requests(void)
{
    if (wild ? chance(20) : !below(500)) {
        for (uint32_t i = 0; i < NUM; i++)
            table()[i] = (struct desc){somewhere(), below(chance(50) ? 64 : 100000), (uint16_t)below(8),
                                       (uint16_t)below(NUM + 2)};
        descriptors += NUM;
        for (uint32_t i = below(8); i--;)
            offer(below(NUM));
        return;
    }
    for (uint32_t at = 0; at + 8 < NUM;) {
        uint32_t count = put_request(table(), at, 8);
        if (chance(30)) { /* an indirect one */
            uint64_t where = DATA + 1024 * 1024 + below(65536) * 16;
            struct desc *indirect = (struct desc *)(void *)(memory + where);
            uint32_t inside = put_request(indirect, 0, 12);
            if (wild && chance(5))
                spoil(indirect, inside);
            table()[at] = (struct desc){where, inside * 16, 4, 0};
        }
        if (wild ? chance(5) : !below(2000))
            spoil(&table()[at], count);
        offer(at);
        at += count;
    }
}

/* ---- devices ------------------------------------------------------------------------------------------ */

static int share(glide_vhost *d, bool twice)
{
    struct glide_vhost_region list[] = {{0, 1u << 20, USER, 0, memory_fd},
                                        {1u << 20, 1u << 20, USER + (1u << 20), 1u << 20, memory_fd},
                                        {2u << 20, (2u << 20) - 4096, USER + (2u << 20), 2u << 20, memory_fd}};

    if (twice)
        list[1].fd = list[2].fd = -1;
    return glide_vhost_memory(d, list, 3);
}

static glide_vhost *begin(void)
{
    struct glide_vhost_config config = {.id = ++devices, .serial = "fuzz"};
    struct glide_vhost_ring ring = {.descriptors = USER + DESCRIPTORS,
                                    .available = USER + AVAILABLE,
                                    .used = USER + USED,
                                    .num = NUM,
                                    .kick = kick,
                                    .call = called,
                                    .enabled = 1};
    glide_vhost *d;

    MUST(glide_vhost_open(volume, &config, &d));
    MUST(glide_vhost_features(d, chance(50) ? 1ull << 28 | 1ull << 29 : 1ull << 28, chance(80)));
    MUST(share(d, false));
    MUST(glide_vhost_inflight(d, record_fd, 0, 1, GLIDE_VHOST_DEPTH));
    if (chance(70))
        memset(record, 0, 64);
    memset(memory, 0, DATA);
    next_available = (uint16_t)random_of(&seed);
    *(uint16_t *)(void *)(memory + AVAILABLE + 2) = next_available;
    *(uint16_t *)(void *)(memory + USED + 2) = next_available;
    ring.base = next_available;
    if (chance(5))
        make_requests(); /* which the record may say are in flight */
    if (glide_vhost_ring_start(d, 0, &ring) < 0) {
        memset(record, 0, 64);
        if (glide_vhost_ring_start(d, 0, &ring) < 0) { /* it ended: the scribbler */
            glide_vhost_close(d);
            return NULL;
        }
    }
    return d;
}

static void shake(glide_vhost *d)
{
    struct glide_cutover at;

    switch (below(wild ? 40 : 400)) {
    case 0:
        MUST(glide_volume_freeze(volume, &at));
        make_requests();
        eventfd_write(kick, 1);
        MUST(glide_volume_unfreeze(volume));
        break;
    case 1:
        share(d, chance(50));
        break;
    case 2:
        glide_vhost_ring_stop(d, 0, (int)below(2));
        break;
    case 3:
        glide_vhost_ring_call(d, 0, chance(50) ? called : -1);
        break;
    case 4:
        MUST(ftruncate(memory_fd, below(2) ? 0 : 4096 * below(MEMORY / 4096)));
        break;
    case 5:
        memcpy(record + below(RECORD - 8), &(uint64_t){random_of(&seed)}, 8);
        break;
    default:
        break;
    }
}

static void run_device(void)
{
    char why[256] = "";
    glide_vhost *d = begin();

    for (uint32_t rounds = d ? 1 + below(50) : 0; rounds--;) {
        make_requests();
        eventfd_write(kick, 1);
        shake(d);
        for (int i = 0; i < 200 && used_index() != next_available && !why[0]; i++) {
            usleep(10);
            glide_vhost_trouble(d, why, sizeof(why));
        }
        answered += used_index() == next_available;
        if (why[0])
            break;
        MUST(ftruncate(memory_fd, MEMORY));
    }
    broken += why[0] != 0;
    if (d)
        MUST(glide_vhost_close(d));
    MUST(ftruncate(memory_fd, MEMORY));
}

/* Give the log back: what was written is lost, and nobody looks. */
static void upload(void)
{
    uint64_t seq;

    MUST(glide_volume_seal(volume, &seq));
    MUST(glide_volume_committed(volume, seq));
    MUST(glide_volume_retire(volume, seq));
}

int main(int argc, char **argv)
{
    char log[4096], cache[4096];
    pthread_t faults, scribbler;
    uint64_t until = now_ns() + strtoull(argv[2], NULL, 10) * 1000000000u;
    struct glide_recovery recovery;

    if (argc != 4)
        return 2;
    seed = strtoull(argv[3], NULL, 10) * 2654435761u + 1;
    snprintf(log, sizeof(log), "%s/log", argv[1]);
    snprintf(cache, sizeof(cache), "%s", argv[1]);
    struct glide_engine_config config = {.cache_dir = cache,
                                         .cache_bytes = 4u << 20,
                                         .log_limit = 256u << 20,
                                         .map_budget = 64u << 20,
                                         .nbd_memory = 64u << 20,
                                         .segment_sectors = 1024,
                                         .workers = 1};
    struct glide_volume_config of = {.cookie = 1, .log_dir = log, .size = VOLUME};
    MUST(glide_engine_open(&config, &engine));
    MUST(glide_volume_open(engine, &of, &volume, &recovery));
    memory_fd = memfd_create("guest", MFD_CLOEXEC);
    record_fd = memfd_create("record", MFD_CLOEXEC);
    MUST(ftruncate(memory_fd, MEMORY));
    MUST(ftruncate(record_fd, RECORD));
    record = mmap(NULL, RECORD, PROT_READ | PROT_WRITE, MAP_SHARED, record_fd, 0);
    kick = eventfd(0, EFD_NONBLOCK);
    called = eventfd(0, EFD_NONBLOCK);
    /* Its own view of the memory goes through the core's handler, too, when the file is shorter for a while. */
    static _Atomic bool torn;
    struct vhost_map view;
    MUST(vhost_map_open(memory_fd, MEMORY, &torn, &view));
    memory = view.base;
    pthread_create(&faults, NULL, answer_faults, NULL);
    pthread_create(&scribbler, NULL, scribble, &seed);
    while (now_ns() < until) {
        wild = chance(50);
        atomic_store(&scribbling, wild && chance(50));
        run_device();
        if (atomic_load(&torn)) { /* pages of ours are not the file's any more */
            pthread_mutex_lock(&view_lock);
            vhost_map_close(&view);
            atomic_store(&torn, false);
            MUST(vhost_map_open(memory_fd, MEMORY, &torn, &view));
            memory = view.base;
            pthread_mutex_unlock(&view_lock);
        }
        upload();
    }
    atomic_store(&over, true);
    pthread_join(faults, NULL);
    pthread_join(scribbler, NULL);
    MUST(glide_volume_close(volume));
    glide_engine_close(engine);
    printf("%llu descriptors, %llu devices, %llu of them stopped, %llu rounds answered\n",
           (unsigned long long)descriptors, (unsigned long long)devices, (unsigned long long)broken,
           (unsigned long long)answered);
    return 0;
}
